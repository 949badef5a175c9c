"""Sums move while the main thread does something else, and never under its hands."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from windlass.engine.gradients import GradientAverager
from windlass.engine.mover import Mover

DEADLINE_S = 20.0


def eventually(condition: Any) -> bool:
    end = time.monotonic() + DEADLINE_S
    while not condition() and time.monotonic() < end:
        time.sleep(1e-3)
    return bool(condition())


def test_it_moves_from_begin_to_end_and_not_while_the_lock_is_held() -> None:
    moved: list[int] = []
    mover = Mover(lambda: moved.append(threading.get_ident()))
    assert not moved
    mover.begin()
    assert eventually(lambda: len(moved) > 2)
    assert threading.get_ident() not in moved
    with mover.lock:
        before = len(moved)
        time.sleep(0.02)
        assert len(moved) == before
    mover.end()
    before = len(moved)
    time.sleep(0.02)
    assert len(moved) == before
    mover.begin()
    assert eventually(lambda: len(moved) > before)
    mover.end()


def test_what_fails_in_the_thread_is_left_to_the_main_thread() -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(0)
        raise RuntimeError("a rank has died")

    mover = Mover(fail)
    mover.begin()
    assert eventually(lambda: calls)
    time.sleep(0.02)
    assert len(calls) == 1
    mover.end()


class SlowSum:
    """Complete after ten tests, whoever makes them."""

    def __init__(self, send: Any, receive: Any) -> None:
        self.send, self.receive, self.tests = send, receive, 0
        self.testers: set[int] = set()

    def test(self) -> bool:
        self.tests += 1
        self.testers.add(threading.get_ident())
        if self.tests == 10:
            self.receive[...] = 2 * self.send
        return self.tests >= 10

    def wait(self) -> None:
        while not self.test():
            pass


def test_sums_end_during_a_backward_pass_in_which_nobody_asks() -> None:
    sums: list[SlowSum] = []

    def start(send: Any, receive: Any) -> SlowSum:
        sums.append(SlowSum(send, receive))
        return sums[-1]

    module = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    averager = GradientAverager(module, start_sum=start, bucket_bytes=1, overlap=True, alone=False, background=True)
    x = torch.ones(1, 4, requires_grad=True)
    done = []
    x.register_hook(lambda gradient: done.append(eventually(lambda: bool(sums) and sums[0].tests >= 10)))  # type: ignore[no-untyped-call]
    for _ in range(2):
        sums.clear()
        averager.begin()
        module(x).sum().backward()
        assert averager.finish_backward()
        averager.wait()
        assert done.pop() and sums[0].testers - {threading.get_ident()}
        for group in averager.groups:
            assert torch.equal(group.gradient, 2 * group.own)
