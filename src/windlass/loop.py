"""Synchronous data-parallel SGD on one rank: the loop that every run goes through.

One step: take this rank's shard of the global batch, run forward and backward, sum the gradients over the
ranks (during the backward pass where the plan says so), agree, update.  ``Agree`` is one small sum of seven
numbers that carries the batch's loss and accuracy, and whether any rank was asked to stop, saw a number that
is not finite, or wants a checkpoint: all ranks take the same branch in the same step, so none is left waiting.

What elastic runs do beyond this loop stands in `recovery`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from windlass.config import better_when_lower
from windlass.data.micro import micro_batches
from windlass.data.serving import Batch, BatchServer
from windlass.engine.allreduce import Allreduce
from windlass.engine.gradients import FlatGroup, GradientAverager
from windlass.engine.keyed import KeyedSums
from windlass.engine.prefetch import prefetch
from windlass.engine.timing import StepTimer
from windlass.engine.watch import StopRequest
from windlass.engine.world import RankLost, crosses_hosts, named_loss, sum_over
from windlass.errors import DataError, NonFiniteError, StoppedError, WindlassError, WriteError
from windlass.objective import accuracy_of, loss_of
from windlass.optim.build import build_optimizer, set_learning_rate
from windlass.optim.rules import UpdateRule
from windlass.prepare import Prepared, allreduce_for
from windlass.progress import Agreed, Progress, Summary
from windlass.runs.metrics import MetricsWriter
from windlass.saving import Saver, restore
from windlass.state import (
    Tensors,
    average_buffers,
    gather_rank_tensors,
    give_weights,
    optimizer_tensors,
    seed_rank,
    step_seed,
)

Metrics = dict[str, Any]
"""Numbers by name; None where a network has no such number."""
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
        self,
        prepared: Prepared,
        *,
        emit: Emit,
        stop: StopRequest,
        note: Note,
        writer: MetricsWriter | None,
    ) -> None:
        self.prepared, self.world, self.config = prepared, prepared.world, prepared.job.config
        plan = prepared.plan
        self._emit, self._stop, self._note, self.writer = emit, stop, note, writer
        self._layout = MEMORY_FORMATS[str(plan.value("layout"))]
        self._hidden_s = 0.0
        self._build()
        self._update = self.config.update.for_batch(self.config.batch)
        self.optimizer = build_optimizer(self._update, [group.parameter for group in self.groups])
        self.progress = Progress()
        self._saver = Saver(prepared)
        self._timer = StepTimer()
        self._started = self._shown = time.monotonic()
        self._first_step = 0
        self._last: Metrics = {}
        self._failure: WindlassError | None = None  # met on this rank alone; all ranks hear of it when they agree
        self._status = "done"
        self._restore()

    def _build(self) -> None:
        """Makes the module that is trained, and what sums its gradients."""
        plan = self.prepared.plan
        self.module: nn.Module = self.prepared.module.to(memory_format=self._layout)  # type: ignore[call-overload]
        self.allreduce: Allreduce | KeyedSums = allreduce_for(self.world, plan)
        self.averager = GradientAverager(
            self.module,
            start_sum=self.allreduce.start,
            alone=self._is_alone(),
            bucket_bytes=int(plan.value("bucket_bytes")),
            overlap=bool(plan.value("overlap")),
            background=crosses_hosts(self.world) and not self.config.elastic.enabled,
        )

    @property
    def groups(self) -> list[FlatGroup]:
        """What the optimizer updates, with the network's parameters in it."""
        return self.averager.groups

    def run(self) -> Summary:
        """Trains to the last epoch.

        Raises:
            StoppedError: asked to stop; a checkpoint is written.
            NonFiniteError: a loss or gradient was NaN or infinite; the weights are those before that step.
            LostRankError: a rank died, and the others cannot go on without it.
        """
        while True:
            try:
                return self._go_on()
            except Exception as error:
                loss = named_loss(error, "an allreduce")
                if not isinstance(loss, RankLost):
                    raise
                self.recover(loss)

    def _go_on(self) -> Summary:
        """From where the run stands to its end."""
        while self._status == "done" and self.progress.epoch < self.config.epochs:
            self._train_epoch()
            self._finish_epoch()
        seconds = time.monotonic() - self._started
        return Summary(self._status, self.progress.step, seconds, dict(self._last))

    def step(self, batch: Batch) -> Agreed:
        """One step of synchronous SGD on this rank's shard; the update is left out when something is bad."""
        timer, progress = self._timer, self.progress
        # Not torch.manual_seed: it queues a call for a GPU, with its traceback, at a millisecond a step.
        torch.default_generator.manual_seed(step_seed(self.config.seed, step=progress.step, rank=self.world.rank))
        self.averager.begin()
        loss, correct = self._forward_backward(batch)
        with timer.part("backward"):
            finite = self._finish_backward()
        self._hidden_s = self.averager.under_way_s()
        with timer.part("communication"):
            self._note("the allreduce", progress.step + 1)
            agreed = self._agree(loss, correct, len(batch.labels), finite)
            self.averager.wait()
        if agreed.failed:
            self._raise_failure()
        if agreed.bad:
            self._report_bad(loss, finite)
        with timer.part("update"):
            set_learning_rate(self.optimizer, self.learning_rate)
            self._step_optimizer()
        progress.step += 1
        return agreed

    def _finish_backward(self) -> bool:
        """The backward pass is done; whether all gradients of this rank are finite."""
        return self.averager.finish_backward()

    def _step_optimizer(self) -> None:
        self.optimizer.step()

    def _is_alone(self) -> bool:
        """Whether no other rank's gradients will ever come, so that sums need no memory of their own."""
        return self.world.size == 1

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self._rate(self._update)

    def _rate(self, rule: UpdateRule) -> float:
        return self.config.schedule.rate(
            rule.base_lr,
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
            self._take(batch)
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
            lambda step: self.serve(server, epoch, step),
            steps,
            num_threads=threads,
            ahead=FETCH_AHEAD * threads if files else 0,
        )

    def serve(self, server: BatchServer, epoch: int, step: int) -> Batch:
        """This rank's samples of a step."""
        return server.fetch(epoch, step)

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
            if self.writer is not None:
                self.writer.write(row)
        except WriteError as error:
            self._failure = error

    def _forward_backward(self, batch: Batch) -> tuple[float, float]:
        """This rank's part of the batch's mean loss, and how many it got right; leaves gradients behind."""
        timer, number = self._timer, self.progress.step + 1
        parts = micro_batches(batch, int(self.prepared.plan.value("accumulate")))
        total = [0.0, 0.0]
        for index, part in enumerate(parts, start=1):
            if index < len(parts):
                self.averager.hold()
            with timer.part("forward"):
                self._note("forward", number)
                loss, correct = self._forward(part)
            with timer.part("backward"):
                self._note("backward", number)
                loss.backward()  # type: ignore[no-untyped-call]
                if index < len(parts):
                    self.averager.add()
            total = [total[0] + loss.item(), total[1] + correct]
        return total[0], total[1]

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """These samples' part of the batch's mean loss, and how many are right."""
        images = batch.images.contiguous(memory_format=self._layout)
        loss, correct = loss_of(self.module, self.module(images), images, batch.labels)
        return loss / batch.global_count, correct

    def _agree(self, loss: float, correct: float, seen: int, finite: bool) -> Agreed:
        sums = sum_over(
            self.world,
            [
                loss,
                correct,
                seen,
                self._stop.reason is not None,
                not (finite and math.isfinite(loss)),
                self._saver.due(self.progress.step + 1),
                self._failure is not None,
            ],
        )
        stop, bad, checkpoint, failed = (count > 0 for count in sums[3:])
        return Agreed(sums[0], sums[1], sums[2], stop, bad, checkpoint, failed)

    def _report_bad(self, loss: float, finite: bool) -> None:
        """Every rank learns which ranks are bad, and raises."""
        what = f"loss {loss}" if not math.isfinite(loss) else "" if finite else "a gradient that is not finite"
        found = [f"{text} on rank {rank}" for rank, text in enumerate(self.world.gather(what)) if text]
        raise NonFiniteError(
            f"step {self.progress.step + 1} (epoch {self.progress.epoch + 1}): {', '.join(found)}; no weight was "
            f"updated with it; {self._saver.last()}; a smaller --lr or a --warmup often helps"
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
            "accuracy": accuracy_of(self.module, agreed.correct, agreed.seen),
            "lr": lr,
            "images": int(agreed.seen),
            **times,
            **self._traffic(),
        }
        if progress.step % self.config.log_every == 0:
            self._write_row(row)
        if self.world.rank == 0 and time.monotonic() - self._shown > SHOW_S:
            self._shown = time.monotonic()
            self._emit({**row, "eta_s": self.remaining_s(), **self._running()})

    def _traffic(self) -> dict[str, float]:
        """What this step's sums moved: hidden seconds, and bytes as the schedules say and as counted."""
        if self.world.size == 1:
            return {}
        sent, planned = self.allreduce.new_bytes()
        return {"hidden_s": self._hidden_s, "sent_bytes": sent, "planned_bytes": planned}

    def _running(self) -> Metrics:
        """The epoch so far, for the eye."""
        progress = self.progress
        return progress.running() | {"accuracy": accuracy_of(self.module, progress.correct, progress.seen or math.nan)}

    def remaining_s(self) -> float:
        """Seconds to the end of the whole run, evaluations and checkpoints included, at the pace so far."""
        done = self.progress.step - self._first_step
        left = self.config.epochs * self.prepared.train.num_steps - self.progress.step
        return left * (time.monotonic() - self._started) / max(done, 1)

    def _finish_epoch(self) -> None:
        """Evaluates, records, saves; notes whether the run should end early."""
        progress = self.progress
        running = self._running()
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
        self._status = "early" if ends else self._status
        progress.epoch, progress.position = progress.epoch + 1, 0
        progress.begin_epoch()
        every = self.config.checkpoint.every_epochs
        last = ends or progress.epoch == self.config.epochs
        if not self.prepared.job.dry_run and (last or (every and progress.epoch % every == 0)):
            self._save(metrics)

    def _no_longer_improves(self, metrics: Metrics) -> bool:
        rules = self.config.early_stop
        value = metrics[rules.metric] * (1 if better_when_lower(rules.metric) else -1)
        waited = self.progress.epochs_since_best(value, min_delta=rules.min_delta)
        return bool(rules.patience) and waited >= rules.patience

    def evaluate(self) -> tuple[float, float | None]:
        """Mean loss and accuracy over the test samples, each counted once, whatever the number of ranks.

        Raises:
            StoppedError: asked to stop meanwhile; the checkpoint stands before the evaluation.
        """
        total = self._score_all()
        if total[3] > 0:
            self._stop_here()
        return total[0] / total[2], accuracy_of(self.module, total[1], total[2])

    def _score_all(self) -> list[float]:
        """Sums over the test samples: loss, right ones, samples; whether to stop, whether one has failed."""
        self._average_buffers()
        self.module.eval()
        server, total = self.prepared.test, [0.0, 0.0, 0.0, 0.0, 0.0]
        batches = self._fetch(server, range(server.num_steps))
        with torch.inference_mode():
            for number in range(server.num_steps):
                self._note("evaluation", number + 1)
                score = self._score(self._next(batches))
                self._note("the evaluation's sum", number + 1)
                parts = sum_over(self.world, [*score, self._stop.reason is not None, self._failure is not None])
                total = [a + b for a, b in zip(total, parts, strict=True)]
                if total[4] > 0:
                    self._raise_failure()
                if total[3] > 0:
                    break
        self.module.train()
        return total

    def _average_buffers(self) -> None:
        average_buffers(self.module, self.world)

    def _score(self, batch: Batch) -> tuple[float, float, float]:
        if len(batch.labels) == 0:
            return 0.0, 0.0, 0.0
        images = batch.images.contiguous(memory_format=self._layout)
        loss, correct = loss_of(self.module, self.module(images), images, batch.labels)
        return loss.item(), correct, len(batch.labels)

    def _stop_here(self) -> None:
        if self.prepared.job.dry_run:
            raise StoppedError("stopped on request during the dry run")
        name = self._save({})
        reasons = [reason for reason in self.world.gather(self._stop.reason) if reason]
        raise StoppedError(
            f"stopped on request ({reasons[0]}) after step {self.progress.step}, checkpoint {name} written: "
            f"go on with windlass train --out {self.prepared.job.folder} --resume"
        )

    def _save(self, metrics: Metrics) -> str:
        """Writes a checkpoint; every rank takes part, rank 0 writes."""
        self._note("checkpoint" if self.world.rank == 0 else "the checkpoint's end", self.progress.step)
        gathered = self._gather_state()
        failure: Exception | None = self._failure
        if self.world.rank == 0 and failure is None:
            try:
                weights, state = gathered()
                row = self._saver.write(self.progress, weights=weights, state=state, metrics=metrics)
                self._write_row(row)
                self._emit(row)
            except Exception as error:
                failure = error
        failure = self.world.broadcast(failure)
        if failure is not None:
            raise failure
        self._saver.saved()
        return f"step-{self.progress.step:08d}"

    def _gather_state(self) -> Callable[[], tuple[Tensors, Tensors]]:
        """Gathers what a checkpoint needs of other ranks; what it returns gives weights and state, on rank 0."""
        ranks = gather_rank_tensors(self.module, self.world)
        return lambda: (self.module.state_dict(), optimizer_tensors(self.optimizer, self.groups) | ranks)

    def recover(self, loss: RankLost) -> None:
        """A rank was lost, and this trainer cannot go on without it: raises `loss` (`recovery` goes on)."""
        raise loss

    def tell_losses(self) -> None:
        """Says who was lost; nobody in a run that ends with a loss."""

    def _take(self, batch: Batch) -> None:
        """Told of the samples of every step before it begins."""

    def _restore(self) -> None:
        checkpoint, world = self.prepared.checkpoint, self.world
        if checkpoint is None:
            seed_rank(self.config.seed, step=0, rank=world.rank)
            give_weights([group.parameter for group in self.groups], world)
            return
        self.progress = restore(
            checkpoint, self.module, self.optimizer, self.groups, world=world, seed=self.config.seed
        )
        self._first_step = self.progress.step
