"""A whole training step by plain PyTorch beside the accelerated one: forward, loss, backward, SGD.

What a process does with freed memory (`mallopt`) holds for the whole process, so every rival has a process of its
own, that waits while another has its turn: one line on its input is one step, one line on its output the seconds.
All train the same network from the same weights on the same batch, in channels_last.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from windlass.bench.conv import quartiles
from windlass.engine.memory import ask_for_huge_pages, keep_freed_memory
from windlass.errors import WindlassError

RIVALS: dict[str, dict[str, bool]] = {
    "PyTorch": {"accelerated": False, "keeps_memory": False},
    "PyTorch, freed memory kept": {"accelerated": False, "keeps_memory": True},
    "Windlass": {"accelerated": True, "keeps_memory": False},
    "Windlass, freed memory kept": {"accelerated": True, "keeps_memory": True},
}
"""Who takes turns."""

BASELINE = "PyTorch"
PAUSE_S = 0.02
"""Before each turn, so that the last one's threads have gone to sleep."""
WARM_UP = 3
"""Steps that each makes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """What every rival does.

    Attributes:
        network, batch, image_size: of the built-in network; 0: its own size.
        threads: of tensor operations.
        accuracy, tune, workspace_mb: as `windlass.accelerate`'s.
    """

    network: str
    batch: int
    image_size: int = 0
    threads: int = 1
    accuracy: str = "standard"
    tune: str = "measure"
    workspace_mb: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One rival's result: the median step with quartiles, its images/s, and PyTorch's time over it."""

    by: str
    turns: int
    seconds: float
    low_s: float
    high_s: float
    images_per_s: float
    speedup: float
    speedup_low: float
    speedup_high: float
    first_loss: float
    last_loss: float


def bench_step(
    spec: StepSpec, *, turns: int, rivals: Sequence[str] = tuple(RIVALS), on_turn: Callable[[str, int], None]
) -> list[StepRow]:
    """Measures the rivals in turns.

    Args:
        spec: what each does.
        turns: measured steps of each.
        rivals: names of `RIVALS`.
        on_turn: told who is next, and in which turn; -1 while it gets ready.

    Raises:
        WindlassError: a rival failed; quotes its last line.
    """
    processes: dict[str, _Rival] = {}
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    losses: dict[str, list[float]] = {name: [] for name in rivals}
    try:
        for name in rivals:
            on_turn(name, -1)
            processes[name] = _Rival(name, spec)
            losses[name].append(processes[name].ready())
        for turn in range(turns):
            start = turn % len(rivals)
            for name in [*rivals[start:], *rivals[:start]]:
                on_turn(name, turn)
                time.sleep(PAUSE_S)
                taken, loss = processes[name].step()
                seconds[name].append(taken)
                losses[name].append(loss)
    finally:
        for process in processes.values():
            process.close()
    first = BASELINE if BASELINE in rivals else rivals[0]
    return [_row(name, spec, seconds[name], seconds[first], losses[name]) for name in rivals]


def _row(name: str, spec: StepSpec, ours: list[float], theirs: list[float], losses: list[float]) -> StepRow:
    low, median, high = quartiles(ours)
    speedup_low, speedup, speedup_high = quartiles([other / own for other, own in zip(theirs, ours, strict=True)])
    return StepRow(
        by=name,
        turns=len(ours),
        seconds=median,
        low_s=low,
        high_s=high,
        images_per_s=spec.batch / statistics.median(ours),
        speedup=speedup,
        speedup_low=speedup_low,
        speedup_high=speedup_high,
        first_loss=losses[0],
        last_loss=losses[-1],
    )


class _Rival:
    """The process of one rival."""

    def __init__(self, name: str, spec: StepSpec) -> None:
        self._name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        arguments = json.dumps({"spec": asdict(spec), **RIVALS[name]})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "windlass.bench.step", arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def ready(self) -> float:
        """Waits until it is ready; the loss of its first step."""
        return float(self._read()["loss"])

    def step(self) -> tuple[float, float]:
        """One step: seconds and loss."""
        try:
            _pipe(self._process.stdin).write("step\n")
            _pipe(self._process.stdin).flush()
        except OSError:
            pass  # it has ended: reading tells why
        answer = self._read()
        return float(answer["seconds"]), float(answer["loss"])

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        line = _pipe(self._process.stdout).readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        raise WindlassError(f"the process of {self._name} failed: {lines[-1] if lines else 'without a word'}")


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def rows_to_json(rows: Sequence[StepRow], spec: StepSpec, machine: dict[str, Any]) -> str:
    """The results with the machine, as JSON."""
    return (
        json.dumps({"machine": machine, "spec": asdict(spec), "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    )


def make_step(spec: StepSpec, *, accelerated: bool) -> Callable[[], float]:
    """The textbook training step; returns its loss."""
    import torch

    import windlass
    from windlass.networks import NETWORKS, build_network
    from windlass.objective import objective

    torch.set_num_threads(spec.threads)
    torch.manual_seed(0)
    entry = NETWORKS[spec.network]
    side = spec.image_size or entry.default_size
    model = build_network(
        spec.network, num_classes=entry.num_classes, in_channels=entry.in_channels, image_size=side
    ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(spec.batch, entry.in_channels, side, side).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(entry.num_classes, (spec.batch,))
    model.train()
    if accelerated:
        windlass.accelerate(model, images, accuracy=spec.accuracy, tune=spec.tune, workspace_mb=spec.workspace_mb)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> float:
        torch.manual_seed(1)  # the same dropout for all
        optimizer.zero_grad(set_to_none=True)
        loss = objective(model, model(images), labels, images=images) / spec.batch
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return step


def main(arguments: Sequence[str]) -> int:
    """One rival's process."""
    request = json.loads(arguments[0])
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever else prints must not come between the answers
    if request["keeps_memory"]:  # before PyTorch's first tensor
        ask_for_huge_pages()
        keep_freed_memory()
    step = make_step(StepSpec(**request["spec"]), accelerated=request["accelerated"])
    losses = [step() for _ in range(WARM_UP)]
    print(json.dumps({"loss": losses[0]}), file=answers, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "loss": loss}), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
