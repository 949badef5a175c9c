"""Fetches batches before they are asked for, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(fetch: Callable[[int], T], steps: range, *, num_threads: int, ahead: int) -> Iterator[T]:
    """Yields ``fetch(step)`` for every step in order, up to `ahead` of them under way in `num_threads` threads.

    With `ahead` 0 each is fetched when it is asked for, in the caller's thread: best for small images, whose
    hand-over would cost more than the work.  An error in a thread is raised where its batch is due.
    """
    if ahead == 0:
        yield from map(fetch, steps)
        return
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="windlass-data")
    waiting: deque[Future[T]] = deque()
    try:
        upcoming = iter(steps)
        waiting.extend(pool.submit(fetch, step) for _, step in zip(range(ahead), upcoming, strict=False))
        for step in upcoming:
            yield waiting.popleft().result()
            waiting.append(pool.submit(fetch, step))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
