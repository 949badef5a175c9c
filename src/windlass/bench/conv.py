"""Convolutions by every algorithm beside PyTorch's own and ``fft-conv-pytorch``, in turns, in one process.

All are called as networks call them: as layers, through autograd.  Windlass and PyTorch compute on channels_last
tensors, PyTorch once more on NCHW, which is also what fft-conv-pytorch takes.  Speeds count the multiply-adds of
the definition, whatever an algorithm really computes.  Errors are those of a part of the first sample against
float64.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from windlass.plan.convolution import ConvShape, Direction, candidates
from windlass.tuning.cache import TimesCache
from windlass.tuning.convolution import Tuner
from windlass.tuning.cost import Machine, predicted_s
from windlass.tuning.results import ConvCase, LayerTuning, Settings
from windlass.tuning.timing import Action, Effort, interleave

TORCH_LAST, TORCH_NCHW, FFT_CONV = "PyTorch channels_last", "PyTorch NCHW", "fft-conv-pytorch"
RIVALS = (TORCH_LAST, TORCH_NCHW, FFT_CONV)
"""Who Windlass is measured beside."""

PATIENCE_S = 2.0
"""A rival whose first call takes longer has no further turn."""
LONGEST_S = 20.0
"""PyTorch in channels_last is left out where one call is predicted to take longer; NCHW is the measure then."""
MAX_SPECTRUM_BYTES = 2 << 30
"""fft-conv-pytorch is left out where the spectrum of the weights alone would be larger."""
ERROR_SIDE = 64
"""Errors are of images cut to this side."""
MAX_ERROR_S = 2.0
"""Nor is that of who takes longer than this for the whole."""
MAX_ERROR_MACS = 2e10
"""No error is computed for more multiply-adds in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvRow:
    """One convolution in one direction, computed by one.

    Attributes:
        case, shape, direction: what was computed.
        kernel: the filter's height.
        by: an algorithm, or one of `RIVALS`.
        turns: how many were measured; few where it was far slower than the fastest.
        seconds, low_s, high_s: median and quartiles.
        gflops: multiply-adds of the definition, times two, per second.
        share: of the machine's measured peak.
        error: relative L2 error; NaN where it was not computed.
        is_auto: whether the chooser takes it.
        speedup, speedup_low, speedup_high: the time of `baseline` over this one, median and quartiles.
        baseline: PyTorch in channels_last, or NCHW where that was left out.
    """

    case: str
    shape: str
    direction: Direction
    kernel: int
    by: str
    turns: int
    seconds: float
    low_s: float
    high_s: float
    gflops: float
    share: float
    error: float
    is_auto: bool
    speedup: float
    speedup_low: float
    speedup_high: float
    baseline: str = TORCH_LAST


OnTurn = Callable[[str], None]


def kernel_cases(
    kernels: Iterable[int], *, channels: int, size: int, batch: int, depthwise: bool
) -> dict[str, ConvCase]:
    """Convolutions that keep the image's size, by the filter's side."""
    return {
        f"{k}x{k}": _case(
            ConvShape(
                batch=batch, in_channels=channels, height=size, width=size, out_channels=channels, kernel=(k, k),
                padding=((k - 1) // 2, k // 2, (k - 1) // 2, k // 2), groups=channels if depthwise else 1,
            )
        )
        for k in kernels
    }  # fmt: skip


def network_cases(network: str, *, batch: int, size: int | None) -> dict[str, ConvCase]:
    """Every distinct convolution of a network, by its first layer's name and how often it stands there."""
    from windlass.networks import NETWORKS, build_network
    from windlass.networks.capture import capture
    from windlass.tuning.network import graph_cases

    entry = NETWORKS[network]
    side = size or entry.default_size
    module = build_network(network, num_classes=entry.num_classes, in_channels=entry.in_channels, image_size=side)
    shape = (batch, entry.in_channels, side, side)
    graph = capture(module, shape, name=network, num_classes=entry.num_classes)
    names: dict[ConvCase, list[str]] = {}
    for name, case in graph_cases(graph, layout="channels_last").items():
        names.setdefault(case, []).append(name)
    return {f"{same[0]} (×{len(same)})" if len(same) > 1 else same[0]: case for case, same in names.items()}


def num_turns(cases: Mapping[str, ConvCase], directions: Sequence[Direction]) -> int:
    """How often `bench_conv` calls `on_turn`."""
    return sum(direction in case.directions for case in cases.values() for direction in directions)


def bench_conv(
    cases: Mapping[str, ConvCase],
    *,
    directions: Sequence[Direction],
    settings: Settings,
    machine: Machine,
    turns: int,
    on_turn: OnTurn = lambda what: None,
) -> list[ConvRow]:
    """Measures every case in every direction that it has.

    Args:
        cases: what to compute, by name.
        directions: which directions.
        settings: accuracy of the algorithms, and the workspace that ``auto`` allows.
        machine: its peak and threads.
        turns: of every rival; one that is ten times slower than the fastest has one only.
        on_turn: told what comes next.
    """
    rows = []
    with warnings.catch_warnings():
        # fft-conv-pytorch 1.2.0 indexes in a way that PyTorch warns of at every call.
        warnings.filterwarnings("ignore", message="Using a non-tuple sequence for multidimensional indexing")
        for name, case in cases.items():
            for direction in directions:
                if direction in case.directions:
                    on_turn(f"{name}, {direction}")
                    rows += _measure(name, case, direction, settings=settings, machine=machine, turns=turns)
    return rows


def _measure(
    name: str, case: ConvCase, direction: Direction, *, settings: Settings, machine: Machine, turns: int
) -> list[ConvRow]:
    effort = Effort(min_rounds=turns, max_rounds=turns, budget_s=math.inf, hopeless=10.0)
    rivals, given_up = _actions(case, direction, settings, machine=machine)
    samples = interleave(rivals, effort=effort) | given_up
    medians = {by: statistics.median(seconds) for by, seconds in samples.items()}
    errors = dict.fromkeys(samples, math.nan)
    errors |= _errors(case, direction, [by for by, seconds in medians.items() if seconds < MAX_ERROR_S])
    chosen = _auto(name, case, direction, settings=settings, machine=machine, medians=medians)
    return [
        _row(name, case, direction, by, samples, machine=machine, error=errors[by], is_auto=by == chosen)
        for by in samples
    ]


def _row(
    name: str, case: ConvCase, direction: Direction, by: str, samples: Mapping[str, list[float]], *,
    machine: Machine, error: float, is_auto: bool,
) -> ConvRow:  # fmt: skip
    low, median, high = quartiles(samples[by])
    baseline = TORCH_LAST if TORCH_LAST in samples else TORCH_NCHW
    ratios = [theirs / ours for theirs, ours in zip(samples[baseline], samples[by], strict=False)]
    speedup_low, speedup, speedup_high = quartiles(ratios)
    return ConvRow(
        case=name,
        shape=str(case.shape),
        direction=direction,
        kernel=case.shape.kernel[0],
        by=by,
        turns=len(samples[by]),
        seconds=median,
        low_s=low,
        high_s=high,
        gflops=2e-9 * case.shape.macs / median,
        share=2.0 * case.shape.macs / median / machine.peak_flops,
        error=error,
        is_auto=is_auto,
        speedup=speedup,
        speedup_low=speedup_low,
        speedup_high=speedup_high,
        baseline=baseline,
    )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile.

    >>> quartiles([3.0, 1.0, 2.0, 5.0, 4.0])
    (2.0, 3.0, 4.0)
    """
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def geometric_means(rows: Sequence[ConvRow]) -> dict[tuple[Direction, str], float]:
    """The geometric mean of the speed-ups over PyTorch's, by direction and who computes.

    ``auto`` is the chooser's pick.  Who does not compute every case in a direction has no mean there.
    """
    found: dict[tuple[Direction, str], list[float]] = {}
    for row in rows:
        names = [row.by, "auto"] if row.is_auto else [row.by]
        for by in names:
            found.setdefault((row.direction, by), []).append(row.speedup)
    most = {direction: len(values) for (direction, by), values in found.items() if by == "auto"}
    return {
        (direction, by): statistics.geometric_mean(values)
        for (direction, by), values in found.items()
        if len(values) == most[direction]
    }


def rows_to_json(rows: Sequence[ConvRow], machine: Mapping[str, Any], *, notes: Sequence[str]) -> str:
    """The results with the machine, as JSON; a number that is none is null."""
    plain = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in map(asdict, rows)
    ]
    means = [
        {"direction": direction, "by": by, "speedup": mean} for (direction, by), mean in geometric_means(rows).items()
    ]
    content = {"machine": dict(machine), "notes": list(notes), "rows": plain, "geometric_means": means}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def notes() -> list[str]:
    """What a reader must know of the rivals."""
    if importlib.util.find_spec("fft_conv_pytorch") is None:
        lines = ["fft-conv-pytorch is not installed: left out (pip install fft-conv-pytorch)"]
    else:
        lines = [
            "fft-conv-pytorch is left out where it fails, or where the spectrum of the weights exceeds 2 GiB, and has "
            f"one turn, its first call, where that takes over {PATIENCE_S:.0f} s"
        ]
    limit = f"{LONGEST_S:.0f} s"
    return [*lines, f"times PyTorch: in channels_last, but in NCHW where that is predicted to take over {limit} a call"]


def _case(shape: ConvShape) -> ConvCase:
    return ConvCase(shape=shape, layout="channels_last", weight_layout="channels_last")


def _names(case: ConvCase, settings: Settings) -> list[str]:
    return [a.name for a in candidates(case.shape, accuracy=settings.accuracy) if a.family != "torch"]


def _actions(
    case: ConvCase, direction: Direction, settings: Settings, *, machine: Machine
) -> tuple[dict[str, Action], dict[str, list[float]]]:
    """What is measured in turns; and the one time of those that are not, because a call takes too long."""
    from windlass.tuning.calls import CaseRunner

    last, plain = CaseRunner(case), CaseRunner(_nchw(case))
    actions: dict[str, Action] = {}
    given_up: dict[str, list[float]] = {}
    if predicted_s("torch", direction, case.shape, machine=machine) < LONGEST_S:
        actions[TORCH_LAST] = last.runner("torch", direction)
    actions[TORCH_NCHW] = plain.runner("torch", direction)
    if _fft_conv_takes(case.shape):
        action = _fft_conv(case, direction)
        seconds = _first_call_s(action)
        if seconds is not None and seconds < PATIENCE_S:
            actions[FFT_CONV] = action
        elif seconds is not None:
            given_up[FFT_CONV] = [seconds]
    for name in _names(case, settings):
        actions[name] = last.runner(name, direction)
        actions[name]()  # compiles
    return actions, given_up


def _first_call_s(action: Action) -> float | None:
    """Seconds of a first call; None where it fails: a rival that this PyTorch breaks is no reason to stop."""
    with contextlib.suppress(RuntimeError, IndexError, TypeError):
        started = time.perf_counter()
        action()
        return time.perf_counter() - started
    return None


def _nchw(case: ConvCase) -> ConvCase:
    return replace(case, layout="contiguous", weight_layout="contiguous")


def _fft_conv_takes(shape: ConvShape) -> bool:
    top, bottom, left, right = shape.padding
    height, width = shape.height + top + bottom, shape.width + left + right
    spectrum = 8 * shape.num_weights // (shape.kernel[0] * shape.kernel[1]) * height * (width // 2 + 1)
    is_symmetric = top == bottom and left == right
    return importlib.util.find_spec("fft_conv_pytorch") is not None and is_symmetric and spectrum < MAX_SPECTRUM_BYTES


def _fft_conv(case: ConvCase, direction: Direction) -> Action:
    import torch

    from windlass.tuning.calls import CaseRunner

    fft_conv: Any = importlib.import_module("fft_conv_pytorch").fft_conv
    shape = case.shape
    x, weight, bias, dy = CaseRunner(_nchw(case)).tensors(direction)
    padding = (shape.padding[0], shape.padding[2])

    def forward() -> torch.Tensor:
        y: torch.Tensor = fft_conv(
            x, weight, bias, padding=padding, stride=shape.stride, dilation=shape.dilation, groups=shape.groups
        )
        return y

    if direction == "forward":
        weight.requires_grad_()
        return forward
    y = forward()
    targets = [x] if direction == "input" else [parameter for parameter in (weight, bias) if parameter is not None]
    return lambda: torch.autograd.grad(y, targets, dy, retain_graph=True)


def _errors(case: ConvCase, direction: Direction, names: Sequence[str]) -> dict[str, float]:
    """Relative L2 errors on a part of one sample."""
    from windlass.tuning.calls import CaseRunner

    shape = replace(
        case.shape, batch=1, height=min(case.shape.height, ERROR_SIDE), width=min(case.shape.width, ERROR_SIDE)
    )
    if shape.macs > MAX_ERROR_MACS:
        return dict.fromkeys(names, math.nan)
    part = replace(case, shape=shape)
    last, plain = CaseRunner(part), CaseRunner(_nchw(part))
    truth = last.reference(direction)
    errors = {}
    for by in names:
        if by == FFT_CONV:
            found: Any = _fft_conv(part, direction)()
            found = found if direction == "forward" else found[0]
        else:
            runner = plain if by == TORCH_NCHW else last
            found = runner.result("torch" if by in RIVALS else by, direction)
        errors[by] = float((found.detach().double() - truth).norm() / truth.norm())
    return errors


def _auto(
    name: str, case: ConvCase, direction: Direction, *, settings: Settings, machine: Machine,
    medians: Mapping[str, float],
) -> str:  # fmt: skip
    """What the chooser takes, given the times that were measured here."""
    from windlass.kernels import convolve

    known = {
        "torch": medians.get(TORCH_LAST, math.inf),
        **{by: seconds for by, seconds in medians.items() if by not in RIVALS},
    }
    tuner = Tuner(
        settings=settings,
        machine=machine,
        cache=TimesCache({}, warn=lambda message: None, folder=None),
        measure=lambda case, direction, names: {by: known[by] for by in names},
        workspace=lambda by, direction, case: convolve.workspace_bytes(
            by, direction, shape=case.shape, threads=machine.threads
        ),
    )
    tuned: LayerTuning = tuner.tune(name, [replace(case, directions=(direction,))])
    chosen = tuned.choice.of(direction)
    return TORCH_LAST if chosen == "torch" else chosen
