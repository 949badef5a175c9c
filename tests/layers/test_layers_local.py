import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from windlass.errors import ConfigError
from windlass.layers.local import (
    WINDOWS,
    Channels,
    DivisiveNorm2d,
    L2Pool2d,
    LocalContrastNorm2d,
    LocallyConnected2d,
    StopGradient,
    SubtractiveNorm2d,
    num_positions,
)

F64 = torch.float64
Sides = int | tuple[int, int]
Geometry = tuple[int, int, Sides, Sides, Sides, tuple[int, int]]
GEOMETRIES: list[Geometry] = [
    # channels, maps, kernel, stride, padding, size
    (1, 1, 1, 1, 0, (1, 1)),
    (2, 3, 3, 1, 0, (5, 5)),
    (3, 2, (2, 3), (2, 1), 0, (7, 5)),
    (1, 4, 3, 2, 1, (6, 8)),
    (2, 2, (3, 1), 1, (2, 0), (4, 3)),
]


def layer_of(geometry: Geometry, *, reconstruct: bool = False) -> tuple[LocallyConnected2d, Tensor]:
    """A layer in double precision with small numbers, and three images for it."""
    channels, maps, kernel, stride, padding, size = geometry
    torch.manual_seed(5)
    layer = LocallyConnected2d(
        channels, maps, kernel, stride=stride, padding=padding, input_size=size, reconstruct=reconstruct
    ).to(F64)
    return layer, torch.randn(3, channels, *size, dtype=F64)


def by_loop(layer: LocallyConnected2d, x_NCHW: Tensor) -> Tensor:
    """The definition, one output number at a time; the reconstruction's error as the last map."""
    (rows, columns), (down, right) = layer.kernel_size, layer.stride
    x = functional.pad(x_NCHW, (layer.padding[1],) * 2 + (layer.padding[0],) * 2)
    p_count, q_count, maps, _ = layer.weight.shape
    out = torch.zeros(len(x), maps + 1, p_count, q_count, dtype=x.dtype)
    for n in range(len(x)):
        for p in range(p_count):
            for q in range(q_count):
                field = x[n, :, p * down : p * down + rows, q * right : q * right + columns].flatten()
                back = torch.zeros_like(field)
                for k in range(maps):
                    out[n, k, p, q] = field @ layer.weight[p, q, k]
                    back += out[n, k, p, q] * layer.weight[p, q, k]
                out[n, maps, p, q] = ((back - field) ** 2).sum()
    return out


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_untied_filters_are_the_definitions(geometry: Geometry) -> None:
    layer, x = layer_of(geometry, reconstruct=True)
    expected = by_loop(layer, x).detach()
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-12, atol=1e-12)
    layer.reconstruct = False
    torch.testing.assert_close(layer(x).detach(), expected[:, :-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equal_filters_everywhere_are_a_convolution(geometry: Geometry) -> None:
    layer, x = layer_of(geometry)
    with torch.no_grad():
        layer.weight.copy_(layer.weight[:1, :1].clone())
    weight = layer.weight[0, 0].detach().view(-1, layer.in_channels, *layer.kernel_size)
    expected = functional.conv2d(x, weight, stride=layer.stride, padding=layer.padding)
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_decoder_is_the_transpose(geometry: Geometry) -> None:
    """⟨W x, y⟩ = ⟨x, Wᵀ y⟩."""
    layer, x = layer_of(geometry)
    maps = layer(x)
    y = torch.randn_like(maps)
    back = layer.decode(y, (x.shape[2], x.shape[3]))
    assert back.shape == x.shape
    torch.testing.assert_close((maps * y).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_derivatives_of_untied_filters(geometry: Geometry) -> None:
    layer, x = layer_of(geometry, reconstruct=True)

    def run(image: Tensor, weight: Tensor) -> Tensor:
        out = torch.func.functional_call(layer, {"weight": weight}, (image,))
        assert isinstance(out, Tensor)
        return out

    inputs = (x[:2].requires_grad_(), layer.weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(run, inputs)


def test_an_orthonormal_basis_gives_everything_back() -> None:
    layer, x = layer_of((1, 4, 2, 1, 0, (4, 4)), reconstruct=True)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(torch.randn(3, 3, 4, 4, dtype=F64))[0])
    assert float(layer(x)[:, -1].detach().abs().max()) < 1e-25


def test_filters_begin_with_unit_norm() -> None:
    torch.manual_seed(0)
    norms = LocallyConnected2d(3, 4, 5, input_size=9).weight.detach().norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(5, 5, 4))


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 0), (2, 1)])
def test_a_tile_has_its_own_part_of_the_weights(stride: int, padding: int) -> None:
    """Rows 1 to 3 and columns 0 to 2 of the output, from the rows and columns that they see, padded beforehand."""
    layer, x = layer_of((2, 3, 3, stride, padding, (9, 9)), reconstruct=True)
    tile = copy.deepcopy(layer)
    tile.padding = (0, 0)
    tile.weight = nn.Parameter(layer.weight[1:3, 0:2].detach().clone())
    framed = functional.pad(x, (padding,) * 4)
    seen = framed[:, :, stride : 2 * stride + 3, : stride + 3]
    torch.testing.assert_close(tile(seen), layer(x)[:, :, 1:3, 0:2], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rows", [0, 2])
def test_a_tile_without_positions_has_derivatives_of_zeros(rows: int) -> None:
    layer, _ = layer_of((2, 3, 3, 1, 0, (9, 9)), reconstruct=True)
    layer.weight = nn.Parameter(layer.weight[:0].detach().clone())
    x = torch.randn(4, 2, rows, 9, dtype=F64, requires_grad=True)
    out = layer(x)
    assert out.shape == (4, 4, 0, 7)
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape and not x.grad.any()
    assert layer.weight.grad is not None and layer.weight.grad.shape == (0, 7, 3, 18)


def test_an_input_of_another_size_is_refused() -> None:
    layer = LocallyConnected2d(2, 3, 3, input_size=8)
    with pytest.raises(ConfigError, match=r"3×3 for 6×6 positions and 2 channels .* \(1, 2, 9, 8\).* 7×6 positions"):
        layer(torch.zeros(1, 2, 9, 8))
    with pytest.raises(ConfigError, match="and 1 channels"):
        layer(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ConfigError, match=r"field of 9×9 does not fit into images of 8×8 with padding 0×0"):
        LocallyConnected2d(2, 3, 9, input_size=8)


def test_an_empty_batch_passes() -> None:
    layer = LocallyConnected2d(2, 3, 3, input_size=8, reconstruct=True)
    out = LocalContrastNorm2d(3)(L2Pool2d(3, stride=1, padding=1)(layer(torch.zeros(0, 2, 8, 8))))
    assert out.shape == (0, 4, 6, 6)
    out.sum().backward()
    assert layer.weight.grad is not None and not layer.weight.grad.any()


def test_positions_of_windows() -> None:
    assert [num_positions(n, kernel=3, stride=2, padding=1) for n in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    assert num_positions(2, kernel=3, stride=1, padding=0) == 0


@pytest.mark.parametrize(("maps", "kernel", "stride", "padding"), [(1, 3, 1, 1), (2, 2, 2, 0), (4, 1, 1, 0)])
def test_l2_pooling_is_the_root_of_a_sum_of_squares(maps: int, kernel: int, stride: int, padding: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 4, 6, 5, dtype=F64)
    out = L2Pool2d(kernel, stride=stride, padding=padding, maps=maps, eps=0.25)(x)
    framed = functional.pad(x, (padding,) * 4)
    assert out.shape[1] == 4 // maps
    for k in range(out.shape[1]):
        for p in range(out.shape[2]):
            for q in range(out.shape[3]):
                part = framed[:, k * maps : (k + 1) * maps, p * stride :, q * stride :][:, :, :kernel, :kernel]
                torch.testing.assert_close(out[:, k, p, q], (0.25 + (part**2).sum((1, 2, 3))).sqrt())


def test_l2_pooling_refuses_groups_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="pooling of 3 adjacent maps cannot take 4 maps"):
        L2Pool2d(2, maps=3)(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize("window", WINDOWS)
def test_windows_add_up_to_one_and_are_even(window: str) -> None:
    for length in (1, 3, 7):
        weights = WINDOWS[window](length, torch.zeros(1, dtype=F64))
        assert weights.shape == (length,)
        assert float(weights.sum()) == pytest.approx(1, abs=1e-15)
        torch.testing.assert_close(weights, weights.flip(0))


@pytest.mark.parametrize("window", WINDOWS)
def test_contrast_normalisation_is_the_papers(window: str) -> None:
    """v = x - Σ w x and y = v / max(floor, (Σ w v²)^½), with w over maps and window written out."""
    torch.manual_seed(2)
    x = torch.randn(2, 3, 6, 5, dtype=F64)
    line = WINDOWS[window](3, x)
    w = (line[:, None] * line[None] / 3).expand(1, 3, 3, 3)
    v = x - functional.conv2d(x, w, padding=1)
    deviation = functional.conv2d(v**2, w, padding=1).sqrt()
    floor = float(deviation.median())  # so that both branches of the maximum are taken
    expected = v / deviation.clamp_min(floor)
    torch.testing.assert_close(LocalContrastNorm2d(3, window=window, floor=floor)(x), expected)


def test_contrast_normalisation_takes_off_brightness_and_contrast() -> None:
    torch.manual_seed(3)
    x = torch.randn(1, 4, 9, 9, dtype=F64)
    norm = LocalContrastNorm2d(3, floor=1e-6)
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))  # beyond the border lie zeros
    torch.testing.assert_close(norm(7.0 * x + 3.0)[inner], norm(x)[inner], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [SubtractiveNorm2d, DivisiveNorm2d])
def test_a_padded_input_gives_the_same_in_the_middle(kind: type[SubtractiveNorm2d] | type[DivisiveNorm2d]) -> None:
    torch.manual_seed(4)
    x, norm = torch.randn(2, 3, 8, 7, dtype=F64), kind(5)
    tile = copy.deepcopy(norm)
    tile.padding = (0, 2)
    torch.testing.assert_close(tile(x[:, :, 1:7]), norm(x)[:, :, 3:5])
    tile.padding = (0, 0)
    torch.testing.assert_close(tile(functional.pad(x, (2,) * 4)), norm(x))


@pytest.mark.parametrize(
    "module", [L2Pool2d(3, stride=1, padding=1), L2Pool2d(2, maps=2), LocalContrastNorm2d(3), LocalContrastNorm2d(5)]
)
def test_derivatives_of_pooling_and_normalisation(module: nn.Module) -> None:
    torch.manual_seed(6)
    assert torch.autograd.gradcheck(module, (torch.randn(2, 2, 4, 5, dtype=F64, requires_grad=True),))


def test_windows_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="odd number of rows, got 4"):
        LocalContrastNorm2d(4)
    with pytest.raises(ConfigError, match="unknown window 'gausian'; did you mean 'gaussian'"):
        LocalContrastNorm2d(3, window="gausian")
    with pytest.raises(ConfigError, match="divisor must be above 0, got 0"):
        LocalContrastNorm2d(3, floor=0)


def test_channels_and_the_stop() -> None:
    x = torch.arange(12.0).view(1, 3, 2, 2).requires_grad_()
    assert torch.equal(Channels(1, 3)(x), x[:, 1:])
    stopped = StopGradient()(x)
    assert torch.equal(stopped, x) and not stopped.requires_grad


def test_modules_say_their_sizes() -> None:
    assert "positions=(6, 6)" in repr(LocallyConnected2d(2, 3, 3, input_size=8))
    assert "maps=2" in repr(L2Pool2d(2, maps=2))
    assert "gaussian" in repr(LocalContrastNorm2d(3))
    assert "1, 3" in repr(Channels(1, 3))
