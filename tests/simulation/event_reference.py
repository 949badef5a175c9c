"""The model of `simulation.collective_time` once more, as a queue of events over the programs: slow and obvious."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from windlass.plan.collective import Receive, Schedule, Send

Costs = Callable[[int, int, int], tuple[int, int, int, int]]
"""Source, receiver, and the number among their messages -> hold, alpha, adding, overhead."""


@dataclass
class _Rank:
    """Where one rank is."""

    step: int = -1
    began: dict[int, int] = field(default_factory=dict)
    unsent: int = 0
    to_receive: dict[int, int] = field(default_factory=dict)
    inbox: dict[int, list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))
    port_busy: bool = False
    waiting: tuple[int, int, int] | None = None  # step, overhead and adding of a message that is there too early


class Events:
    """Runs a schedule."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.programs = [schedule.steps(rank) for rank in range(schedule.size)]
        self.costs = costs
        self.ranks = [_Rank() for _ in self.programs]
        self.queue: list[tuple[int, int, int, Callable[[int], None]]] = []
        self.number, self.last = 0, 0
        self.sent: dict[tuple[int, int], int] = defaultdict(int)
        self.wanted: dict[tuple[int, int], deque[tuple[int, bool]]] = defaultdict(deque)
        for rank, program in enumerate(self.programs):
            for index, step in enumerate(program):
                received = [message for message in step if isinstance(message, Receive)]
                self.ranks[rank].to_receive[index] = len(received)
                for message in received:
                    self.wanted[message.source, rank].append((index, message.op != "copy"))

    def run(self) -> int:
        for rank in range(len(self.programs)):
            self._begin(rank, 0)
        while self.queue:
            now, _, _, action = heapq.heappop(self.queue)
            action(now)
        assert all(state.step == len(self.programs[rank]) for rank, state in enumerate(self.ranks)), "deadlock"
        return self.last

    def _at(self, time: int, action: Callable[[int], None], late: bool = False) -> None:
        self.number += 1
        heapq.heappush(self.queue, (time, late, self.number, action))

    def _begin(self, rank: int, now: int) -> None:
        state = self.ranks[rank]
        state.step += 1
        self.last = max(self.last, now)
        if state.step == len(self.programs[rank]):
            return
        state.began[state.step] = now
        sends = [message for message in self.programs[rank][state.step] if isinstance(message, Send)]
        state.unsent, free = len(sends), now
        for order, send in enumerate(sends):
            hold, alpha, *_ = self.costs(rank, send.to, self.sent[rank, send.to])
            step, _ = self.wanted[rank, send.to][self.sent[rank, send.to]]
            row = (rank, order, self.sent[rank, send.to])
            self._at(free + alpha, lambda at, to=send.to, step=step, row=row: self._arrive(to, step, row, at))  # type: ignore[misc]
            self.sent[rank, send.to] += 1
            free += hold
            self._at(free, lambda at: self._left(rank, at))
        if state.waiting is not None and state.waiting[0] == state.step:
            _, overhead, adding = state.waiting
            state.waiting = None
            self._at(now + overhead + adding, lambda at: self._received(rank, at))

    def _arrive(self, rank: int, step: int, row: tuple[int, int, int], now: int) -> None:
        self.ranks[rank].inbox[step].append(row)
        self._at(now, lambda at: self._take(rank, at), late=True)

    def _take(self, rank: int, now: int) -> None:
        state = self.ranks[rank]
        step = next((step for step, number in sorted(state.to_receive.items()) if number), None)
        if state.port_busy or step is None or not state.inbox[step]:
            return
        source, _, number = row = min(state.inbox[step])
        state.inbox[step].remove(row)
        state.port_busy = True
        hold, _, adding, overhead = self.costs(source, rank, number)
        self._at(now + hold, lambda at: self._there(rank, step, overhead, adding, at))

    def _there(self, rank: int, step: int, overhead: int, adding: int, now: int) -> None:
        state = self.ranks[rank]
        if step in state.began:
            end = max(now, state.began[step] + overhead) + adding
            self._at(end, lambda at: self._received(rank, at))
        else:
            state.waiting = (step, overhead, adding)

    def _received(self, rank: int, now: int) -> None:
        state = self.ranks[rank]
        state.port_busy = False
        state.to_receive[state.step] -= 1
        self._at(now, lambda at: self._take(rank, at), late=True)
        self._end(rank, now)

    def _left(self, rank: int, now: int) -> None:
        self.ranks[rank].unsent -= 1
        self._end(rank, now)

    def _end(self, rank: int, now: int) -> None:
        state = self.ranks[rank]
        if not state.unsent and not state.to_receive[state.step]:
            self._begin(rank, now)
