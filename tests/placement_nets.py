"""Small networks written by hand as the ops that a placement sees, and AlexNet."""

from __future__ import annotations

import math

from windlass.plan.graph import INPUT
from windlass.plan.placement import Op

Shape = tuple[int, ...]
Attributes = tuple[tuple[str, object], ...]


class Net:
    """A network in the making: each method adds an op and returns its name."""

    def __init__(self, input_shape: Shape) -> None:
        self.shapes: dict[str, Shape] = {INPUT: input_shape}
        self.ops: list[Op] = []

    def add(
        self,
        name: str,
        kind: str,
        inputs: tuple[str, ...],
        output_shape: Shape,
        *,
        parameters: tuple[tuple[str, Shape], ...] = (),
        attributes: Attributes = (),
    ) -> str:
        shapes = tuple(self.shapes[source] for source in inputs)
        self.ops.append(Op(name, kind, inputs, shapes, output_shape, parameters, attributes))
        self.shapes[name] = output_shape
        return name

    def conv(
        self, name: str, source: str, out: int, kernel: int, *, stride: int = 1, padding: int = 0, groups: int = 1
    ) -> str:
        n, c, *sides = self.shapes[source]
        after = [(side + 2 * padding - kernel) // stride + 1 for side in sides]
        weights = (("weight", (out, c // groups, kernel, kernel)), ("bias", (out,)))
        return self.add(
            name, "conv2d", (source,), (n, out, *after), parameters=weights,
            attributes=(*window(kernel, stride, padding), ("groups", groups)),
        )  # fmt: skip

    def pool(self, name: str, source: str, kernel: int, *, stride: int, padding: int = 0, kind: str = "max") -> str:
        n, c, *sides = self.shapes[source]
        after = [(side + 2 * padding - kernel) // stride + 1 for side in sides]
        return self.add(name, f"{kind}_pool2d", (source,), (n, c, *after), attributes=window(kernel, stride, padding))

    def same(self, name: str, source: str, kind: str = "relu") -> str:
        return self.add(name, kind, (source,), self.shapes[source])

    def norm(self, name: str, source: str) -> str:
        channels = self.shapes[source][1]
        weights = (("weight", (channels,)), ("bias", (channels,)))
        return self.add(name, "batch_norm", (source,), self.shapes[source], parameters=weights)

    def flatten(self, name: str, source: str) -> str:
        n, *rest = self.shapes[source]
        return self.add(name, "flatten", (source,), (n, math.prod(rest)))

    def linear(self, name: str, source: str, out: int) -> str:
        n, features = self.shapes[source]
        return self.add(name, "linear", (source,), (n, out), parameters=(("weight", (out, features)), ("bias", (out,))))


def window(kernel: int, stride: int, padding: int) -> Attributes:
    pairs = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": 1}
    return tuple((name, (value, value)) for name, value in pairs.items())


def chain(batch: int = 7) -> tuple[Op, ...]:
    """conv - relu - pool - conv - relu - flatten - linear - relu - linear, with sides that divide by nothing."""
    net = Net((batch, 3, 13, 11))
    at = net.same("relu1", net.conv("conv1", INPUT, 5, 3, padding=1))
    at = net.same("relu2", net.conv("conv2", net.pool("pool1", at, 3, stride=2), 7, 3))
    at = net.same("relu3", net.linear("fc1", net.flatten("flatten", at), 9))
    net.linear("fc2", at, 10)
    return tuple(net.ops)


def inception(batch: int = 7) -> tuple[Op, ...]:
    """Three branches joined by cat, then global pooling and a linear layer."""
    net = Net((batch, 3, 9, 9))
    stem = net.same("relu", net.conv("stem", INPUT, 6, 3, padding=1))
    one = net.conv("one", stem, 3, 1)
    three = net.conv("three", net.conv("reduce", stem, 2, 1), 5, 3, padding=1)
    pooled = net.conv("projected", net.pool("pool", stem, 3, stride=1, padding=1), 2, 1)
    joined = net.add("cat", "cat", (one, three, pooled), (batch, 10, 9, 9), attributes=(("dim", 1),))
    mean = net.add("mean", "adaptive_avg_pool2d", (joined,), (batch, 10, 1, 1))
    net.linear("fc", net.flatten("flatten", mean), 10)
    return tuple(net.ops)


def residual(batch: int = 7) -> tuple[Op, ...]:
    """Two blocks with batch normalisation, the second with a projection of stride 2."""
    net = Net((batch, 3, 8, 8))
    x = net.same("relu0", net.norm("bn0", net.conv("conv0", INPUT, 4, 3, padding=1)))
    for block, (channels, stride) in enumerate(((4, 1), (6, 2)), 1):
        y = net.same(f"b{block}.relu1", net.norm(f"b{block}.bn1", net.conv(f"b{block}.conv1", x, channels, 3,
                                                                           stride=stride, padding=1)))  # fmt: skip
        y = net.norm(f"b{block}.bn2", net.conv(f"b{block}.conv2", y, channels, 3, padding=1))
        side = x if stride == 1 else net.norm(f"b{block}.bn3", net.conv(f"b{block}.short", x, channels, 1, stride=2))
        total = net.add(f"b{block}.add", "add", (y, side), net.shapes[y])
        x = net.same(f"b{block}.relu2", total)
    mean = net.add("pool", "adaptive_avg_pool2d", (x,), (batch, 6, 1, 1))
    net.linear("fc", net.flatten("flatten", mean), 10)
    return tuple(net.ops)


def lenet5(batch: int = 7) -> tuple[Op, ...]:
    """LeNet-5 with the kinds that its own modules have."""
    net = Net((batch, 1, 28, 28))
    x = net.same("squash1", net.conv("c1", INPUT, 6, 5), "Squash")
    x = net.add("s2", "Subsampling", (x,), (batch, 6, 12, 12), parameters=(("coefficient", (6,)), ("bias", (6,))),
                attributes=window(2, 2, 0))  # fmt: skip
    x = net.add("c3", "PartialConv2d", (x,), (batch, 16, 8, 8), parameters=(("weight", (60, 5, 5)), ("bias", (16,))))
    x = net.same("squash3", x, "Squash")
    x = net.add("s4", "Subsampling", (x,), (batch, 16, 4, 4), parameters=(("coefficient", (16,)), ("bias", (16,))))
    x = net.flatten("flatten", net.conv("c5", x, 120, 4))
    x = net.same("squash6", net.linear("f6", x, 84), "Squash")
    net.add("output", "RadialBasisOutput", (x,), (batch, 10))
    return tuple(net.ops)


def alexnet(batch: int = 256) -> tuple[Op, ...]:
    """AlexNet at 224 pixels: 61,100,840 parameters, 58,631,144 of them in the fully connected layers."""
    net = Net((batch, 3, 224, 224))
    x = net.same("features.1", net.conv("features.0", INPUT, 64, 11, stride=4, padding=2))
    x = net.pool("features.2", x, 3, stride=2)
    x = net.same("features.4", net.conv("features.3", x, 192, 5, padding=2))
    x = net.pool("features.5", x, 3, stride=2)
    for number, channels in ((6, 384), (8, 256), (10, 256)):
        x = net.conv(f"features.{number}", x, channels, 3, padding=1)
        x = net.same(f"features.{number + 1}", x)
    x = net.flatten("classifier.0", net.pool("features.12", x, 3, stride=2))
    x = net.linear("classifier.2", net.same("classifier.1", x, "dropout"), 4096)
    x = net.same("classifier.4", net.same("classifier.3", x), "dropout")
    x = net.same("classifier.6", net.linear("classifier.5", x, 4096))
    net.linear("classifier.7", x, 1000)
    return tuple(net.ops)


NETS = {"chain": chain, "inception": inception, "residual": residual, "lenet5": lenet5}
