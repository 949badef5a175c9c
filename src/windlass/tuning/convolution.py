"""Chooses the algorithms of convolutions: by domain and accuracy, by the cost model, then by measuring.

PyTorch's own kernel takes part, and it wins ties: another algorithm must be faster by `MARGIN`.  What the
model takes for much slower than PyTorch's, or than another, is not measured.  Times are kept (`tuning.cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from windlass.plan.convolution import CONV_ALGORITHMS, DIRECTIONS, ConvChoice, Direction, candidates
from windlass.tuning.cache import TimesCache
from windlass.tuning.cost import FLOAT_BYTES, Machine, predicted_s
from windlass.tuning.results import MIB, ConvCase, DirectionTuning, LayerTuning, Settings
from windlass.tuning.timing import Action, Effort, interleave, medians

MARGIN = 1.03
"""How many times faster than PyTorch's own an algorithm must measure."""
MODEL_MARGIN = 1.15
"""The same where nothing was measured, since the model errs."""
MEASURED = 3
"""How many algorithms are measured beside PyTorch's own."""
HOPELESS = 1.5
"""An algorithm predicted so many times slower than PyTorch's own is not measured."""
BEHIND = 2.0
"""Nor is one predicted so many times slower than the best of Windlass's own."""
SURE = 40.0
"""PyTorch's own is not even measured where it is predicted so many times slower, and its rival keeps a quarter of
that: its slowest kernels take minutes."""
DETOUR_S = 40e-6
"""What a direction that stays PyTorch's pays for going through Windlass's operator."""

OnEvent = Callable[[dict[str, Any]], None]
"""Takes events for a person: ``tuning`` (what is measured) and ``warning``."""

Measure = Callable[[ConvCase, Direction, Sequence[str]], dict[str, float]]
"""Seconds of one direction by each of these algorithms, measured side by side."""

Workspace = Callable[[str, Direction, ConvCase], int]
"""Bytes of scratch memory, all threads together."""


@dataclass
class Tuner:
    """Chooses for one machine and one wish.

    Attributes:
        settings: the wish.
        machine: for the cost model.
        cache: times that are known already; new ones are put there, `cache.save` is the caller's.
        measure: measures (`make_tuner` gives the real one).
        workspace: scratch memory of an algorithm.
        on_event: told what is being measured.
    """

    settings: Settings
    machine: Machine
    cache: TimesCache
    measure: Measure
    workspace: Workspace
    on_event: OnEvent = lambda event: None

    def __post_init__(self) -> None:
        """Counts for progress."""
        self._done, self._total = 0, 1

    def tune_all(self, layers: Mapping[str, Sequence[ConvCase]]) -> tuple[LayerTuning, ...]:
        """The choices for several layers, in their order; what was measured is kept after each."""
        self._done, self._total = 0, len(layers)
        tunings = []
        for name, cases in layers.items():
            tunings.append(self.tune(name, cases))
            self.cache.save()
            self._done += 1
        return tuple(tunings)

    def tune(self, name: str, cases: Sequence[ConvCase]) -> LayerTuning:
        """The choice for a layer that is called as `cases` say, perhaps several times in a step."""
        assert cases
        distinct: dict[ConvCase, int] = {}
        for case in cases:
            distinct[case] = distinct.get(case, 0) + 1
        needed = [direction for direction in DIRECTIONS if any(direction in case.directions for case in cases)]
        rows = tuple(self._direction(name, direction, distinct) for direction in needed)
        return _worth_it(LayerTuning(name=name, cases=tuple(cases), directions=rows), self.machine)

    def _direction(self, name: str, direction: Direction, cases: Mapping[ConvCase, int]) -> DirectionTuning:
        cases = {case: count for case, count in cases.items() if direction in case.directions}
        possible, refused = self._possible(direction, list(cases))
        predicted = {algorithm: self._predicted(algorithm, direction, cases) for algorithm in possible}
        row = DirectionTuning(direction=direction, predicted=predicted)
        if self.settings.tune == "off":
            return replace(row, reason="tuning is off")
        if len(possible) == 1 and not refused:
            return replace(row, reason=_why_alone(self.settings))
        row = self._choose(name, row, cases) if len(possible) > 1 else row
        left_out = [f"{refused_name} needs {why}" for refused_name, why in refused.items()]
        return replace(row, reason="; ".join(([row.reason] if row.reason else []) + left_out))

    def _choose(self, name: str, row: DirectionTuning, cases: Mapping[ConvCase, int]) -> DirectionTuning:
        """Among those that have a price, by the model or by measuring."""
        predicted, direction = row.predicted, row.direction
        others = sorted((a for a in predicted if a != "torch"), key=lambda a: predicted[a])
        limit = min(HOPELESS * predicted["torch"], BEHIND * predicted[others[0]])
        worth = [a for a in others if predicted[a] <= limit][:MEASURED]
        if not worth:
            times = predicted[others[0]] / predicted["torch"]
            return replace(row, reason=f"{others[0]} is predicted to take {times:.1f} times PyTorch's time")
        if self.settings.tune == "model":
            return decide(row, {a: predicted[a] for a in ("torch", *worth)}, margin=MODEL_MARGIN)
        if predicted["torch"] > SURE * predicted[worth[0]]:
            alone = self._measured(name, direction, cases, worth)
            best = min(alone, key=lambda a: alone[a], default="")
            if best and predicted["torch"] * 4 > SURE * alone[best]:
                times = predicted["torch"] / alone[best]
                said = f"PyTorch's is predicted to take {times:.0f} times its time, and was not measured"
                return replace(row, algorithm=best, measured=alone, reason=said)
        measured = self._measured(name, direction, cases, ["torch", *worth])
        return decide(replace(row, measured=measured), measured, margin=MARGIN)

    def _possible(self, direction: Direction, cases: list[ConvCase]) -> tuple[list[str], dict[str, str]]:
        """Algorithms that can do all cases, and why others that are accurate enough cannot."""
        sets = [{a.name for a in candidates(case.shape, accuracy=self.settings.accuracy)} for case in cases]
        names = [name for name in CONV_ALGORITHMS if all(name in some for some in sets)]
        limit, refused = self.settings.workspace_mb * MIB * self.machine.threads, {}
        for name in names:
            needed = max(self.workspace(name, direction, case) for case in cases) if name != "torch" else 0
            if needed > limit:
                per_thread = needed / self.machine.threads / MIB
                refused[name] = f"{per_thread:.0f} MiB of workspace a thread, {self.settings.workspace_mb} allowed"
        return [name for name in names if name not in refused], refused

    def _predicted(self, algorithm: str, direction: Direction, cases: Mapping[ConvCase, int]) -> float:
        return sum(
            count * predicted_s(algorithm, direction, case.shape, machine=self.machine, layout=case.layout)
            for case, count in cases.items()
        )

    def _measured(
        self, name: str, direction: Direction, cases: Mapping[ConvCase, int], algorithms: Sequence[str]
    ) -> dict[str, float]:
        """Seconds of all cases together; one that failed in some case is left out."""
        total = dict.fromkeys(algorithms, 0.0)
        for case, count in cases.items():
            known = self.cache.get(case.key, direction)
            if not set(algorithms) <= set(known):
                self._tell(name, direction)
                known = self.measure(case, direction, algorithms)
                self.cache.put(case.key, direction, known)
            total = {a: seconds + count * known[a] for a, seconds in total.items() if a in known}
        return total

    def _tell(self, name: str, direction: str) -> None:
        event = {"kind": "tuning", "layer": name, "direction": direction, "done": self._done, "total": self._total}
        self.on_event(event)


def decide(row: DirectionTuning, rivals: Mapping[str, float], *, margin: float) -> DirectionTuning:
    """The fastest of `rivals`, if it is faster than PyTorch's by `margin`.

    >>> row = decide(DirectionTuning(direction="input"), {"torch": 3.0, "direct": 1.5}, margin=1.03)
    >>> row.algorithm, row.reason
    ('direct', "2.00 times as fast as PyTorch's")
    """
    best = min(rivals, key=lambda name: (rivals[name], name != "torch"))
    if best != "torch" and rivals[best] * margin < rivals["torch"]:
        said = f"{rivals['torch'] / rivals[best]:.2f} times as fast as PyTorch's"
        return replace(row, algorithm=best, reason=said)
    others = [name for name in rivals if name != "torch"]
    if not others:
        return replace(row, reason="every other algorithm failed")
    nearest = min(others, key=lambda name: rivals[name])
    times = rivals[nearest] / rivals["torch"]
    if times < 1:
        return replace(row, reason=f"PyTorch's wins the tie: {nearest} takes {times:.2f} times its time")
    return replace(row, reason=f"PyTorch's is fastest: {nearest} takes {times:.2f} times its time")


def _why_alone(settings: Settings) -> str:
    if settings.accuracy == "exact":
        return "accuracy exact leaves PyTorch's own"
    return f"no other algorithm computes it at accuracy {settings.accuracy}"


def _worth_it(tuning: LayerTuning, machine: Machine) -> LayerTuning:
    """PyTorch's own throughout, where what is won does not pay for the directions that stay PyTorch's."""
    if tuning.choice == ConvChoice():
        return tuning
    detours_s = sum(_detour_s(row, case, machine) for row in tuning.directions for case in tuning.cases)
    if tuning.seconds(torch=True) - tuning.seconds() > detours_s:
        return tuning
    rows = tuple(
        replace(row, algorithm="torch", reason=f"{row.reason}, but too little in all")
        if row.algorithm != "torch"
        else row
        for row in tuning.directions
    )
    return replace(tuning, directions=rows)


def _detour_s(row: DirectionTuning, case: ConvCase, machine: Machine) -> float:
    """What a direction costs that stays PyTorch's within Windlass's layer: the operator, and the bias's gradient."""
    if row.algorithm != "torch" or row.direction not in case.directions:
        return 0.0
    shape = case.shape
    outputs = shape.batch * shape.out_channels * shape.out_height * shape.out_width
    apart = FLOAT_BYTES * outputs / machine.bytes_per_s if row.direction == "weight" and case.bias else 0.0
    return DETOUR_S + apart


def make_tuner(settings: Settings, *, threads: int, on_event: OnEvent) -> Tuner:
    """A tuner that really measures, on this machine with so many threads, and keeps times on disk."""
    from windlass.kernels import convolve
    from windlass.tuning.cache import cache_folder
    from windlass.tuning.machine import fingerprint, measure_machine

    cache = TimesCache(
        fingerprint(threads=threads),
        warn=lambda message: on_event({"kind": "warning", "message": message}),
        folder=cache_folder(),
    )
    if cache.machine is None:
        cache.machine = measure_machine(threads=threads)
        cache.save()

    def workspace(algorithm: str, direction: Direction, case: ConvCase) -> int:
        return convolve.workspace_bytes(algorithm, direction, shape=case.shape, threads=threads)

    return Tuner(
        settings=settings,
        machine=cache.machine,
        cache=cache,
        measure=real_measure(threads=threads, on_event=on_event),
        workspace=workspace,
        on_event=on_event,
    )


def real_measure(*, threads: int, effort: Effort | None = None, on_event: OnEvent = lambda event: None) -> Measure:
    """Measures through the layers, as networks call them.

    An algorithm that fails here, as on a processor for which its kernel cannot be compiled, is left out with a
    warning; PyTorch's own is not.
    """
    import torch

    from windlass.tuning.calls import CaseRunner

    effort = effort or Effort()

    def measure(case: ConvCase, direction: Direction, algorithms: Sequence[str]) -> dict[str, float]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
                runner = CaseRunner(case)
                rivals: dict[str, Action] = {}
                for name in algorithms:
                    if name == "torch":
                        rivals[name] = runner.runner(name, direction)
                        continue
                    try:
                        action = runner.runner(name, direction)
                        action()  # compiles
                    except Exception as error:
                        message = f"{name} fails on {case.shape}, {direction}: {type(error).__name__}: {error}"
                        on_event({"kind": "warning", "message": " ".join(message.split())})
                    else:
                        rivals[name] = action
                return medians(interleave(rivals, effort=effort))
        finally:
            torch.set_num_threads(before)

    return measure
