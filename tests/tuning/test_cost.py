"""The cost model: operations equal to closed forms, and laws that any price must keep."""

import math
from dataclasses import replace

import pytest

from windlass.plan.convolution import CONV_ALGORITHMS, DIRECTIONS, ConvShape, Direction
from windlass.tuning.cost import (
    EFFICIENCIES,
    Machine,
    conv_work,
    num_tiles,
    predicted_s,
    tensor_bytes,
    torch_efficiency,
    useful_share,
)

MACHINE = Machine(peak_flops=5e11, bytes_per_s=4e10, threads=2)


def conv(**sizes: object) -> ConvShape:
    given: dict[str, object] = {
        "batch": 8, "in_channels": 64, "height": 56, "width": 56, "out_channels": 64, "kernel": (3, 3),
        "padding": (1, 1, 1, 1), **sizes,
    }  # fmt: skip
    return ConvShape(**given)  # type: ignore[arg-type]


SHAPES = [
    conv(),
    conv(batch=1, in_channels=3, height=224, width=224),
    conv(in_channels=512, out_channels=256, height=14, width=14),
    conv(kernel=(5, 5), padding=(2, 2, 2, 2)),
    conv(kernel=(7, 7), padding=(3, 3, 3, 3), stride=(2, 2), in_channels=3),
    conv(kernel=(31, 31), padding=(15, 15, 15, 15), groups=64),
    conv(kernel=(15, 15), padding=(7, 7, 7, 7)),
    conv(groups=4),
    conv(kernel=(1, 1), padding=(0, 0, 0, 0)),
    conv(kernel=(3, 1), padding=(0, 0, 0, 0), dilation=(2, 1)),
]


def able(shape: ConvShape) -> list[str]:
    return [name for name, algorithm in CONV_ALGORITHMS.items() if algorithm.refusal(shape) is None]


CASES = [(name, direction, shape) for shape in SHAPES for name in able(shape) for direction in DIRECTIONS]


@pytest.mark.parametrize("tile", [2, 4, 6])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_winograd_multiplies_as_its_formula_says(tile: int, direction: Direction) -> None:
    shape = conv(batch=3, in_channels=20, out_channels=48, height=30, width=18, padding=(0, 0, 0, 0))
    alpha = tile + 2
    # The output, 28 × 16, is cut into tiles; for the gradient of the input it is the input.
    height, width = (30, 18) if direction == "input" else (28, 16)
    tiles = 3 * math.ceil(height / tile) * math.ceil(width / tile)
    assert num_tiles(shape, direction, outputs=tile) == tiles
    assert conv_work(f"winograd-{tile}x{tile}", direction, shape).product_flops == 2 * alpha**2 * tiles * 20 * 48


def test_winograd_saves_four_times_on_whole_tiles() -> None:
    """36 multiplications in place of 16 · 9 (Lavin and Gray 2016)."""
    shape = conv(padding=(0, 0, 0, 0), height=58, width=58)
    direct, winograd = (conv_work(name, "forward", shape).product_flops for name in ("direct", "winograd-4x4"))
    assert direct == 2 * shape.macs
    assert direct / winograd == 4.0


@pytest.mark.parametrize("size", [16, 32, 64])
def test_fft_multiplies_half_a_spectrum_of_complex_numbers(size: int) -> None:
    shape = conv(batch=2, in_channels=8, out_channels=6, height=40, width=40, kernel=(5, 5), padding=(2, 2, 2, 2))
    tiles = 2 * math.ceil(40 / (size - 4)) ** 2
    work = conv_work(f"fft-{size}", "forward", shape)
    assert work.product_flops == 8 * (size**2 / 2) * tiles * 8 * 6
    # Channels are transformed by vectors of 16; of a filter's columns 5 of `size` are needed.
    transforms = tiles * (16 + 16) + 8 * 6 * (1 + 5 / size) / 2
    assert work.transform_flops == pytest.approx(2.5 * size**2 * math.log2(size**2) * transforms)


def test_groups_divide_the_products_not_the_transforms_of_images() -> None:
    whole, parts = (conv(groups=groups) for groups in (1, 4))
    for name in ("direct", "winograd-4x4"):
        assert conv_work(name, "forward", whole).product_flops == 4 * conv_work(name, "forward", parts).product_flops
    assert conv_work("winograd-4x4", "forward", parts).transform_flops > 0


def test_only_taps_inside_the_image_count() -> None:
    """Against counting them one by one."""
    shape = conv(batch=1, height=5, width=7, kernel=(3, 3), padding=(2, 1, 0, 3), stride=(2, 1), dilation=(1, 2))
    inside = [
        0 <= p * 2 + r - 2 < 5 and 0 <= q + 2 * s < 7
        for p in range(shape.out_height)
        for q in range(shape.out_width)
        for r in range(3)
        for s in range(3)
    ]
    assert useful_share(shape) == pytest.approx(sum(inside) / len(inside))
    assert useful_share(conv(padding=(0, 0, 0, 0))) == 1.0


def test_bytes_are_those_of_the_tensors_at_least() -> None:
    shape = conv(batch=2, in_channels=3, out_channels=5, height=6, width=7, padding=(0, 0, 0, 0))
    assert tensor_bytes(shape) == 4 * (2 * 3 * 6 * 7 + 2 * 5 * 4 * 5 + 5 * 3 * 9)
    for name, direction, each in CASES:
        assert conv_work(name, direction, each).num_bytes >= tensor_bytes(each)


@pytest.mark.parametrize(("name", "direction", "shape"), CASES)
def test_more_work_never_takes_less_time(name: str, direction: Direction, shape: ConvShape) -> None:
    price = predicted_s(name, direction, shape, machine=MACHINE)
    assert 0 < price < math.inf
    larger = [replace(shape, batch=2 * shape.batch), replace(shape, height=shape.height + 64)]
    if shape.groups == 1:
        # 16 channels more fill whole vectors, as 64 do; fewer may fill lanes that were empty.
        larger += [replace(shape, out_channels=shape.out_channels + 64)]
    for more in larger:
        assert predicted_s(name, direction, more, machine=MACHINE) >= price
    assert predicted_s(name, direction, shape, machine=replace(MACHINE, peak_flops=1e12)) <= price
    assert predicted_s(name, direction, shape, machine=replace(MACHINE, bytes_per_s=1e11)) <= price


@pytest.mark.parametrize(("name", "direction", "shape"), CASES)
def test_nothing_is_faster_than_the_roofline(name: str, direction: Direction, shape: ConvShape) -> None:
    work = conv_work(name, direction, shape)
    roof = max((work.product_flops + work.transform_flops) / MACHINE.peak_flops, work.num_bytes / MACHINE.bytes_per_s)
    assert predicted_s(name, direction, shape, machine=MACHINE) > roof


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pytorch_s_share_of_peak_is_a_share(direction: Direction, shape: ConvShape) -> None:
    for layout in ("contiguous", "channels_last"):
        assert 0 < torch_efficiency(direction, shape, layout=layout) <= 1
    last, plain = (
        predicted_s("torch", direction, shape, machine=MACHINE, layout=layout)
        for layout in ("channels_last", "contiguous")
    )
    if max(shape.kernel) < 15:  # for wider filters oneDNN's channels_last gradients of weights are its slowest
        assert last <= plain, "oneDNN copies NCHW images into another order"


def test_every_family_of_windlass_has_its_efficiency() -> None:
    assert {algorithm.family for algorithm in CONV_ALGORITHMS.values()} == {*EFFICIENCIES, "torch"}
    for rates in EFFICIENCIES.values():
        assert 0 < rates.product <= 1 and 0 < rates.transform <= 1 and rates.call_s > 0
        assert 0 <= rates.depthwise <= 1
