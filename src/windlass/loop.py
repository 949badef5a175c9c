"""Synchronous data-parallel SGD on one rank: the loop that every run goes through.

One step: take this rank's shard of the global batch, run forward and backward, sum the gradients over the
ranks (during the backward pass where the plan says so), agree, update.  ``Agree`` is one small sum of seven
numbers that carries the batch's loss and accuracy, and whether any rank was asked to stop, saw a number that
is not finite, or wants a checkpoint: all ranks take the same branch in the same step, so none is left waiting.

In an elastic run (`engine.elastic`) any operation between the ranks may raise `RankLost`.  The ranks then meet,
go to the furthest place that one of them has reached (`engine.elastic_state`), and the loop begins again there.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from windlass.config import better_when_lower
from windlass.data.serving import Batch, BatchServer
from windlass.engine.allreduce import Allreduce
from windlass.engine.elastic import Crew
from windlass.engine.elastic_state import (
    BufferMark,
    Meeting,
    Place,
    SampleLog,
    meet,
    missing_rows,
    pack_state,
    unpack_state,
)
from windlass.engine.gradients import GradientAverager
from windlass.engine.prefetch import prefetch
from windlass.engine.timing import StepTimer
from windlass.engine.watch import JOINING, StopRequest
from windlass.engine.world import RankLost, named_loss, sum_array, sum_over
from windlass.errors import DataError, LostRankError, NonFiniteError, StoppedError, WindlassError, WriteError
from windlass.objective import main_output, objective
from windlass.optim.build import build_optimizer, set_learning_rate
from windlass.plan.pick import AUTO
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
from windlass.tuning.cluster import tuned_chooser

Emit = Callable[[dict[str, Any]], None]
Note = Callable[[str, int], None]
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
"""PyTorch's name for each value of the plan's lever ``layout``."""
SHOW_S = 0.1
"""Seconds between two events of progress."""
FETCH_AHEAD = 4
"""Batches under way per data thread, when images are files."""
KEPT_ROWS = 4
"""Rows of metrics that every rank of an elastic run remembers for the one that writes them."""


class Trainer:
    """Trains one prepared run on one rank.

    Args:
        prepared: the run.
        emit: takes events for a person; only rank 0's are shown.
        stop: asked from outside to stop.
        note: told what is being done, for the watchdog.
        writer: takes rows of metrics on rank 0; None elsewhere and in a dry run.
        crew: the ranks of an elastic run.
        reopen: makes a writer where the one who had it has died.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        emit: Emit,
        stop: StopRequest,
        note: Note,
        writer: MetricsWriter | None,
        crew: Crew | None = None,
        reopen: Callable[[Progress], MetricsWriter] | None = None,
    ) -> None:
        self.prepared, self.world, self.config = prepared, prepared.world, prepared.job.config
        plan = prepared.plan
        self._emit, self._stop, self._note, self.writer = emit, stop, note, writer
        self._crew, self._reopen = crew, reopen
        self._layout = MEMORY_FORMATS[str(plan.value("layout"))]
        self.module = prepared.module.to(memory_format=self._layout)  # type: ignore[call-overload]
        self._hidden_s = 0.0
        self._sent = (0, 0)
        self.allreduce = self._allreduce()
        self.averager = GradientAverager(
            self.module,
            start_sum=self.allreduce.start,
            alone=self.world.size == 1 and crew is None,
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
        self._status = "done"
        self._owed: dict[str, float] | None = None  # metrics of a checkpoint that is begun and not ended
        self._begun = 0  # samples of the step under way
        self._rows: deque[dict[str, Any]] = deque(maxlen=KEPT_ROWS)
        self._lost_at, self._repeated, self._is_new = 0, 0, False
        self._mark = BufferMark(self.module) if crew is not None else None
        self._samples = self._sample_log()
        self._restore()

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
        if self._owed is not None:
            self._save(self._owed)
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
        if self._mark is not None:
            self._mark.mark()
        self._begun = batch.global_count
        self.averager.begin()
        with timer.part("forward"):
            self._note("forward", progress.step + 1)
            loss, correct = self._forward(batch)
        with timer.part("backward"):
            self._note("backward", progress.step + 1)
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]
            finite = self.averager.finish_backward()
        self._hidden_s = self.averager.under_way_s()
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
        self._settle()
        return agreed

    def _allreduce(self) -> Allreduce:
        plan = self.prepared.plan
        lever, fixed_order = str(plan.value("allreduce")), bool(plan.value("fixed_order"))
        choose = tuned_chooser(self.world) if lever == AUTO and not fixed_order else None
        return Allreduce(self.world, lever, fixed_order=fixed_order, choose=choose)

    def _settle(self) -> None:
        """What was begun is done: nothing of it is taken back any more."""
        self._begun = 0
        if self._mark is not None:
            self._mark.forget()

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
            self._log_samples(batch)
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
        self._rows.append(row)
        try:
            if self.writer is not None:
                self.writer.write(row)
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
            **self._traffic(),
        }
        if self._crew is not None:
            row["world"] = self._crew.generation
        if progress.step % self.config.log_every == 0:
            self._write_row(row)
        if self.world.rank == 0 and time.monotonic() - self._shown > SHOW_S:
            self._shown = time.monotonic()
            self._emit({**row, "eta_s": self.remaining_s(), **self.running()})
        self.tell_losses()

    def _traffic(self) -> dict[str, float]:
        """What this step's sums moved: hidden seconds, and bytes as the schedules say and as counted."""
        if self.world.size == 1:
            return {}
        counted, planned = self.allreduce.counted_bytes, self.allreduce.traffic.predicted_bytes
        row = {
            "hidden_s": self._hidden_s,
            "sent_bytes": counted - self._sent[0],
            "planned_bytes": planned - self._sent[1],
        }
        self._sent = (counted, planned)
        return row

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

    def _finish_epoch(self) -> None:
        """Evaluates, records, saves; notes whether the run should end early."""
        progress = self.progress
        self._count_samples()
        running = self.running() if progress.seen else dict.fromkeys(
            ("loss", "accuracy", "images_per_s", "data_share"), math.nan)  # fmt: skip
        test_loss, test_accuracy = self.evaluate()
        self.tell_losses()
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
        if self._mark is not None:
            self._mark.mark()
        average_buffers(self.module, self.world)
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
        self._settle()
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
        self._owed = metrics
        self._note("checkpoint" if self.world.rank == 0 else "the checkpoint's end", self.progress.step)
        ranks = gather_rank_tensors(self.module, self.world)
        failure: Exception | None = self._failure
        if self.world.rank == 0 and failure is None:
            try:
                self._write(metrics, ranks)
            except Exception as error:
                failure = error
        failure = self.world.broadcast(failure)
        self._owed = None
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

    def recover(self, loss: RankLost) -> None:
        """Goes on with the ranks that live, from the furthest place that one of them has reached.

        Raises:
            LostRankError: they cannot go on.
        """
        if self._crew is None or not self._crew.survives:
            raise loss
        while True:
            self._note("the recovery", self.progress.step)
            self._crew.recover()
            self.averager.abandon()
            if self.rejoin():
                return

    def rejoin(self) -> bool:
        """Takes this rank's new seat and catches up with the others; False when another rank was lost meanwhile."""
        assert self._crew is not None and self._crew.world is not None
        self.world = self._crew.world
        self.prepared.seat(self.world)
        self._note(JOINING, self.progress.step)
        try:
            self.allreduce, self._sent = self._allreduce(), (0, 0)
            self.averager.use(self.allreduce.start)
            meeting = self._meet()
        except Exception as error:
            if isinstance(named_loss(error, "the ranks' meeting"), RankLost):
                return False
            raise
        seed_rank(self.config.seed, step=self.progress.step, rank=self.world.rank)
        self._lost_at, self._repeated = self.progress.step, meeting.repeated
        if self.world.rank == 0 and self.writer is None:
            self._take_over(meeting.rows)
        return True

    def rehearse(self) -> None:
        """What a spare does before it waits: a step for nothing, so that none of its own is its first."""
        self.module.train()
        self.step(self.prepared.train.fetch(0, 0))
        self.progress, self._is_new = Progress(), True

    def _meet(self) -> Meeting:
        """Brings this rank to the furthest place."""
        position = None if self._is_new else (self.progress.epoch, self.progress.position)
        place = Place(position, self._owed, self._status, self._begun, tuple(self._rows))
        meeting = meet([Place(*other) for other in self.world.gather(tuple(place))])
        if meeting is None:
            raise LostRankError("every rank that knew the weights has died")
        is_there = position == meeting.position
        if is_there and self._mark is not None:
            self._mark.roll_back()
        if not meeting.everyone_there:
            state = self._pack() if self.world.rank == meeting.source else None
            state = self.world.broadcast(state, root=meeting.source)
            if not is_there:
                self._unpack(state)
        self._settle()
        self._owed, self._status = meeting.owed, meeting.status
        return meeting

    def _pack(self) -> dict[str, Any]:
        state = pack_state(self.module, self.optimizer, self.averager.groups)
        return state | {"progress": dict(self.progress.__dict__), "last": self._last}

    def _unpack(self, state: dict[str, Any]) -> None:
        unpack_state(state, self.module, self.optimizer, self.averager.groups, buffers=self._is_new)
        self.progress, self._last = Progress(**state["progress"]), state["last"]
        if self._is_new:
            self._first_step, self._is_new = self.progress.step, False

    def _take_over(self, rows: tuple[dict[str, Any], ...]) -> None:
        """This rank writes from now on, first what the one before it did not get to write."""
        if self._reopen is None:
            return
        try:
            self.writer = self._reopen(self.progress)
            for row in missing_rows(self.writer.rows_at_start, rows):
                self.writer.write(row)
        except WriteError as error:
            self._failure = error

    def tell_losses(self) -> None:
        """Once the ranks have gone on: who died, how soon that was noticed, how soon all went on."""
        if self._crew is None or not self._crew.untold:
            return
        row = self._crew.tell(step=self._lost_at)
        row |= {"step": self._lost_at, "epoch": self.progress.epoch, "repeated": self._repeated}
        self._write_row(row)
        self._emit(row)

    def _count_samples(self) -> None:
        """Every sample counts once in an epoch, whoever died; if that should fail, it is said."""
        missing = self.prepared.train.num_samples - int(self.progress.seen)
        if self._crew is not None and missing:
            message = f"epoch {self.progress.epoch + 1}: {missing} samples did not count once"
            self._emit({"kind": "warning", "message": message})

    def _sample_log(self) -> SampleLog | None:
        if self._crew is None or not self.config.elastic.record_samples or self.prepared.job.dry_run:
            return None
        return SampleLog(Path(self.prepared.job.folder), rank=self._crew.me.rank)

    def _log_samples(self, batch: Batch) -> None:
        if self._samples is not None and self._crew is not None:
            progress = self.progress
            self._samples.write(
                step=progress.step + 1, epoch=progress.epoch, generation=self._crew.generation, ids=batch.ids
            )

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
