"""What a real step takes of PyTorch's allocator."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile


def allocated_peak(action: Callable[[], object]) -> int:
    """Most bytes that the allocator had handed out beyond those before, from its own record of events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        action()
    results: Any = record.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    assert len(events) > 50
    return int(max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))))


def step_peak(module: nn.Module, shape: tuple[int, ...], num_classes: int) -> int:
    """Most bytes of tensors alive in a step: forward, cross-entropy of every output, backward."""
    x, y = torch.randn(shape), torch.randint(0, num_classes, shape[:1])
    held = sum(t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers(), x, y))

    def step() -> None:
        outputs = module(x)
        loss = torch.zeros(())
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            loss = loss + functional.cross_entropy(output, y)
        del outputs, output
        loss.backward()  # type: ignore[no-untyped-call]

    return held + allocated_peak(step)
