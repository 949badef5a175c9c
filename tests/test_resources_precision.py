"""The predicted memory of training under a recipe, against PyTorch's own record of a step."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from windlass.config import config_from_layers
from windlass.engine.watch import StopRequest
from windlass.engine.world import LocalWorld
from windlass.job import Job
from windlass.plan.plan import Choice
from windlass.prepare import Prepared, prepare
from windlass.resources import needed_bytes
from windlass.rounded import RoundedTrainer

RESNET = {"network": "resnet18", "data": {"source": "synthetic:3x32x32:10:200"}, "update": {"lr": 0.01}}


def prepared_for(folder: Path, **options: Any) -> Prepared:
    """A run on one rank, with contiguous tensors as networks are captured."""
    config = config_from_layers([{"tune": "off", "number_format": "fixed16", **RESNET, **options}])
    prepared = prepare(Job(config, str(folder)), LocalWorld())
    levers = {**prepared.plan.levers, "layout": Choice("contiguous", "a test")}
    prepared.plan = dataclasses.replace(prepared.plan, levers=levers)
    return prepared


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_predicted_memory_is_what_a_step_holds(tmp_path: Path, accumulate: int) -> None:
    prepared = prepared_for(tmp_path, batch=32, accumulate=accumulate)
    predicted = needed_bytes(prepared)[0]
    trainer = RoundedTrainer(prepared, emit=lambda event: None, stop=StopRequest(), note=lambda a, b: None, writer=None)
    trainer.module.train()
    trainer.step(trainer.prepared.train.fetch(0, 0))
    batch = trainer.prepared.train.fetch(0, 1)
    held = [batch.images, batch.labels, *trainer.module.buffers()]
    held += [entry.codes for entry in trainer.lowered.stored]
    held += [group.gradient for group in trainer.averager.groups]
    held += [x for state in trainer.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    before = sum(tensor.untyped_storage().nbytes() for tensor in held)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        trainer.step(batch)
    results: Any = record.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    peak = before + max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    assert predicted == pytest.approx(peak, rel=0.05)
