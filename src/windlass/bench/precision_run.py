"""One run of Gupta et al.'s experiment: trains a network in one way and looks at it after every epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from windlass.bench.precision import PAPER_NETWORKS, Experiment, PaperNetwork, Point, Run, RunResult
from windlass.bench.precision_nets import build_paper_network
from windlass.bench.precision_pool import Emit, run_jobs
from windlass.data import Dataset, open_dataset
from windlass.data.serving import BatchServer
from windlass.errors import ConfigError
from windlass.precision import Lowered, apply

TEST_BATCH = 500
OnPoint = Callable[[Point], None]


def bench_precision(
    experiment: Experiment,
    *,
    num_processes: int,
    on_point: Callable[[Run, Point], None],
    on_result: Callable[[RunResult], None],
) -> None:
    """Trains every run of the experiment, several at once.

    Args:
        experiment: what is trained.
        num_processes: runs at once, of one thread each.
        on_point: told after every epoch of a run.
        on_result: told after every run.

    Raises:
        WindlassError: a run failed.
    """

    def on_event(event: tuple[Run, Point] | RunResult) -> None:
        if isinstance(event, RunResult):
            on_result(event)
        else:
            on_point(*event)

    jobs = [(run, experiment) for run in experiment.runs()]
    run_jobs(jobs, _work, num_processes=num_processes, on_event=on_event)


def _work(job: tuple[Run, Experiment], emit: Emit) -> None:
    torch.set_num_threads(1)
    run, experiment = job
    emit(train_run(run, experiment, on_point=lambda point: emit((run, point))))


def num_samples(data: str) -> tuple[int, int]:
    """Samples to learn and to test."""
    dataset = open_pixels(data)
    return len(dataset.train), len(dataset.test)


@lru_cache(maxsize=1)
def open_pixels(data: str) -> Dataset:
    """The dataset with pixels in [0, 1], as the paper has them, instead of mean 0 and deviation 1.

    Raises:
        ConfigError: images differ in size or are not square.
    """
    dataset = open_dataset(data)
    channels, height, width = dataset.image_shape
    if height == 0 or height != width:
        raise ConfigError(f"--data {data}: needs square images of one size, got {height}x{width}")
    return replace(dataset, mean=(0.0,) * channels, std=(1.0,) * channels)


def check_data(experiment: Experiment) -> None:
    """Refuses data that a network cannot take.

    Raises:
        ConfigError: the images are too small, or not square.
        DataError: the data is not there or damaged.
    """
    size = open_pixels(experiment.data).image_shape[1]
    for name in experiment.networks:
        least = PAPER_NETWORKS[name].min_size
        if size < least:
            raise ConfigError(f"--data {experiment.data}: {name} needs images of side {least} at least, got {size}")


def train_run(run: Run, experiment: Experiment, *, on_point: OnPoint = lambda point: None) -> RunResult:
    """Trains, and measures the test error after every epoch."""
    started = time.perf_counter()
    dataset, settings = open_pixels(experiment.data), PAPER_NETWORKS[run.network]
    size = dataset.image_shape[1]
    train = BatchServer(dataset.train, dataset=dataset, batch=experiment.batch, image_size=size, seed=run.seed)
    test = BatchServer(dataset.test, dataset=dataset, batch=TEST_BATCH, image_size=size, shuffle=False)
    trainer = _Trainer(run, dataset, settings)
    points = []
    for epoch in range(run.epochs):
        loss = trainer.train_epoch(train, epoch)
        point = trainer.point(epoch, loss=loss, test_error=trainer.test_error(test))
        points.append(point)
        on_point(point)
    return RunResult(
        run=run, points=tuple(points), num_classes=dataset.num_classes, seconds=time.perf_counter() - started
    )


class _Trainer:
    """A network, its optimizer, and the formats they are kept in."""

    def __init__(self, run: Run, dataset: Dataset, settings: PaperNetwork) -> None:
        channels, size, _ = dataset.image_shape
        self._model: nn.Module = build_paper_network(
            run.network, in_channels=channels, image_size=size, num_classes=dataset.num_classes,
            deviation=settings.weight_deviation, generator=torch.Generator().manual_seed(run.seed),
        )  # fmt: skip
        self._names = [name for name, _ in self._model.named_parameters()]
        self._settings, self._epochs = settings, run.epochs
        self._optimizer = torch.optim.SGD(
            self._model.parameters(), lr=settings.learning_rate, momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        recipe = run.way.recipe(run.network)
        self._lowered: Lowered | None = None
        if not recipe.is_plain:
            self._lowered = apply(self._model, self._optimizer, recipe, seed=run.seed)

    def train_epoch(self, server: BatchServer, epoch: int) -> float:
        """One pass over the samples; the mean loss."""
        self._model.train()
        if self._lowered is not None:
            self._lowered.reset_counters()
            self._lowered.share = epoch / self._epochs
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * self._settings.decay**epoch
        losses = []
        for step in range(server.num_steps):
            batch = server.fetch(epoch, step)
            self._optimizer.zero_grad(set_to_none=True)
            loss: Tensor = cross_entropy(self._model(batch.images), batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    def test_error(self, server: BatchServer) -> float:
        """Percent of the samples that are taken for another class."""
        self._model.eval()
        wrong = 0
        with torch.no_grad():
            for step in range(server.num_steps):
                batch = server.fetch(0, step)
                wrong += int((self._model(batch.images).argmax(1) != batch.labels).sum())
        return 100 * wrong / server.num_samples

    def point(self, epoch: int, *, loss: float, test_error: float) -> Point:
        """What is known after this epoch."""
        known = Point(epoch=epoch + 1, test_error=test_error, train_loss=loss, num_parameters=len(self._names))
        if self._lowered is None:
            return known
        rows = self._lowered.rows()
        updates = [row for row in rows if row["role"] == "updates"]
        outputs = [row for row in rows if row["role"] == "activations"]
        zeroed, moved = _sum(updates, "zeroed"), _sum(updates, "moved")
        return replace(
            known,
            zeroed=zeroed / max(1, zeroed + moved),
            moved=moved / max(1, _sum(updates, "elements")),
            still=tuple(row["layer"] for row in updates if not row["moved"]),
            saturated=_sum(outputs, "saturated") / max(1, _sum(outputs, "elements")),
        )


def _sum(rows: Sequence[dict[str, Any]], key: str) -> int:
    return sum(row[key] for row in rows)
