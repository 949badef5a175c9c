"""Synchronous data-parallel SGD on one rank: the loop that every run goes through.

One step: take this rank's shard of the global batch, run forward and backward, sum the gradients over the
ranks (during the backward pass where the plan says so), agree, update.  ``Agree`` is one small sum of seven
numbers that carries the batch's loss and accuracy, and whether any rank was asked to stop, saw a number that
is not finite, or wants a checkpoint: all ranks take the same branch in the same step, so none is left waiting.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from windlass.config import better_when_lower
from windlass.data.serving import Batch, BatchServer
from windlass.engine.allreduce import ALLREDUCE
from windlass.engine.gradients import GradientAverager
from windlass.engine.prefetch import prefetch
from windlass.engine.timing import StepTimer
from windlass.engine.watch import StopRequest
from windlass.engine.world import sum_array, sum_over
from windlass.errors import DataError, NonFiniteError, StoppedError, WindlassError, WriteError
from windlass.objective import main_output, objective
from windlass.optim.build import build_optimizer, set_learning_rate
from windlass.prepare import Prepared
from windlass.progress import Agreed, Progress, Summary
from windlass.runs.checkpoint import list_checkpoints, rotate, write_checkpoint
from windlass.runs.metrics import MetricsWriter
from windlass.state import (
    average_buffers,
    gather_rank_tensors,
    load_optimizer,
    load_rank,
    mean_buffers,
    optimizer_tensors,
    seed_rank,
    step_seed,
    tensors_of_rank,
)

Emit = Callable[[dict[str, Any]], None]
Note = Callable[[str, int], None]
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
"""PyTorch's name for each value of the plan's lever ``layout``."""
SHOW_S = 0.1
"""Seconds between two events of progress."""
FETCH_AHEAD = 4
"""Batches under way per data thread, when images are files."""


class Trainer:
    """Trains one prepared run on one rank.

    Args:
        prepared: the run.
        emit: takes events for a person; only rank 0's are shown.
        stop: asked from outside to stop.
        note: told what is being done, for the watchdog.
        writer: takes rows of metrics on rank 0; None elsewhere and in a dry run.
    """

    def __init__(
        self, prepared: Prepared, *, emit: Emit, stop: StopRequest, note: Note, writer: MetricsWriter | None
    ) -> None:
        self.prepared, self.world, self.config = prepared, prepared.world, prepared.job.config
        plan = prepared.plan
        self._emit, self._stop, self._note, self._writer = emit, stop, note, writer
        self._layout = MEMORY_FORMATS[str(plan.value("layout"))]
        self.module = prepared.module.to(memory_format=self._layout)  # type: ignore[call-overload]
        self.averager = GradientAverager(
            self.module,
            start_sum=ALLREDUCE[str(plan.value("allreduce"))](self.world),
            alone=self.world.size == 1,
            bucket_bytes=int(plan.value("bucket_bytes")),
            overlap=bool(plan.value("overlap")),
        )
        self.optimizer = build_optimizer(self.config.update, [group.parameter for group in self.averager.groups])
        self.progress = Progress()
        self.folder = Path(prepared.job.folder) / "checkpoints"
        self._timer = StepTimer()
        self._started = self._shown = self._saved = time.monotonic()
        self._first_step = 0
        self._last: dict[str, float] = {}
        self._failure: WindlassError | None = None  # met on this rank alone; all ranks hear of it when they agree
        self._restore()

    def run(self) -> Summary:
        """Trains to the last epoch.

        Raises:
            StoppedError: asked to stop; a checkpoint is written.
            NonFiniteError: a loss or gradient was NaN or infinite; the weights are those before that step.
        """
        config, progress = self.config, self.progress
        status = "done"
        while progress.epoch < config.epochs:
            self._train_epoch()
            if self._finish_epoch():
                status = "early"
                break
        seconds = time.monotonic() - self._started
        return Summary(status, progress.step, seconds, dict(self._last))

    def step(self, batch: Batch) -> Agreed:
        """One step of synchronous SGD on this rank's shard; the update is left out when something is bad."""
        timer, progress = self._timer, self.progress
        # Not torch.manual_seed: it queues a call for a GPU, with its traceback, at a millisecond a step.
        torch.default_generator.manual_seed(step_seed(self.config.seed, step=progress.step, rank=self.world.rank))
        self.averager.begin()
        with timer.part("forward"):
            self._note("forward", progress.step + 1)
            loss, correct = self._forward(batch)
        with timer.part("backward"):
            self._note("backward", progress.step + 1)
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]
            finite = self.averager.finish_backward()
        with timer.part("communication"):
            self._note("the allreduce", progress.step + 1)
            local_loss = loss.item() if loss is not None else 0.0
            agreed = self._agree(local_loss, correct, len(batch.labels), finite)
            self.averager.wait()
        if agreed.failed:
            self._raise_failure()
        if agreed.bad:
            self._report_bad(local_loss, finite)
        with timer.part("update"):
            set_learning_rate(self.optimizer, self.learning_rate)
            self.optimizer.step()
        progress.step += 1
        return agreed

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.config.schedule.rate(
            self.config.update.base_lr,
            step=self.progress.step,
            steps_per_epoch=self.prepared.train.num_steps,
            epochs=self.config.epochs,
        )

    def _train_epoch(self) -> None:
        progress, server = self.progress, self.prepared.train
        self.module.train()
        batches = self._fetch(server, range(progress.position, server.num_steps))
        while progress.position < server.num_steps:
            self._timer.begin()
            with self._timer.part("data"):
                self._note("waiting for data", progress.step + 1)
                batch = self._next(batches)
            lr = self.learning_rate
            agreed = self.step(batch)
            progress.position += 1
            self._record(agreed, lr)
            if agreed.stop:
                self._stop_here()
            if agreed.checkpoint:
                self._save({})

    def _fetch(self, server: BatchServer, steps: range) -> Iterator[Batch]:
        epoch, files = self.progress.epoch, self.prepared.dataset.varied_sizes
        threads = self.config.data.threads or self.prepared.threads
        return prefetch(
            lambda step: server.fetch(epoch, step),
            steps,
            num_threads=threads,
            ahead=FETCH_AHEAD * threads if files else 0,
        )

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, or an empty one when this rank's data is bad: the others must not wait for it."""
        try:
            return next(batches)
        except DataError as error:
            self._failure = error
            none = torch.empty(0, dtype=torch.int64)
            return Batch(torch.empty(0), none, 1, none.numpy())

    def _raise_failure(self) -> None:
        """Raises, on every rank, the first failure that some rank has met alone."""
        raise next(error for error in self.world.gather(self._failure) if error is not None)

    def _write_row(self, row: dict[str, Any]) -> None:
        try:
            if self._writer is not None:
                self._writer.write(row)
        except WriteError as error:
            self._failure = error

    def _forward(self, batch: Batch) -> tuple[torch.Tensor | None, float]:
        """This rank's part of the batch's mean loss, and how many it got right."""
        if len(batch.labels) == 0:
            return None, 0.0
        outputs = self.module(batch.images.contiguous(memory_format=self._layout))
        main = main_output(outputs)
        loss = objective(self.module, outputs, batch.labels) / batch.global_count
        return loss, float((main.detach().argmax(dim=1) == batch.labels).sum())

    def _agree(self, loss: float, correct: float, seen: int, finite: bool) -> Agreed:
        sums = sum_over(
            self.world,
            [
                loss,
                correct,
                seen,
                self._stop.reason is not None,
                not (finite and math.isfinite(loss)),
                self._checkpoint_due(),
                self._failure is not None,
            ],
        )
        stop, bad, checkpoint, failed = (count > 0 for count in sums[3:])
        return Agreed(sums[0], sums[1], sums[2], stop, bad, checkpoint, failed)

    def _checkpoint_due(self) -> bool:
        """Only rank 0's clock counts."""
        rules = self.config.checkpoint
        if self.world.rank != 0 or self.prepared.job.dry_run:
            return False
        steps_due = rules.every_steps and (self.progress.step + 1) % rules.every_steps == 0
        minutes_due = rules.every_minutes and time.monotonic() - self._saved > 60 * rules.every_minutes
        return bool(steps_due or minutes_due)

    def _report_bad(self, loss: float, finite: bool) -> None:
        """Every rank learns which ranks are bad, and raises."""
        what = f"loss {loss}" if not math.isfinite(loss) else "" if finite else "a gradient that is not finite"
        found = [f"{text} on rank {rank}" for rank, text in enumerate(self.world.gather(what)) if text]
        kept = list_checkpoints(self.folder)
        last = f"last good checkpoint: {kept[-1]}" if kept else "there is no checkpoint yet"
        raise NonFiniteError(
            f"step {self.progress.step + 1} (epoch {self.progress.epoch + 1}): {', '.join(found)}; no weight was "
            f"updated with it; {last}; a smaller --lr or a --warmup often helps"
        )

    def _record(self, agreed: Agreed, lr: float) -> None:
        progress, times = self.progress, self._timer.end()
        progress.loss_sum += agreed.loss * agreed.seen
        progress.correct += agreed.correct
        progress.seen += agreed.seen
        progress.epoch_s += times["seconds"]
        progress.data_s += times["data_s"]
        row = {
            "kind": "step",
            "step": progress.step,
            "epoch": progress.epoch,
            "loss": agreed.loss,
            "accuracy": agreed.correct / agreed.seen,
            "lr": lr,
            "images": int(agreed.seen),
            **times,
        }
        if progress.step % self.config.log_every == 0:
            self._write_row(row)
        if self.world.rank == 0 and time.monotonic() - self._shown > SHOW_S:
            self._shown = time.monotonic()
            self._emit({**row, "eta_s": self.remaining_s(), **self.running()})

    def running(self) -> dict[str, float]:
        """The epoch so far, for the eye."""
        progress = self.progress
        seconds = max(progress.epoch_s, 1e-9)
        return {
            "loss": progress.loss_sum / progress.seen,
            "accuracy": progress.correct / progress.seen,
            "images_per_s": progress.seen / seconds,
            "data_share": progress.data_s / seconds,
        }

    def remaining_s(self) -> float:
        """Seconds to the end of the whole run, evaluations and checkpoints included, at the pace so far."""
        done = self.progress.step - self._first_step
        left = self.config.epochs * self.prepared.train.num_steps - self.progress.step
        return left * (time.monotonic() - self._started) / max(done, 1)

    def _finish_epoch(self) -> bool:
        """Evaluates, records, saves; says whether the run should end early."""
        progress = self.progress
        running = self.running() if progress.seen else dict.fromkeys(
            ("loss", "accuracy", "images_per_s", "data_share"), math.nan)  # fmt: skip
        test_loss, test_accuracy = self.evaluate()
        metrics = {
            "train_loss": running["loss"],
            "train_accuracy": running["accuracy"],
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
        }
        self._last = metrics | {"images_per_s": running["images_per_s"], "data_share": running["data_share"]}
        row = {"kind": "epoch", "epoch": progress.epoch, "step": progress.step, "lr": self.learning_rate,
               **self._last, "seconds": progress.epoch_s}  # fmt: skip
        self._write_row(row)
        if self.world.rank == 0:
            self._emit({**row, "eta_s": self.remaining_s()})
        ends = self._no_longer_improves(metrics)
        progress.epoch, progress.position = progress.epoch + 1, 0
        progress.begin_epoch()
        every = self.config.checkpoint.every_epochs
        last = ends or progress.epoch == self.config.epochs
        if not self.prepared.job.dry_run and (last or (every and progress.epoch % every == 0)):
            self._save(metrics)
        return ends

    def _no_longer_improves(self, metrics: dict[str, float]) -> bool:
        rules, progress = self.config.early_stop, self.progress
        value = metrics[rules.metric] * (1 if better_when_lower(rules.metric) else -1)
        if progress.best is None or value < progress.best - rules.min_delta:
            progress.best, progress.best_epoch = value, progress.epoch
        return bool(rules.patience) and progress.epoch - progress.best_epoch >= rules.patience

    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy over the test samples, each counted once, whatever the number of ranks.

        Raises:
            StoppedError: asked to stop meanwhile; the checkpoint stands before the evaluation.
        """
        average_buffers(self.module, self.world)
        self.module.eval()
        server, total = self.prepared.test, [0.0, 0.0, 0.0, 0.0, 0.0]
        batches = self._fetch(server, range(server.num_steps))
        with torch.inference_mode():
            for number in range(server.num_steps):
                self._note("evaluation", number + 1)
                score = self._score(self._next(batches))
                parts = sum_over(self.world, [*score, self._stop.reason is not None, self._failure is not None])
                total = [a + b for a, b in zip(total, parts, strict=True)]
                if total[4] > 0:
                    self._raise_failure()
                if total[3] > 0:
                    break
        self.module.train()
        if total[3] > 0:
            self._stop_here()
        return total[0] / total[2], total[1] / total[2]

    def _score(self, batch: Batch) -> tuple[float, float, float]:
        if len(batch.labels) == 0:
            return 0.0, 0.0, 0.0
        main = main_output(self.module(batch.images.contiguous(memory_format=self._layout)))
        loss = functional.cross_entropy(main, batch.labels, reduction="sum")
        return loss.item(), float((main.argmax(dim=1) == batch.labels).sum()), len(batch.labels)

    def _stop_here(self) -> None:
        if self.prepared.job.dry_run:
            raise StoppedError("stopped on request during the dry run")
        name = self._save({})
        reasons = [reason for reason in self.world.gather(self._stop.reason) if reason]
        raise StoppedError(
            f"stopped on request ({reasons[0]}) after step {self.progress.step}, checkpoint {name} written: "
            f"go on with windlass train --out {self.prepared.job.folder} --resume"
        )

    def _save(self, metrics: dict[str, float]) -> str:
        """Writes a checkpoint; every rank takes part, rank 0 writes."""
        self._note("checkpoint", self.progress.step)
        ranks = gather_rank_tensors(self.module, self.world)
        failure: Exception | None = self._failure
        if self.world.rank == 0 and failure is None:
            try:
                self._write(metrics, ranks)
            except Exception as error:
                failure = error
        failure = self.world.broadcast(failure)
        if failure is not None:
            raise failure
        self._saved = time.monotonic()
        return f"step-{self.progress.step:08d}"

    def _write(self, metrics: dict[str, float], ranks: dict[str, torch.Tensor]) -> None:
        rules, config = self.config.checkpoint, self.config
        manifest = {
            "step": self.progress.step,
            "progress": dict(self.progress.__dict__),
            "world_size": self.world.size,
            "network": config.network,
            "data": config.data.source,
            "batch": config.batch,
            "seed": config.seed,
            "metrics": metrics,
        }
        path = write_checkpoint(
            self.folder,
            weights=self.module.state_dict(),
            state=optimizer_tensors(self.optimizer, self.averager.groups) | ranks,
            manifest=manifest,
        )
        best = rotate(
            self.folder,
            keep_last=rules.keep_last,
            keep_best=rules.keep_best,
            metric=rules.monitor,
            lower=better_when_lower(rules.monitor),
        )
        row = {"kind": "checkpoint", "step": self.progress.step, "name": path.name, "best": best == path}
        self._write_row(row)
        self._emit(row)

    def _restore(self) -> None:
        checkpoint, world = self.prepared.checkpoint, self.world
        if checkpoint is None:
            seed_rank(self.config.seed, step=0, rank=world.rank)
            for group in self.averager.groups:  # rank 0's weights: zero elsewhere, then the sum
                own = group.parameter.data.numpy() if world.rank == 0 else np.zeros_like(group.parameter.data.numpy())
                group.parameter.data.copy_(torch.from_numpy(sum_array(world, own)))
            return
        _load_weights(self.module, checkpoint.weights, str(checkpoint.path))
        load_optimizer(self.optimizer, self.averager.groups, checkpoint.state)
        self.progress = Progress(**checkpoint.manifest["progress"])
        self._first_step = self.progress.step
        num_ranks = int(checkpoint.manifest["world_size"])
        with torch.no_grad():
            if num_ranks == world.size:
                load_rank(self.module, tensors_of_rank(checkpoint.state, world.rank))
            else:
                mean_buffers(self.module, checkpoint.state, num_ranks)
                seed_rank(self.config.seed, step=self.progress.step, rank=world.rank)


def _load_weights(module: nn.Module, weights: dict[str, torch.Tensor], where: str) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split())
        raise DataError(f"checkpoint {where} does not fit the network: {first}") from None
