"""What one worker computes: batch statistics, masks, fringes, empty parts, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from windlass.errors import ConfigError
from windlass.layers import Conv2d
from windlass.parallel import NullTransport, PlacedModule, apply
from windlass.parallel.connect import attach, nothing
from windlass.parallel.fringe import fetch, fringe
from windlass.parallel.masks import PlacedDropout, Position
from windlass.parallel.normalise import PlacedBatchNorm
from windlass.parallel.transport import total
from windlass.plan.halo import Halo
from windlass.plan.layout import WHOLE, Split, extents
from windlass.plan.mesh import Mesh
from windlass.plan.placement import Placement

ONE = NullTransport(Mesh.parse("one:1"), 0)
TWO = Mesh.parse("two:2")


@pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_batch_normalisation_is_pytorchs(settings: dict[str, Any]) -> None:
    torch.manual_seed(1)
    plain: Any = nn.BatchNorm2d(5, **settings).double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    twin = nn.BatchNorm2d(5, **settings).double()
    twin.load_state_dict(plain.state_dict())
    placed = PlacedBatchNorm(twin, axes=(0,), transport=ONE, name="bn")
    for step in range(3):
        x = (torch.randn(4, 5, 3, 2, dtype=torch.float64) + 7).requires_grad_()
        x_placed = x.detach().clone().requires_grad_()
        weights = torch.randn_like(x)
        for model, images in ((plain, x), (placed, x_placed)):
            (model(images) * weights).sum().backward()
        # float64; sums of 24 numbers near 7 and their squares lose some 2^-53 * 24 * 49
        assert_near(x_placed.grad, x.grad)
        for name, buffer in plain.state_dict().items():
            assert_near(placed.state_dict()[name], buffer)
        for ours, theirs in zip(placed.parameters(), plain.parameters(), strict=True):
            assert_near(ours.grad, theirs.grad)
        if step == 1:
            plain.eval(), placed.eval()  # its third step is by the running statistics


def assert_near(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_large_means_cost_no_digits() -> None:
    """Around the running mean, differences of sums keep their digits; around zero they would lose all seven."""
    norm = nn.BatchNorm2d(1)
    norm.running_mean.fill_(3000.0)  # type: ignore[union-attr]
    placed = PlacedBatchNorm(norm, axes=(0,), transport=ONE, name="bn")
    x = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(2)) * 0.1 + 3000
    exact = torch.var(x.double(), correction=0)
    y = placed(x)
    assert y.var(correction=0).item() == pytest.approx(float(exact / (exact + norm.eps)), rel=1e-3)


def dropout(layout: Any, mesh: Mesh, rank: int, position: Position, number: int = 3) -> PlacedDropout:
    return PlacedDropout(0.4, shape=(6, 5, 4), layout=layout, mesh=mesh, rank=rank, position=position, number=number)


@pytest.mark.parametrize("part", [Split("batch"), Split("channel"), Split("channel", 2), WHOLE])
def test_masks_are_parts_of_one_mask(part: Any) -> None:
    position = Position(seed=11, batch=6)
    whole = dropout((WHOLE,), Mesh.parse("one:1"), 0, position).mask(torch.empty(6, 5, 4))
    mesh = Mesh.parse("three:3")
    for rank in range(3):
        box = extents((6, 5, 4), (part,), mesh, rank)
        own = torch.empty([stop - start for start, stop in box])
        found = dropout((part,), mesh, rank, position).mask(own)
        assert torch.equal(found, whole[tuple(slice(*span) for span in box)])
    assert 40 < int(whole.sum()) < 100  # of 120, three in five


def test_masks_differ_by_seed_op_and_sample() -> None:
    def mask(seed: int, number: int, samples: list[int] | None = None) -> Tensor:
        position = Position(seed=seed, batch=6, samples=samples)
        return dropout((WHOLE,), Mesh.parse("one:1"), 0, position, number).mask(torch.empty(6, 5, 4))

    base = mask(1, 2)
    assert torch.equal(base, mask(1, 2))
    assert not torch.equal(base, mask(2, 2)) and not torch.equal(base, mask(1, 3))
    assert not torch.equal(base[0], base[1])
    assert torch.equal(mask(1, 2, [5, 4, 3, 2, 1, 0]), base.flip(0))  # a round has samples of its own numbers


def test_dropout_scales_and_its_gradient_has_the_same_mask() -> None:
    layer = dropout((WHOLE,), Mesh.parse("one:1"), 0, Position(seed=5, batch=6)).train()
    x = torch.ones(6, 5, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach())
    assert y.detach().unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert layer.eval()(x) is x


@pytest.mark.parametrize("pad", ["zero", "lowest"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (2, 2, 0), (5, 3, 2), (1, 2, 0)])
def test_a_fringe_is_the_padded_image(pad: str, kernel: int, stride: int, padding: int) -> None:
    """On one worker the window is the whole image; what no window reads gets no gradient."""
    x = torch.randn(2, 3, 8, 4, requires_grad=True)
    length = (8 + 2 * padding - kernel) // stride + 1
    halo = Halo("height", 0, kernel=kernel, stride=stride, padding=padding, dilation=1, pad=pad)
    found = fetch(x, (fringe(halo, 8, length, ONE.mesh, 0),), transport=ONE, tag="x")
    value = float("-inf") if pad == "lowest" else 0.0
    padded = nn.functional.pad(x.detach(), (0, 0, padding, padding), value=value)
    read = (length - 1) * stride + kernel
    assert torch.equal(found, padded[:, :, :read])
    found.nan_to_num(neginf=0.0).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.sum(dim=(0, 1, 3)).tolist() == [24.0 * (row + padding < read) for row in range(8)]


def test_empty_parts_stay_connected() -> None:
    x, weight = torch.randn(2, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    empty = nothing((2, 0), [x, weight])
    empty.sum().backward()  # type: ignore[no-untyped-call]
    attach(x * 2, [weight]).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(x.grad, torch.full((2, 3), 2.0)) and torch.equal(weight.grad, torch.zeros(4))  # type: ignore[arg-type]


def test_sums_go_in_the_order_of_members() -> None:
    """1 + 2^-24 + 2^-24 is 1 from the left, and more from the right."""
    small = torch.tensor(2.0**-24)
    assert total([torch.tensor(1.0), small, small]).item() == 1.0
    assert total([small, small, torch.tensor(1.0)]).item() > 1.0


# --- what is refused, and what holds of a divided network -----------------------------------------------------


def divided(network: nn.Module, ways: dict[str, tuple[str, ...]], rank: int = 0) -> PlacedModule:
    placement = Placement(TWO, ("whole",), ways)
    return apply(network, placement, input_shape=(4, 3, 8, 8), transport=NullTransport(TWO, rank))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(self.conv(self.norm(x))))
        return out


def test_a_layer_that_is_called_twice_lies_in_one_way() -> None:
    placed = divided(Twice(), {"conv": ("replicate",)})
    assert [name for name, _ in placed.named_parameters()] == [name for name, _ in Twice().named_parameters()]
    with pytest.raises(ConfigError, match="norm#2 is called twice and divided in two ways: replicate and out"):
        divided(Twice(), {"conv": ("out",)})


def test_an_activation_inside_a_layer_wants_the_whole_sum() -> None:
    network = nn.Sequential(Conv2d(3, 4, 3, activation="relu"))
    assert type(divided(network, {"0": ("out",)}).get_submodule("0")) is Conv2d
    with pytest.raises(ConfigError, match="layer 0: its activation is part of it"):
        divided(network, {"0": ("in",)})


def test_parameters_keep_their_names_and_the_first_parts_are_larger() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(180, 7))
    shapes = [dict(divided(network, {"0": ("out",), "3": ("in",)}, rank).state_dict()) for rank in (0, 1)]
    for name, whole in network.state_dict().items():
        parts = [shape[name].shape for shape in shapes]
        if name in ("3.bias", "1.num_batches_tracked"):
            assert parts == [whole.shape, whole.shape]
        else:
            dim = 1 if name == "3.weight" else 0
            unit = 36 if name == "3.weight" else 1
            assert [part[dim] for part in parts] == [3 * unit, 2 * unit], name


def test_images_and_states_of_another_shape_are_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    placed = apply(network, "data", input_shape=(4, 3, 8, 8), transport=NullTransport(TWO, 1))
    placed.begin_step(0, 5)
    assert placed(torch.zeros(2, 3, 8, 8)).shape == (2, 6)
    with pytest.raises(ConfigError, match=r"needs images of shape \(2, 3, 8, 8\), its part of 5, got \(4, 3, 8, 8\)"):
        placed(torch.zeros(4, 3, 8, 8))
    with pytest.raises(ConfigError, match=r"the state of another network: 1\.bias in one"):
        placed.load_full_state_dict({"1.weight": torch.zeros(6, 192)})
    with pytest.raises(ConfigError, match=r"1.bias needs shape \(6,\), got \(5,\)"):
        placed.load_full_state_dict({"1.weight": torch.zeros(6, 192), "1.bias": torch.zeros(5)})
    state = {"1.weight": torch.randn(6, 192), "1.bias": torch.randn(6)}
    model = apply(network, "model", input_shape=(4, 3, 8, 8), transport=NullTransport(TWO, 1))
    model.load_full_state_dict(state)
    assert torch.equal(model.get_parameter("1.weight"), state["1.weight"][3:])


def test_names_that_a_divided_network_uses_itself_are_refused() -> None:
    class Runs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.run = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.run(x.flatten(1))
            return out

    with pytest.raises(ConfigError, match="a part of the network is called 'run'"):
        apply(Runs(), "data", input_shape=(2, 3, 1, 1), transport=ONE)


def test_trunk_and_head_run_apart() -> None:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 6), nn.ReLU())
    placed = apply(network, "data", input_shape=(2, 3, 8, 8), transport=ONE)
    trunk, head = placed.trunk_and_head("3")
    assert (trunk, head) == (("0", "1", "2"), ("3", "4"))
    images = torch.randn(5, 3, 8, 8)
    between = placed.run(trunk, {"input": images}, batch=5)
    assert between.keys() == {"2"}
    out = placed.run(head, between, batch=5, arrived=("2",))
    assert out.keys() == {"4"} and torch.equal(out["4"], network(images))
    with pytest.raises(ConfigError, match="the network has no layer '9'"):
        placed.trunk_and_head("9")
