from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from windlass.errors import ConfigError
from windlass.kernels.rounding.reference import halves
from windlass.precision import Counters, Key, Quantizer, dequantize, fixed, parse_format, quantize

INF, NAN = math.inf, math.nan
NUMBER = fixed(16, 12)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, memory formats aside."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def test_ties_go_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.500001])
    assert quantize(x, fixed(8, 0), "nearest").tolist() == [-2, -2, 0, 0, 2, 2, 3]
    assert quantize(x, fixed(8, 0), "floor").tolist() == [-3, -2, -1, 0, 1, 2, 2]
    assert quantize(torch.tensor([1.0 + 2**-11, 1.0 + 3 * 2**-11]), "float16", "nearest").tolist() == [
        1.0,
        1.0 + 2**-9,
    ]


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "floor"])
def test_both_ends_saturate_and_nan_stays(rounding: str) -> None:
    x = torch.tensor([8.0, 7.9999, -8.1, INF, -INF, NAN])
    done = quantize(x, "<4,12>", rounding)  # type: ignore[arg-type]
    top = 8 - 2**-12
    assert done[:5].tolist() == [top, done[1].item(), -8.0, top, -8.0]
    assert done[5].isnan()
    for name in ("float16", "bfloat16"):
        number = parse_format(name)
        wide = quantize(torch.tensor([3.4e38, -3.4e38, INF, -INF, NAN]), name, rounding)  # type: ignore[arg-type]
        assert wide[:4].tolist() == [number.highest, number.lowest] * 2
        assert wide[4].isnan()


def test_numbers_of_the_format_never_change() -> None:
    """All codes of 16 bits, and all finite numbers of the short floats, under many keys."""
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for step in range(8):
        exact = dequantize(codes, NUMBER)
        assert torch.equal(quantize(exact, NUMBER, generator=Key(1, 0, step)), exact)
        for dtype, name in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16")):
            short = codes.view(dtype).float()
            short = short[short.isfinite()]
            assert same(quantize(short, name, generator=Key(1, 0, step)), short)


@pytest.mark.parametrize("name", ["<4,12>", "fixed(16,3)", "float16", "bfloat16"])
@pytest.mark.parametrize("share", [0.03, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_expectation_is_kept(name: str, share: float, sign: float) -> None:
    """The count rounded away from zero is binomial(n, share); five deviations, and 2^-17 for 16 random bits."""
    number, n, keys = parse_format(name), 4096, 50
    step = number.quantum if name.startswith(("<", "fixed")) else {"float16": 2.0**-10, "bfloat16": 2.0**-7}[name]
    low = 1.0
    x = torch.full((n,), sign * (low + share * step))
    actual = (x[0].abs().double().item() - low) / step  # as float32 has it
    up = 0
    for step_number in range(keys):
        done = quantize(x, number, generator=Key(5, 2, step_number)).abs()
        assert set(done.tolist()) <= {low, low + step}
        up += int((done > low).sum())
    bound = 5 * math.sqrt(n * keys * actual * (1 - actual)) + n * keys * 2.0**-17
    assert abs(up - n * keys * actual) <= bound


def test_the_definition_of_up() -> None:
    """(u + 1/2) / 2^16 < share behind the point, with the documented random bits."""
    x = torch.linspace(-3, 3, 1000)
    u = torch.from_numpy(halves(Key(9, 8, 7).words, 0, 1000).astype("int64"))
    y = x.double() * 16
    away = (u + 0.5) / 65536 < (y - y.trunc()).abs()
    expected = ((y.trunc() + away * y.sign()) / 16).float() + 0.0
    assert same(quantize(x, fixed(8, 4), generator=Key(9, 8, 7)), expected)


@pytest.mark.parametrize("size", [1, 100, 70001])
def test_threads_do_not_change_bits(size: int) -> None:
    x = torch.randn(size)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(quantize(x, NUMBER, generator=Key(3)))
    assert same(found[0], found[1]) and same(found[0], found[2])


@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (3, 16, 9, 4), (5, 129), (2, 3, 211, 97), (3, 33001)])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_parts_have_the_bits_of_the_whole(shape: tuple[int, ...], rounding: str) -> None:
    """Each part with the number of elements before it, whatever the memory format and the number of threads."""
    x = torch.randn(shape) * 4
    sample = x[0].numel()
    formats = [torch.contiguous_format, *([torch.channels_last] if x.dim() == 4 else [])]
    for place in formats:
        y = x.contiguous(memory_format=place)
        whole = quantize(y, NUMBER, rounding, Key(4, 1, 9))  # type: ignore[arg-type]
        for part in range(1, shape[0]):
            torch.set_num_threads(part % 2 + 1)
            low = quantize(y[:part], NUMBER, rounding, Key(4, 1, 9))  # type: ignore[arg-type]
            high = quantize(y[part:], NUMBER, rounding, Key(4, 1, 9), first=part * sample)  # type: ignore[arg-type]
            assert same(torch.cat([low, high]), whole)
    moved = quantize(x, NUMBER, rounding, Key(4, 1, 9), first=1)  # type: ignore[arg-type]
    assert same(moved, whole) == (rounding == "nearest")


@pytest.mark.parametrize("first", [-1, 2**62, 1.0, True])
def test_no_such_position(first: int) -> None:
    with pytest.raises(ConfigError, match=r"first is the position of an element, .* got"):
        quantize(torch.zeros(2), NUMBER, first=first)


@pytest.mark.parametrize("name", ["<4,12>", "bfloat16"])
def test_memory_formats_do_not_change_bits(name: str) -> None:
    x = torch.randn(2, 19, 13, 7)
    expected = quantize(x, name, generator=Key(3))
    lasts = x.to(memory_format=torch.channels_last)
    done = quantize(lasts, name, generator=Key(3))
    assert done.is_contiguous(memory_format=torch.channels_last) and same(done, expected)
    volume = torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)
    assert quantize(volume, name).stride() == volume.stride()
    assert same(quantize(volume, name, generator=Key(3)), quantize(volume.contiguous(), name, generator=Key(3)))
    views = [x.permute(3, 1, 0, 2), x[:, 3:11], x[..., ::2], x[0].t() if x.dim() == 3 else x[0, 0].t(), x[:, :1]]
    views += [torch.randn(5, 1, 1).expand(5, 4, 3), x.permute(1, 0, 2, 3), x.permute(0, 3, 2, 1), torch.tensor(0.3)]
    for view in views:
        assert same(quantize(view, name, generator=Key(4)), quantize(view.contiguous(), name, generator=Key(4)))


def test_in_place_views_and_other_strides() -> None:
    x = torch.randn(6, 40)
    before, part = x.clone(), x[:, 3:30]
    expected = quantize(part.contiguous(), NUMBER, generator=Key(2))
    assert quantize(part, NUMBER, generator=Key(2), out=part) is part
    assert same(part, expected)
    assert torch.equal(x[:, :3], before[:, :3]) and torch.equal(x[:, 30:], before[:, 30:])
    line = torch.randn(1000)
    shifted = quantize(line[:-1].clone(), NUMBER, generator=Key(2))
    quantize(line[:-1], NUMBER, generator=Key(2), out=line[1:])  # overlaps
    assert same(line[1:], shifted)
    images = torch.randn(2, 5, 6, 7)
    target = torch.empty_like(images).to(memory_format=torch.channels_last)
    quantize(images, NUMBER, generator=Key(2), out=target)
    assert target.is_contiguous(memory_format=torch.channels_last)
    assert same(target, quantize(images, NUMBER, generator=Key(2)))


@pytest.mark.parametrize(
    "number", [fixed(8, 4), fixed(16, 12), fixed(20, 12), fixed(16, 20), fixed(5, -3), fixed(1, 0)]
)
def test_codes_are_the_numbers(number: object) -> None:
    number = parse_format(number)  # type: ignore[arg-type]
    x = torch.randn(3000) * (number.highest or number.quantum) / 2
    for bits in (8, 16, 32):
        if bits < number.wl:  # type: ignore[union-attr]
            continue
        dtype = getattr(torch, f"int{bits}")
        codes = quantize(x, number, generator=Key(1), dtype=dtype)
        assert codes.dtype == dtype
        assert same(dequantize(codes, number), quantize(x, number, generator=Key(1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_are_stored_as_pytorchs(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    x = torch.randn(5000) * torch.tensor(2.0) ** torch.randint(-30, 15, (5000,))
    short = quantize(x, name, "nearest", dtype=dtype)
    assert torch.equal(short, x.to(dtype))
    assert same(quantize(x, name, "nearest"), x.to(dtype).float())
    assert same(dequantize(quantize(x, name, generator=Key(1), dtype=dtype), name), quantize(x, name, generator=Key(1)))


def test_a_zero_of_fixed_point_is_positive() -> None:
    x = torch.tensor([-0.0, -0.01, 0.0])
    assert not quantize(x, fixed(8, 4), "nearest").signbit().any()
    assert quantize(x, "float16", "nearest").signbit().tolist() == [True, True, False]


def test_manual_seed_repeats_and_calls_differ() -> None:
    x = torch.randn(1000)
    torch.manual_seed(7)
    first, second = quantize(x, NUMBER), quantize(x, NUMBER)
    torch.manual_seed(7)
    assert same(first, quantize(x, NUMBER)) and not same(first, second)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert same(quantize(x, NUMBER, generator=generators[0]), quantize(x, NUMBER, generator=generators[1]))
    keys = [Key(1), Key(2), Key(1 << 40), Key(1, 1), Key(1, 0, 1)]
    found = [quantize(x, NUMBER, generator=key) for key in keys]
    assert all(not same(a, b) for i, a in enumerate(found) for b in found[:i])
    assert same(found[0], quantize(x, NUMBER, generator=Key(1)))


def test_counters_say_what_happened() -> None:
    x = torch.tensor([9.0, -INF, 2**-14, -(2**-14), 0.0, -0.0, NAN, 1.0, 1.0 + 2**-14])
    counters = Counters()
    quantize(x, NUMBER, "nearest", counters=counters)
    assert (counters.elements, counters.saturated, counters.zeroed, counters.not_a_number) == (9, 2, 2, 1)
    assert counters.error_sum == 3 * 2**-14 and counters.mean_error == 3 * 2**-14 / 9
    quantize(x, NUMBER, "nearest", counters=counters, dtype=torch.int16)
    assert (counters.elements, counters.not_a_number) == (18, 2)
    assert Counters().mean_error == 0.0


def test_integers_have_no_nan() -> None:
    x = torch.tensor([1.0, NAN])
    with pytest.raises(ConfigError, match=r"1 of 2 numbers are NaN, for which fixed\(16,12\) has no code"):
        quantize(x, NUMBER, dtype=torch.int16)
    assert quantize(x, NUMBER, dtype=torch.int16, counters=Counters()).tolist() == [4096, 0]


def test_empty_and_single() -> None:
    counters = Counters()
    assert quantize(torch.empty(0, 3), NUMBER, counters=counters).shape == (0, 3)
    assert counters.elements == 0
    assert quantize(torch.tensor(0.3), fixed(8, 4), "nearest").shape == ()


def test_float32_is_left_alone() -> None:
    x = torch.tensor([0.1, INF, -0.0])
    assert same(quantize(x, "float32"), x)


def test_gradients_go_through() -> None:
    x = torch.tensor([0.3, 20.0], requires_grad=True)
    (quantize(x, NUMBER) * torch.tensor([2.0, 3.0])).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and x.grad.tolist() == [2.0, 3.0]
    assert torch.equal(
        quantize(x, NUMBER, generator=Key(1), first=3), quantize(x.detach(), NUMBER, generator=Key(1), first=3)
    )
    with torch.no_grad():
        assert not quantize(x, NUMBER).requires_grad
        quantize(x, fixed(8, 4), "nearest", out=x)
    assert x.tolist() == [0.3125, 7.9375]
    with pytest.raises(ConfigError, match="out takes part in a gradient"):
        quantize(x.detach(), NUMBER, out=x)


def test_what_a_graph_has_saved_is_not_changed_unnoticed() -> None:
    x = torch.randn(3, requires_grad=True)
    y = x * 1.0
    z = (y * y).sum()
    quantize(y.detach(), NUMBER, out=y.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(2, dtype=torch.float64), "got torch.float64 on cpu"),
        (torch.zeros(2, dtype=torch.complex64), "got torch.complex64 on cpu"),
        (torch.zeros(2, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(2, device="meta"), "got torch.float32 on meta"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        ([0.1], "needs a tensor, got list"),
    ],
)
def test_other_tensors_are_refused(x: Tensor, got: str) -> None:
    with pytest.raises(ConfigError, match=got):
        quantize(x, NUMBER)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2)
    with pytest.raises(ConfigError, match=r"fixed\(16,12\) is stored as float32, int16, int32; got torch.int8"):
        quantize(x, NUMBER, dtype=torch.int8)
    with pytest.raises(ConfigError, match=r"float16 is stored as float32, float16; got torch\.bfloat16"):
        quantize(x, "float16", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"out must have the shape \(2,\)"):
        quantize(x, NUMBER, out=torch.zeros(3))
    with pytest.raises(ConfigError, match=r"dtype is torch.int32, but out has torch.int16"):
        quantize(x, NUMBER, dtype=torch.int32, out=torch.zeros(2, dtype=torch.int16))
    with pytest.raises(ConfigError, match=r"generator is a torch.Generator or a windlass.precision.Key, got int"):
        quantize(x, NUMBER, generator=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"stored as float32, int16, int32; got a tensor of torch.int64"):
        dequantize(torch.zeros(2, dtype=torch.int64), NUMBER)


def test_quantizer_rounds_both_ways() -> None:
    module = Quantizer("<4,4>", "<4,2>", forward_rounding="nearest", backward_rounding="nearest")
    x = torch.tensor([0.3, 9.0], requires_grad=True)
    module.forward_counters, module.backward_counters = Counters(), Counters()
    y = module(x)
    y.backward(torch.tensor([0.3, 0.8]))
    assert y.tolist() == [0.3125, 7.9375] and x.grad is not None and x.grad.tolist() == [0.25, 0.75]
    assert (module.forward_counters.saturated, module.backward_counters.elements) == (1, 2)
    assert "forward=fixed(8,4) nearest, backward=fixed(6,2) nearest" in repr(module)


def test_quantizer_can_stop_gradients_of_saturated_numbers() -> None:
    x = torch.tensor([0.3, 9.0, -9.0, 7.9375, NAN], requires_grad=True)
    Quantizer("<4,4>", clamping_grad_zero=True)(x).backward(torch.ones(5))
    assert x.grad is not None and x.grad.tolist() == [1.0, 0.0, 0.0, 1.0, 1.0]
    x.grad = None
    Quantizer("<4,4>")(x).backward(torch.ones(5))
    assert x.grad is not None and x.grad.tolist() == [1.0] * 5


def test_quantizer_without_formats_is_the_identity() -> None:
    x = torch.randn(5, requires_grad=True)
    y = Quantizer()(x)
    y.sum().backward()
    assert torch.equal(y, x) and y is not x
    with torch.no_grad():
        assert torch.equal(Quantizer("bfloat16", forward_rounding="nearest")(x), x.bfloat16().float())


def test_windlass_brings_no_pytorch_before_precision_is_asked_for() -> None:
    program = "import sys, windlass; assert 'torch' not in sys.modules; windlass.precision.fixed(8, 4)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
