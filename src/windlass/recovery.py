"""A trainer whose ranks may die: what an elastic run does beyond the loop.

Any operation between the ranks may raise `RankLost`.  The ranks that live then meet (`engine.elastic`), go to the
furthest place that one of them has reached (`engine.elastic_state`), and the loop begins again there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from windlass.data.serving import Batch
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
from windlass.engine.watch import JOINING, StopRequest
from windlass.engine.world import RankLost, named_loss
from windlass.errors import LostRankError, WriteError
from windlass.loop import Emit, Note, Trainer
from windlass.prepare import Prepared, allreduce_for
from windlass.progress import Agreed, Progress, Summary
from windlass.runs.metrics import MetricsWriter
from windlass.state import seed_rank

KEPT_ROWS = 4
"""Rows of metrics that every rank remembers for the one that writes them."""


class ElasticTrainer(Trainer):
    """Trains one prepared run on one rank of a crew.

    Args:
        prepared: the run.
        emit, stop, note, writer: see `Trainer`.
        crew: the ranks, of which some may be lost.
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
        crew: Crew,
        reopen: Callable[[Progress], MetricsWriter],
    ) -> None:
        self._crew, self._reopen = crew, reopen
        self._owed: dict[str, float] | None = None  # metrics of a checkpoint that is begun and not ended
        self._begun = 0  # samples of the step under way
        self._rows: deque[dict[str, Any]] = deque(maxlen=KEPT_ROWS)
        self._lost_at, self._repeated, self._is_new = 0, 0, False
        super().__init__(prepared, emit=emit, stop=stop, note=note, writer=writer)
        self._mark = BufferMark(self.module)
        self._samples = self._sample_log()

    def recover(self, loss: RankLost) -> None:
        """Goes on with the ranks that live, from the furthest place that one of them has reached.

        Raises:
            LostRankError: they cannot go on.
        """
        if not self._crew.survives:
            raise loss
        while True:
            self._note("the recovery", self.progress.step)
            self._crew.recover()
            self.averager.abandon()
            if self.rejoin():
                return

    def rejoin(self) -> bool:
        """Takes this rank's new seat and catches up with the others; False when another rank was lost meanwhile."""
        assert self._crew.world is not None
        self.world = self._crew.world
        self.prepared.seat(self.world)
        self._note(JOINING, self.progress.step)
        try:
            self.allreduce = allreduce_for(self.world, self.prepared.plan)
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

    def step(self, batch: Batch) -> Agreed:
        """One step, of which nothing stays where it does not come to its end."""
        self._mark.mark()
        self._begun = batch.global_count
        agreed = super().step(batch)
        self._settle()
        return agreed

    def tell_losses(self) -> None:
        """Once the ranks have gone on: who died, how soon that was noticed, how soon all went on."""
        if not self._crew.untold:
            return
        row = self._crew.tell(step=self._lost_at)
        row |= {"step": self._lost_at, "epoch": self.progress.epoch, "repeated": self._repeated}
        self._write_row(row)
        self._emit(row)

    def evaluate(self) -> tuple[float, float | None]:
        """See `Trainer.evaluate`."""
        found = super().evaluate()
        self.tell_losses()
        return found

    def _score_all(self) -> list[float]:
        self._mark.mark()
        total = super()._score_all()
        self._settle()
        return total

    def _settle(self) -> None:
        """What was begun is done: nothing of it is taken back any more."""
        self._begun = 0
        self._mark.forget()

    def _is_alone(self) -> bool:
        return False  # a sum keeps its own memory: other ranks may come

    def _go_on(self) -> Summary:
        if self._owed is not None:
            self._save(self._owed)
        return super()._go_on()

    def _save(self, metrics: dict[str, Any]) -> str:
        self._owed = metrics
        name = super()._save(metrics)
        self._owed = None
        return name

    def _write_row(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        super()._write_row(row)

    def _record(self, agreed: Agreed, lr: float) -> None:
        super()._record(agreed, lr)
        self.tell_losses()

    def _traffic(self) -> dict[str, float]:
        return super()._traffic() | {"world": self._crew.generation}

    def _finish_epoch(self) -> None:
        self._count_samples()
        super()._finish_epoch()

    def _meet(self) -> Meeting:
        """Brings this rank to the furthest place."""
        position = None if self._is_new else (self.progress.epoch, self.progress.position)
        place = Place(position, self._owed, self._status, self._begun, tuple(self._rows))
        meeting = meet([Place(*other) for other in self.world.gather(tuple(place))])
        if meeting is None:
            raise LostRankError("every rank that knew the weights has died")
        is_there = position == meeting.position
        if is_there:
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
        try:
            self.writer = self._reopen(self.progress)
            for row in missing_rows(self.writer.rows_at_start, rows):
                self.writer.write(row)
        except WriteError as error:
            self._failure = error

    def _count_samples(self) -> None:
        """Every sample counts once in an epoch, whoever died; if that should fail, it is said."""
        missing = self.prepared.train.num_samples - int(self.progress.seen)
        if missing:
            message = f"epoch {self.progress.epoch + 1}: {missing} samples did not count once"
            self._emit({"kind": "warning", "message": message})

    def _sample_log(self) -> SampleLog | None:
        if not self.config.elastic.record_samples or self.prepared.job.dry_run:
            return None
        return SampleLog(Path(self.prepared.job.folder), rank=self._crew.me.rank)

    def _take(self, batch: Batch) -> None:
        if self._samples is not None:
            progress = self.progress
            self._samples.write(
                step=progress.step + 1, epoch=progress.epoch, generation=self._crew.generation, ids=batch.ids
            )
