"""The head of a network, into which a batch is handed over: which ops it has, and what crosses into it.

Krizhevsky 2014 ("One weird trick for parallelizing convolutional neural networks", section 4): the fully connected
layers, divided among the workers, behind convolutions of which each worker has its own samples.
"""

from __future__ import annotations

from collections.abc import Sequence

from windlass.plan.layout import Layout, Split
from windlass.plan.placement import Op


def head_of(ops: Sequence[Op], before: str) -> frozenset[str]:
    """The op `before` and all that is computed from it."""
    head = {before}
    for op in ops:
        if head.intersection(op.inputs):
            head.add(op.name)
    return frozenset(head)


def crossing_into(ops: Sequence[Op], head: frozenset[str]) -> tuple[tuple[str, str], ...]:
    """Tensors that come into the head from outside: their op and the op that reads them."""
    return tuple((name, op.name) for op in ops if op.name in head for name in op.inputs if name not in head)


def handover_axis(source: Layout, need: Layout) -> int | None:
    """The axis along which samples are cut before the head and not in it; None if it is not one alone."""
    changed = [axis for axis, parts in enumerate(zip(source, need, strict=True)) if parts[0] != parts[1]]
    if len(changed) == 1 and source[changed[0]] == Split("batch"):
        return changed[0]
    return None
