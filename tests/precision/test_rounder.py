from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from windlass.errors import ConfigError
from windlass.kernels.jit import DISABLED
from windlass.kernels.rounding.flat import LEAST_TASK
from windlass.plan.number import Rounding
from windlass.precision import Counters, Key, dequantize, fixed, parse_format, quantize
from windlass.precision.rounder import Rounder, memory_order, widen

KEY = Key(7, 3, 2)
NUMBER = fixed(16, 14)
WAYS: list[tuple[str, Rounding, torch.dtype]] = [
    ("<2,14>", "stochastic", torch.float32),
    ("<2,14>", "stochastic", torch.int16),
    ("<2,14>", "nearest", torch.int16),
    ("<4,4>", "floor", torch.int8),
    ("float16", "stochastic", torch.float16),
    ("bfloat16", "nearest", torch.bfloat16),
    ("float32", "stochastic", torch.float32),
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tensors() -> dict[str, Tensor]:
    """Small and large, of every kind of strides."""
    images = torch.randn(3, 5, 6, 7)
    return {
        "empty": torch.randn(0, 3),
        "scalar": torch.tensor(0.3),
        "odd": torch.randn(13, 7),
        "largest at once": torch.randn(LEAST_TASK),
        "two tasks": torch.randn(LEAST_TASK + 1),
        "large": torch.randn(100003),
        "parameter": torch.nn.Parameter(torch.randn(40)),
        "channels_last": images.to(memory_format=torch.channels_last),
        "one channel": torch.randn(3, 1, 6, 7).to(memory_format=torch.channels_last),
        "transposed": torch.randn(8, 9).t(),
        "every other": torch.randn(8, 30)[:, ::2],
        "expanded": torch.randn(5, 1).expand(5, 4),
        "lazily negative": torch._neg_view(torch.randn(50)).view(5, 10).t(),
    }


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(("name", "rounding", "dtype"), WAYS)
def test_a_rounder_does_what_quantize_does(name: str, rounding: Rounding, dtype: torch.dtype, counted: bool) -> None:
    rounder = Rounder(name, rounding, dtype, counted)
    for kind, x in tensors().items():
        for first in (0, 13):
            sums, expected_sums = (Counters(), Counters()) if counted else (None, None)
            with torch.no_grad():
                expected = quantize(x, name, rounding, KEY, dtype=dtype, counters=expected_sums, first=first)
                out = torch.empty_like(expected)
                rounder(x, out, KEY.words, first, sums)
            assert torch.equal(out, expected), kind
            assert sums == expected_sums, kind


def test_in_place_and_to_other_strides() -> None:
    rounder = Rounder(NUMBER, "stochastic", torch.float32, counted=False)
    for x in tensors().values():
        x = x.detach().clone(memory_format=torch.preserve_format)
        expected = quantize(x, NUMBER, generator=KEY)
        rounder(x, x, KEY.words)
        assert torch.equal(x, expected)
    images = torch.randn(2, 3, 4, 5)
    out = torch.empty(2, 4, 5, 3).permute(0, 3, 1, 2)
    rounder(images, out, KEY.words)
    assert torch.equal(out, quantize(images, NUMBER, generator=KEY))


def test_codes_of_nan_are_zero_and_counted() -> None:
    x = torch.tensor([0.5, float("nan"), float("inf"), 2.0**-20])
    for size in (4, 3 * LEAST_TASK):
        big = x.repeat(size // 4)
        out = torch.full((size,), 7, dtype=torch.int16)
        Rounder(NUMBER, "nearest", torch.int16, counted=False)(big, out, KEY.words)
        assert out[:4].tolist() == [8192, 0, 32767, 0] and torch.equal(out, out[:4].repeat(size // 4))
        sums = Counters()
        Rounder(NUMBER, "nearest", torch.int16, counted=True)(big, out, KEY.words, 0, sums)
        found = sums.elements, sums.saturated, sums.zeroed, sums.not_a_number
        assert found == (size, size // 4, size // 4, size // 4)


@pytest.mark.skipif(DISABLED, reason="NumPy leaves the register alone")
@pytest.mark.parametrize("flush", [True, False])
def test_subnormal_numbers_live_and_the_register_is_as_before(flush: bool) -> None:
    """Of x = 2^-127 the half is kept: the count is binomial(n, 1/2)."""
    rounder = Rounder(fixed(8, 126), "stochastic", torch.int8, counted=False)
    assert torch.set_flush_denormal(flush)
    try:
        x = torch.full((4000,), 2**22, dtype=torch.int32).view(torch.float32)
        out = torch.empty(4000, dtype=torch.int8)
        rounder(x, out, KEY.words)
        small = torch.tensor([2.0**-100]) * torch.tensor([2.0**-40])
        assert (small.item() == 0.0) is flush
    finally:
        torch.set_flush_denormal(False)
    assert abs(int(out.sum()) - 2000) < 5 * 4000**0.5 / 2


def test_threads_share_a_rounder() -> None:
    rounder = Rounder(NUMBER, "stochastic", torch.int16, counted=True)
    inputs = [torch.randn(3001 + i) for i in range(4)]
    expected = [quantize(x, NUMBER, generator=Key(i), dtype=torch.int16) for i, x in enumerate(inputs)]
    wrong: list[int] = []

    def work(i: int) -> None:
        out = torch.empty(inputs[i].shape, dtype=torch.int16)
        for _ in range(200):
            rounder(inputs[i], out.zero_(), Key(i).words)
            if not torch.equal(out, expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("kind", list(tensors()))
@pytest.mark.parametrize("name", ["fixed(8,4)", "<2,14>", "fixed(20,12)", "float16"])
def test_widen_gives_the_numbers(name: str, kind: str) -> None:
    number = parse_format(name)
    with torch.no_grad():
        x = tensors()[kind]
        exact = quantize(x, number, generator=KEY)
        codes = quantize(x, number, generator=KEY, dtype=getattr(torch, number.storage))
    out = torch.empty_like(codes, dtype=torch.float32)
    assert widen(codes, number, out) is out
    assert torch.equal(out, exact) and torch.equal(dequantize(codes, number), exact)
    other = torch.empty(x.shape[::-1]).permute(tuple(reversed(range(x.dim()))))
    assert torch.equal(widen(codes, number, other), exact)


def test_fake_tensors_are_left_alone() -> None:
    rounder = Rounder(NUMBER, "stochastic", torch.int16, counted=True)
    sums = Counters()
    with FakeTensorMode():
        x, codes = torch.empty(3, 4), torch.empty(3, 4, dtype=torch.int16)
        rounder(x, codes, KEY.words, 0, sums)
        assert widen(codes, NUMBER, x) is x
    assert sums == Counters()


def test_what_would_crash_is_refused() -> None:
    rounder = Rounder(NUMBER, "nearest", torch.int16, counted=False)
    x, out = torch.zeros(4), torch.zeros(4, dtype=torch.int16)
    for a, b in [(x.double(), out), (x, out.int()), (x, out[:3]), (x.to("meta"), out), (x, out.to("meta"))]:
        with pytest.raises(
            ConfigError, match=r"takes float32 on the CPU or a GPU to torch.int16 of the same shape, got"
        ):
            rounder(a, b, KEY.words)


@pytest.mark.parametrize("kind", list(tensors()))
def test_memory_order_says_how_elements_lie(kind: str) -> None:
    """Against the addresses themselves."""
    x = tensors()[kind].detach().resolve_neg()
    order = memory_order(x)
    if order is None:
        assert kind in ("every other", "expanded")
        return
    memory = x.as_strided((x.numel(),), (1,))
    if order[1] == 0:
        assert torch.equal(memory, x.reshape(-1))
    else:
        batch, channels, pixels = order
        assert torch.equal(memory, x.reshape(batch, channels, pixels).transpose(1, 2).reshape(-1))
