"""`Rounder`: rounding with everything prepared that does not depend on the tensor; `widen`: codes to numbers.

`quantize` and `dequantize` are made of them.  Code that rounds many tensors in one way takes them as they are: they
check nothing but what would crash, know no gradients, and do not tell autograd that `out` has changed.  A small tensor
takes one or two microseconds, most of which PyTorch needs to say where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from windlass.errors import ConfigError
from windlass.kernels.rounding import Counts, Pass, widen_codes
from windlass.kernels.rounding.reference import Words
from windlass.plan.number import FLOAT32, Fixed, NumberFormat, Rounding, check_rounding, parse_format
from windlass.precision.counters import Counters

STORAGES = {
    torch.float32: "float32", torch.float16: "half", torch.bfloat16: "half",
    torch.int8: "int8", torch.int16: "int16", torch.int32: "int32",
}  # fmt: skip
COUNTING: dict[bool | Literal["nan"], str] = {False: "nothing", True: "all", "nan": "nan"}

_CODES = (torch.int8, torch.int16, torch.int32)
_WIDEN = {dtype: widen_codes(STORAGES[dtype]) for dtype in _CODES}
PLAIN = frozenset({Tensor, Parameter})
_Counted = tuple[int, int, int, float]


class Rounder:
    """Rounds tensors to one format in one way.

    Args:
        fmt: the format, or how it is written.
        rounding: "stochastic", "nearest" or "floor".
        dtype: how results are stored; see `quantize`.
        counted: whether counters may be given; "nan": NaN alone is counted.

    >>> rounder = Rounder("<2,14>", "nearest", torch.int16, counted=False)
    >>> out = torch.empty(2, dtype=torch.int16)
    >>> rounder(torch.tensor([0.5, -9.0]), out, (0, 0, 0, 0))
    >>> out.tolist()
    [8192, -32768]
    """

    __slots__ = ("_direct", "_most", "_numbers", "_pass", "counted", "dtype", "number", "rounding")

    def __init__(
        self, fmt: NumberFormat | str, rounding: Rounding, dtype: torch.dtype, counted: bool | Literal["nan"]
    ) -> None:  # fmt: skip
        self.number, self.rounding = parse_format(fmt), check_rounding(rounding)
        self.dtype, self.counted = dtype, counted
        self._pass = None if self.number == FLOAT32 else _prepared(self.number, self.rounding, dtype, counted)
        self._direct: Callable[..., _Counted] | None = None if self._pass is None else self._pass.direct
        self._numbers: tuple[float, ...] = () if self._pass is None else self._pass.numbers
        self._most = 0 if self._pass is None else self._pass.most

    def __call__(self, x: Tensor, out: Tensor, words: Words, first: int = 0, counters: Counters | None = None) -> None:
        """`out` becomes `x` rounded.

        Args:
            x: float32, of any strides.
            out: of the rounder's dtype and the shape of `x`; may be `x`.
            words: the key of the random bits: `Key.words`.
            first: element i, in logical order, takes the random bits of position `first` + i.
            counters: grow by what is `counted`.

        Codes of NaN are 0.  Nothing is done where one of the tensors is a `FakeTensor`.
        """
        size = x.numel()
        if (
            size < self._most
            and type(x) in PLAIN
            and type(out) in PLAIN
            and out.dtype is self.dtype
            and x.dtype is torch.float32
            and out.numel() == size
            and x.is_contiguous()
            and out.is_contiguous()
            and x.is_cpu
            and out.is_cpu
            and self._direct is not None
        ):
            done: _Counted | None = self._direct(
                x.data_ptr(), out.data_ptr(), size, first, *words, *self._numbers, torch.get_num_threads()
            )
        else:
            done = self.counts(x, out, words, first)
        if counters is not None and done is not None:
            counters.add(done, size)

    def counts(self, x: Tensor, out: Tensor, words: Words, first: int = 0) -> _Counted | None:
        """The same for tensors of any kind and size, and what was counted; None of a `FakeTensor`."""
        if isinstance(x, FakeTensor) or isinstance(out, FakeTensor):
            return None
        x, out = x.detach().resolve_neg(), out.detach()
        _check(x, out, self.dtype)
        if x.is_cuda and self._pass is not None:
            with torch.cuda.device(x.device):
                return self._on_gpu(x, out, words, first)
        if self._pass is None:
            nan = int(x.isnan().sum()) if self.counted else 0
            out.copy_(x)
            return 0, 0, nan, 0.0
        planes = memory_order(x)
        if planes is not None and _alike(x, out, planes) and _apart_or_same(x, out):
            return self._dense(x, out, words, first, planes)
        result = torch.empty(x.shape, dtype=out.dtype)
        done = self._dense(x.contiguous(), result, words, first, (1, 0, 0))
        out.copy_(result)
        return done

    def _dense(self, x: Tensor, out: Tensor, words: Words, first: int, planes: tuple[int, int, int]) -> Counts:
        """Rounds a dense tensor to one of equal strides."""
        assert self._pass is not None
        threads, source, target = torch.get_num_threads(), x.data_ptr(), out.data_ptr()
        if planes[1]:
            return self._pass.planes(source, target, planes, first, words, threads)
        return self._pass.flat(source, target, x.numel(), first, words, threads)

    def _on_gpu(self, x: Tensor, out: Tensor, words: Words, first: int) -> _Counted:
        """Rounds by Triton."""
        from windlass.precision.rounding_triton import round_dense  # Triton takes long to import

        dense = out.is_contiguous() and _apart_or_same(x, out)
        result = out if dense else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        done = round_dense(x.contiguous(), result, self.number, self.rounding, words, first, counted=bool(self.counted))
        if not dense:
            out.copy_(result)
        return done


def _prepared(number: NumberFormat, rounding: Rounding, dtype: torch.dtype, counted: bool | Literal["nan"]) -> Pass:
    low, high, step, _ = numbers_of(number)
    return Pass(
        form="fixed" if isinstance(number, Fixed) else number.storage, rounding=rounding, storage=STORAGES[dtype],
        low=low, high=high, step=step, counted=COUNTING[counted],
    )  # fmt: skip


def numbers_of(number: NumberFormat) -> tuple[float, float, float, float]:
    """What kernels know of a format: the ends of its range, its step (1 in floating point) and the step's inverse."""
    step = float(number.quantum) if isinstance(number, Fixed) else 1.0
    return float(number.lowest), float(number.highest), step, 1.0 / step


def _check(x: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    """Refuses what a kernel would write elsewhere."""
    there = x.device == out.device and (x.is_cpu or x.is_cuda)
    if x.dtype != torch.float32 or out.dtype != dtype or x.shape != out.shape or not there:
        raise ConfigError(
            f"this rounder takes float32 on the CPU or a GPU to {dtype} of the same shape, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device} and {out.dtype} {tuple(out.shape)} on {out.device}"
        )


def _alike(x: Tensor, out: Tensor, planes: tuple[int, int, int]) -> bool:
    """Whether a tensor's elements lie as those of `x`, which is dense in the order `planes`."""
    return x.shape == out.shape and (x.stride() == out.stride() or memory_order(out) == planes)


def _apart_or_same(x: Tensor, out: Tensor) -> bool:
    """Whether a pass may read `x` and write `out` in turn."""
    if out.is_neg():
        return False
    if x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
        return True
    return x.data_ptr() == out.data_ptr() and x.dtype == out.dtype


def memory_order(x: Tensor) -> tuple[int, int, int] | None:
    """How the elements of a dense tensor lie: as `batch` matrices, logically [channels, pixels], in memory transposed.

    (1, 0, 0) means in logical order, as does one channel or pixel; None: neither, or not dense.
    """
    if x.is_contiguous():
        return 1, 0, 0
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    dims = [(size, stride) for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1]
    order = sorted(range(len(dims)), key=lambda i: -dims[i][1])
    expected = 1
    for i in reversed(order):
        if dims[i][1] != expected:
            return None
        expected *= dims[i][0]
    first = next(place for place, i in enumerate(order) if place != i)
    moved = order[first]
    if order[first:] != [*range(moved, len(dims)), *range(first, moved)]:
        return None
    sizes = [size for size, _ in dims]
    return math.prod(sizes[:first]), math.prod(sizes[first:moved]), math.prod(sizes[moved:])


def widen(codes: Tensor, number: NumberFormat, out: Tensor) -> Tensor:
    """`out` becomes the numbers that are stored in `codes`, exactly.

    Args:
        codes: as `quantize` stores numbers of the format.
        number: the format.
        out: float32, of the shape of `codes`.

    Nothing is done where one of the tensors is a `FakeTensor`.
    """
    kernel = _WIDEN.get(codes.dtype)
    size = codes.numel()
    if (
        type(codes) in PLAIN
        and type(out) in PLAIN
        and out.dtype is torch.float32
        and out.numel() == size
        and codes.is_contiguous()
        and out.is_contiguous()
        and codes.is_cpu
        and out.is_cpu
    ):
        if kernel is not None:
            kernel(codes.data_ptr(), out.data_ptr(), size, number.quantum, torch.get_num_threads())
        else:
            out.copy_(codes)
    elif not (isinstance(codes, FakeTensor) or isinstance(out, FakeTensor)):
        _widen_slowly(codes, number, out)
    return out


def _widen_slowly(codes: Tensor, number: NumberFormat, out: Tensor) -> None:
    """Other strides, and what PyTorch widens itself."""
    whole = isinstance(number, Fixed) and not codes.dtype.is_floating_point
    planes = memory_order(codes)
    if whole and codes.is_cpu and out.dtype == torch.float32 and planes is not None and _alike(codes, out, planes):
        kernel = _WIDEN[codes.dtype]
        kernel(codes.data_ptr(), out.data_ptr(), codes.numel(), number.quantum, torch.get_num_threads())
        return
    with torch.no_grad():
        out.copy_(codes)
        if whole:
            out.mul_(number.quantum)
