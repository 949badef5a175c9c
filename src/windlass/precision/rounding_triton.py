"""Rounding on a GPU, with the bits of the CPU: one kernel in Triton.

The definition is `kernels/rounding/reference.py`: the same Philox blocks (`tl.philox` is Philox-4x32-10 under the key
(seed low, seed high)), the same 16 bits for a position, the same comparison.  A program makes the bits of `BLOCKS`
blocks of eight positions, and positions are cut at whole blocks, wherever `first` begins; so a block is made once.

Verified: in Triton's interpreter (TRITON_INTERPRET=1, Triton 3.9) on the CPU, all formats, roundings, storages, counts
and unaligned positions against the CPU's kernels, bit for bit; and that it compiles for GPUs of compute capability
9.0, to PTX without `.ftz` but for the floor of magnitudes, where that changes nothing, so that subnormal numbers live.
Not verified: a run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

from windlass.errors import ConfigError
from windlass.kernels.rounding.reference import Words
from windlass.plan.number import Fixed, NumberFormat, Rounding

triton: Any = None
tl: Any = None
_missing = ""
try:
    triton, tl = import_module("triton"), import_module("triton.language")
except ImportError as error:  # PyTorch's builds for CUDA bring it, those for CPUs do not
    _missing = str(error)

BLOCKS = 128
"""Philox blocks of a program, of eight positions each."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _jit(function: _Function) -> _Function:
    compiled: _Function = triton.jit(function) if triton else function
    return compiled


def _kernel(function: Callable[..., Any]) -> Any:
    """Compiled anew for types, and not for values that change with every call."""
    changing = ["size", "shift", "block", "w0", "w1", "w2", "w3"]
    return triton.jit(function, do_not_specialize=changing) if triton else function


@_jit
def _halves(
    block: tl.tensor, w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor, BLOCKS: tl.constexpr
) -> tl.tensor:
    """The 16-bit numbers of blocks, in order: lower halves first, word by word."""
    key = (tl.cast(w1, tl.uint64) << 32) | tl.cast(w0, tl.uint64)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    stream, step = tl.cast(w2, tl.uint32) + low * 0, tl.cast(w3, tl.uint32) + low * 0
    a, b, c, d = tl.philox(key, low, high, stream, step)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [block, upper bit of the word's place, lower bit]
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [8 * BLOCKS]).to(tl.int32)


@_jit
def _whole(x: tl.tensor, y: tl.tensor, u: tl.tensor, ROUNDING: tl.constexpr) -> tl.tensor:
    """`y`, which is `x` times a power of two, to whole numbers: its magnitude's floor, or one more."""
    size = tl.abs(y)
    down = tl.floor(size)
    share = size - down
    if ROUNDING == "stochastic":
        up = u.to(tl.float32) * (1.0 / 65536) + 1.0 / 131072 < share
    elif ROUNDING == "nearest":
        odd = down - 2.0 * tl.floor(down * 0.5) == 1.0
        up = (share > 0.5) | ((share == 0.5) & odd)
    else:
        up = (x < 0.0) & ((share > 0.0) | (size == 0.0))  # 0: the product was too small for float32
    bits = tl.where(up, down + 1.0, down).to(tl.int32, bitcast=True)
    sign = (x.to(tl.int32, bitcast=True) >> 31) << 31
    return (bits | sign).to(tl.float32, bitcast=True)


@_jit
def _float16(x: tl.tensor, u: tl.tensor, ROUNDING: tl.constexpr) -> tl.tensor:
    """The step at the magnitude of `x` follows from its exponent."""
    exponent = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 113 << 23)
    step = (exponent - (10 << 23)).to(tl.float32, bitcast=True)
    inverse = ((254 << 23) - exponent + (10 << 23)).to(tl.float32, bitcast=True)
    return _whole(x, x * inverse, u, ROUNDING) * step


@_jit
def _bfloat16(x: tl.tensor, u: tl.tensor, ROUNDING: tl.constexpr) -> tl.tensor:
    """The upper half of float32, to which a carry comes from the lower."""
    bits = x.to(tl.int32, bitcast=True)
    if ROUNDING == "stochastic":
        more = u ^ 0xFFFF
    elif ROUNDING == "nearest":
        more = ((bits >> 16) & 1) + 0x7FFF
    else:
        more = (bits >> 31) & 0xFFFF
    kept = tl.where(x != x, bits | 0x400000, bits + more) & -0x10000
    return kept.to(tl.float32, bitcast=True)


@_kernel
def _round(
    x_ptr: tl.tensor, out_ptr: tl.tensor, counts_ptr: tl.tensor, errors_ptr: tl.tensor, size: tl.tensor,
    shift: tl.tensor, block: tl.tensor, w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor, low: tl.tensor,
    high: tl.tensor, step: tl.tensor, inverse: tl.tensor, FORM: tl.constexpr, ROUNDING: tl.constexpr,
    STORED: tl.constexpr, COUNTED: tl.constexpr, BLOCKS: tl.constexpr,
) -> None:  # fmt: skip
    """Rounds the numbers whose positions are in the program's blocks; the first number stands at `shift` of a block."""
    program = tl.program_id(0).to(tl.int64)
    i = program * (8 * BLOCKS) + tl.arange(0, 8 * BLOCKS) - shift
    here = (i >= 0) & (i < size)
    x = tl.load(x_ptr + i, mask=here, other=0.0)
    inside = tl.where(x < low, low, x)
    inside = tl.where(inside > high, high, inside)
    if ROUNDING == "stochastic":
        u = _halves(program * BLOCKS + tl.arange(0, BLOCKS) + block, w0, w1, w2, w3, BLOCKS)
    else:
        u = tl.zeros([8 * BLOCKS], tl.int32)
    if FORM == "fixed":
        code = _whole(inside, inside * inverse, u, ROUNDING)
        value = tl.where(code == 0.0, 0.0, code) * step
    elif FORM == "float16":
        value = _float16(inside, u, ROUNDING)
    else:
        value = _bfloat16(inside, u, ROUNDING)
    if STORED == "codes":
        stored = tl.where(code != code, 0.0, code).to(tl.int32)
    elif STORED == "upper half":
        stored = value.to(tl.int32, bitcast=True) >> 16
    else:
        stored = value
    tl.store(out_ptr + i, stored.to(out_ptr.dtype.element_ty), mask=here)
    if COUNTED:
        nan = x != x
        error = tl.where(nan, 0.0, tl.abs(value - inside))
        place = counts_ptr + 3 * program
        tl.store(place, tl.sum(((x != inside) & (nan == 0)).to(tl.int32)))
        tl.store(place + 1, tl.sum(((x != 0.0) & (value == 0.0)).to(tl.int32)))
        tl.store(place + 2, tl.sum(nan.to(tl.int32)))
        tl.store(errors_ptr + program, tl.sum(error))


def round_dense(
    x: Tensor, out: Tensor, number: NumberFormat, rounding: Rounding, words: Words, first: int, *, counted: bool
) -> tuple[int, int, int, float]:
    """Rounds `x`, float32 and contiguous, to `out`, contiguous and of a type that stores the format; may be `x`.

    Element i takes the random bits of position `first` + i.  Gives what `Counts` holds; where nothing is counted,
    zeros, and nothing waits for the GPU.

    Raises:
        ConfigError: there is no Triton.
    """
    if triton is None:
        raise ConfigError(
            f"rounding on a GPU needs the package triton ({_missing}); install it, or move the tensor to the CPU"
        )
    shift, block = first % 8, first // 8
    programs = triton.cdiv(x.numel() + shift, 8 * BLOCKS)
    counts = torch.zeros(programs if counted else 1, 3, dtype=torch.int32, device=x.device)
    errors = torch.zeros(programs if counted else 1, dtype=torch.float32, device=x.device)
    whole = isinstance(number, Fixed)
    step = number.quantum if whole else 1.0
    stored = "upper half" if out.dtype == torch.bfloat16 else "number" if out.dtype.is_floating_point else "codes"
    target = out.view(torch.int16) if out.dtype == torch.bfloat16 else out
    if programs:
        _round[(programs,)](
            x, target, counts, errors, x.numel(), shift, block, *words, number.lowest, number.highest, step, 1.0 / step,
            FORM="fixed" if whole else number.storage, ROUNDING=rounding, STORED=stored,
            COUNTED=counted, BLOCKS=BLOCKS, enable_fp_fusion=False,
        )  # fmt: skip
    if not counted:
        return 0, 0, 0, 0.0
    saturated, zeroed, nan = counts.sum(0).tolist()
    return saturated, zeroed, nan, errors.double().sum().item()
