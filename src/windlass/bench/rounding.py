"""Rounding beside QPyTorch, torchao and a copy, interleaved in one process.

A copy of float32 to float32 moves as many bytes as rounding in float32 does: one number read and one written.  Which
way is fastest on a machine depends on the library, so there are two copies, PyTorch's and NumPy's, and the better one
is the measure.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch

from windlass.bench.allreduce import quartiles
from windlass.errors import ConfigError
from windlass.precision import Counters, fixed, quantize

Action = Callable[[], object]

FORMAT = fixed(16, 12)
COPIES = ("copy, PyTorch", "copy, NumPy")
QPYTORCH = "QPyTorch, fixed_point_quantize"
TORCHAO = "torchao, bfloat16 stochastic"
OURS = "float32 → float32, stochastic"
SLOW = (QPYTORCH, TORCHAO)
"""What takes so long that it runs in every third turn only."""


@dataclass(frozen=True, kw_only=True)
class RoundingRow:
    """One way to round, or a copy.

    Attributes:
        by: what.
        seconds, low_s, high_s: of one pass: median and quartiles over the turns.
        elements_per_s: of the median.
        bytes_per_s: of the median; bytes are the number read and the one written.
        of_copy: share of the bytes per second of the faster copy.
        times_qpytorch: how many times as many elements per second as QPyTorch; None: it is not there.
    """

    by: str
    seconds: float
    low_s: float
    high_s: float
    elements_per_s: float
    bytes_per_s: float
    of_copy: float
    times_qpytorch: float | None


def bench_rounding(
    elements: int, *, turns: int, on_turn: Callable[[str], None]
) -> tuple[list[RoundingRow], list[str]]:  # fmt: skip
    """Measures on PyTorch's threads, in turns, each beginning with another way.

    Returns:
        The rows, and what is missing and why.
    """
    actions, num_bytes, notes = _actions(elements)
    samples: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    for turn in range(-1, turns):  # the first turn compiles and warms up
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name in SLOW and turn % 3 and turn > 0:
                continue
            on_turn(name)
            started = time.perf_counter()
            actions[name]()
            if turn >= 0:
                samples[name].append(time.perf_counter() - started)
    return _rows(samples, num_bytes, elements), notes


def _rows(samples: dict[str, list[float]], num_bytes: dict[str, int], elements: int) -> list[RoundingRow]:
    medians = {name: statistics.median(values) for name, values in samples.items()}
    copy = max(num_bytes[name] * elements / medians[name] for name in COPIES)
    rows = []
    for name, values in samples.items():
        low, middle, high = quartiles(values)
        speed = num_bytes[name] * elements / middle
        rows.append(
            RoundingRow(
                by=name,
                seconds=middle,
                low_s=low,
                high_s=high,
                elements_per_s=elements / middle,
                bytes_per_s=speed,
                of_copy=speed / copy,
                times_qpytorch=medians[QPYTORCH] / middle if QPYTORCH in medians else None,
            )
        )
    return rows


def _actions(elements: int) -> tuple[dict[str, Action], dict[str, int], list[str]]:
    """What is measured, the bytes it moves for an element, and what is missing."""
    x = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    out = torch.zeros_like(x)
    codes, short = torch.zeros(elements, dtype=torch.int16), torch.zeros(elements, dtype=torch.bfloat16)
    tiny = torch.zeros(elements, dtype=torch.int8)
    lowest, highest = x.numpy(), out.numpy()
    found: dict[str, tuple[Action, int]] = {
        COPIES[0]: (lambda: out.copy_(x), 8),
        COPIES[1]: (lambda: highest.__setitem__(slice(None), lowest), 8),
        OURS: (lambda: quantize(x, FORMAT, out=out), 8),
        "float32 → float32, nearest": (lambda: quantize(x, FORMAT, "nearest", out=out), 8),
        "float32 in place, stochastic": (lambda: quantize(out, FORMAT, out=out), 8),
        "float32 → int16, stochastic": (lambda: quantize(x, FORMAT, out=codes), 6),
        "float32 → int8, stochastic": (lambda: quantize(x, fixed(8, 4), out=tiny), 5),
        "float32 → int16, stochastic, counted": (lambda: quantize(x, FORMAT, out=codes, counters=Counters()), 6),
        "float32 → bfloat16, stochastic": (lambda: quantize(x, "bfloat16", out=short), 6),
        "float32 → float16, stochastic": (lambda: quantize(x, "float16", out=short.view(torch.float16)), 6),
    }
    notes = []
    for name, load in ((QPYTORCH, _qpytorch), (TORCHAO, _torchao)):
        try:
            found[name] = load(x)
        except Exception as error:  # whatever a package that compiles at import may raise
            notes.append(f"{name}: not here ({type(error).__name__}: {str(error).splitlines()[0][:100]})")
    image = _channels_last(x)
    if image is not None:
        found["float32 in place, stochastic, channels_last"] = (lambda: quantize(image, FORMAT, out=image), 8)
    return {name: one[0] for name, one in found.items()}, {name: one[1] for name, one in found.items()}, notes


def _channels_last(x: torch.Tensor) -> torch.Tensor | None:
    """Images of 64 channels with these elements, if their number is fitting."""
    if x.numel() % (64 * 32 * 32):
        return None
    return x.clone().view(-1, 64, 32, 32).contiguous(memory_format=torch.channels_last)


def _qpytorch(x: torch.Tensor) -> tuple[Action, int]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        fixed_point_quantize = import_module("qtorch.quant").fixed_point_quantize
    return lambda: fixed_point_quantize(x, FORMAT.wl, FORMAT.fl, rounding="stochastic"), 8


def _torchao(x: torch.Tensor) -> tuple[Action, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rounded = import_module("torchao.optim.quant_utils")._fp32_to_bf16_sr
    return lambda: rounded(x), 6


def rows_to_json(rows: Sequence[RoundingRow], machine: dict[str, Any], *, elements: int, notes: Sequence[str]) -> str:
    """The results with the machine, as JSON."""
    found = {"machine": machine, "elements": elements, "rows": [asdict(row) for row in rows], "notes": list(notes)}
    return json.dumps(found, indent=1) + "\n"


def parse_elements(text: str) -> int:
    """A number of elements; K, M and G are powers of 1024.

    >>> parse_elements("16M")
    16777216
    """
    digits, factor = text.strip().upper(), 1
    if digits[-1:] in ("K", "M", "G"):
        factor = 1024 ** (1 + "KMG".index(digits[-1]))
        digits = digits[:-1]
    if not digits.isdecimal() or not 1 <= int(digits) * factor <= 1 << 34:
        raise ConfigError(f"--elements: needs a number from 1 to 16G such as 100000 or 16M, got {text!r}")
    return int(digits) * factor
