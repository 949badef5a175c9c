"""Names, sizes, parameters and errors of networks that are built by name."""

from pathlib import Path

import pytest
import torch
from torch import nn

from windlass.errors import ConfigError
from windlass.networks import NETWORKS, build_network, check_network_name, input_size
from windlass.networks.googlenet import GoogLeNet
from windlass.networks.lenet import C3_WIRING, LeNet5, PartialConv2d, RadialBasisOutput, Subsampling

PARAMETERS = {
    "lenet5": 60_000,
    "alexnet": 61_100_840,
    "vgg11": 132_863_336,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "googlenet": 6_998_552,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "coates": 97 * 97 * 16 * 3 * 8 * 8,  # a filter of 8x8x3 for each of 16 maps at each of 97x97 positions
}


def build(name: str, **changes: int) -> nn.Module:
    entry = NETWORKS[name]
    given = {
        "num_classes": entry.num_classes,
        "in_channels": entry.in_channels,
        "image_size": entry.default_size,
    }
    return build_network(name, **{**given, **changes})


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_those_of_the_paper(name: str) -> None:
    with torch.device("meta"):  # the numbers of elements need no elements
        network = build(name)
    counted = [p for path, p in network.named_parameters() if not path.startswith("aux")]
    assert sum(p.numel() for p in counted) == PARAMETERS[name]
    if name == "googlenet":
        assert sum(p.numel() for p in counted if p.dim() > 1) == 6_990_272


@pytest.mark.parametrize("name", ["lenet5", "alexnet", "vgg11", "googlenet", "resnet18", "resnet50"])
def test_smallest_images_give_logits(name: str) -> None:
    side = NETWORKS[name].min_size
    network = build(name, num_classes=7, in_channels=2, image_size=side).eval()
    with torch.no_grad():
        out = network(torch.randn(2, 2, side, side))
    assert out.shape == (2, 7)
    assert bool(out.isfinite().all())


def test_googlenet_has_heads_from_side_79_on_and_uses_them_in_training_only() -> None:
    assert build("googlenet", image_size=78).aux4a is None
    network = build("googlenet", image_size=79, num_classes=5)
    assert isinstance(network, GoogLeNet)
    outs = network.train()(torch.randn(2, 3, 79, 79))
    assert [tuple(out.shape) for out in outs] == [(2, 5)] * 3
    assert network.eval()(torch.randn(2, 3, 79, 79)).shape == (2, 5)


def test_partial_convolution_sees_only_wired_maps() -> None:
    layer = PartialConv2d(C3_WIRING, in_channels=6, kernel_size=5)
    nn.init.uniform_(layer.bias)
    x = torch.randn(2, 6, 7, 7)
    rows = iter(layer.weight)
    for k, inputs in enumerate(C3_WIRING):
        want = layer.bias[k] + sum(
            (nn.functional.conv2d(x[:, c : c + 1], next(rows)[None, None]) for c in inputs), torch.zeros(1)
        )
        torch.testing.assert_close(layer(x)[:, k : k + 1], want, atol=1e-5, rtol=1e-5)


def test_subsampling_is_coefficient_times_sum_plus_bias() -> None:
    layer = Subsampling(2)
    nn.init.constant_(layer.bias, 0.5)
    x = torch.arange(16.0).view(1, 1, 4, 4).repeat(1, 2, 1, 1)
    sums = torch.tensor([[10.0, 18.0], [42.0, 50.0]])
    for channel in range(2):
        torch.testing.assert_close(layer(x)[0, channel], layer.coefficient[channel] * sums + 0.5)


def test_radial_basis_output_is_minus_squared_distance() -> None:
    layer = RadialBasisOutput(84, 300, variance=0.5)
    x = torch.randn(3, 84)
    want = -((x[:, None] - layer.codes[None]) ** 2).sum(2)
    torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=1e-5)
    assert set(layer.codes.flatten().tolist()) == {-1.0, 1.0}
    assert len({tuple(code) for code in layer.codes.tolist()}) == 300
    assert not list(layer.parameters())
    torch.testing.assert_close(layer.codes, RadialBasisOutput(84, 300, variance=1.0).codes)


def test_lenet5_learns_eight_images() -> None:
    torch.manual_seed(0)
    network = build("lenet5")
    assert isinstance(network, LeNet5)
    x, y = torch.randn(8, 1, 32, 32), torch.arange(8)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert torch.equal(network(x).argmax(1), y)


def test_stem_follows_image_size_unless_chosen() -> None:
    def first_stride(**arguments: object) -> object:
        network = build_network("resnet18", num_classes=2, in_channels=1, **arguments)  # type: ignore[arg-type]
        return next(m for m in network.modules() if isinstance(m, nn.Conv2d)).stride

    assert first_stride(image_size=64) == (1, 1)
    assert first_stride(image_size=65) == (2, 2)
    assert first_stride(image_size=32, stem="imagenet") == (2, 2)
    assert first_stride(image_size=224, stem="cifar") == (1, 1)
    with pytest.raises(ConfigError, match="unknown stem 'cifra'; did you mean 'cifar'"):
        first_stride(image_size=32, stem="cifra")


def test_input_size() -> None:
    assert [input_size("lenet5", side) for side in (8, 28, 224)] == [32, 32, 32]
    assert [input_size("alexnet", side) for side in (8, 63, 300)] == [63, 63, 300]
    assert input_size("pkg.mod:net", 17) == 17


@pytest.mark.parametrize("name", ["lenet", "a.b:", ":f", "a..b:f", "a-b:f", "a:b:c", "a.class:f", ""])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        check_network_name(name)


def test_near_name_is_suggested() -> None:
    with pytest.raises(ConfigError, match="did you mean 'resnet50'"):
        check_network_name("resnet-50")


MINE = """
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.fc = nn.Linear(width, num_classes)
    def forward(self, x):
        return self.fc(x)
def everything(**arguments):
    net = nn.Identity()
    net.arguments = arguments
    return net
def nothing():
    return 3
def breaks(num_classes):
    raise TypeError("no good")
number = 5
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for name in ("windlass_mine", "windlass_broken", "windlass_needs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "windlass_mine.py").write_text(MINE)
    (tmp_path / "windlass_broken.py").write_text("1 / 0")
    (tmp_path / "windlass_needs.py").write_text("import windlass_no_such_package")
    return tmp_path


def custom(function: str, **arguments: object) -> nn.Module:
    return build_network(function, num_classes=3, in_channels=1, image_size=8, **arguments)


def test_custom_network_gets_what_it_names(here: Path) -> None:
    network = custom("windlass_mine:Net", width=9)
    assert isinstance(network.fc, nn.Linear)
    assert network.fc.weight.shape == (3, 9)
    arguments = {"num_classes": 3, "in_channels": 1, "image_size": 8, "depth": 2}
    assert custom("windlass_mine:everything", depth=2).arguments == arguments


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("windlass_missing:f", {}, "no module 'windlass_missing'"),
        ("windlass_mine:Nett", {}, "did you mean 'Net'"),
        ("windlass_mine:number", {}, "number is a int, not a function"),
        ("windlass_mine:nothing", {}, "gave a int, not a torch.nn.Module"),
        ("windlass_mine:breaks", {}, "TypeError: no good"),
        ("windlass_mine:Net", {"widht": 1}, "unknown argument 'widht'; did you mean 'width'"),
        ("windlass_broken:f", {}, "ZeroDivisionError: division by zero"),
        ("windlass_needs:f", {}, "No module named 'windlass_no_such_package'"),
        ("alexnet", {}, "needs images of side 63 at least, got 8"),
    ],
)
def test_errors_are_one_clear_line(here: Path, name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        custom(name, **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_argument_of_a_built_in_network() -> None:
    with pytest.raises(ConfigError, match="unknown argument 'dropuot'; did you mean 'dropout'"):
        build_network("alexnet", num_classes=2, in_channels=1, image_size=63, dropuot=0.1)
