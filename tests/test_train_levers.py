"""Micro-batches, recomputed blocks, and what the configuration says of them and of placements."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from conftest import Windlass, losses_of
from windlass.config import config_from_layers
from windlass.data.micro import micro_batches
from windlass.data.serving import Batch
from windlass.engine.watch import StopRequest
from windlass.engine.world import LocalWorld
from windlass.errors import ConfigError
from windlass.job import Job
from windlass.loop import Trainer
from windlass.plan.plan import Choice
from windlass.prepare import prepare
from windlass.resources import worker_bytes


def trainer_for(folder: Path, **options: Any) -> Trainer:
    """A trainer on one rank; networks are captured, and here also trained, with contiguous tensors."""
    config = config_from_layers([{"tune": "off", **options}])
    prepared = prepare(Job(config, str(folder)), LocalWorld())
    levers = {**prepared.plan.levers, "layout": Choice("contiguous", "a test")}
    prepared.plan = dataclasses.replace(prepared.plan, levers=levers)
    return Trainer(prepared, emit=lambda event: None, stop=StopRequest(), note=lambda a, b: None, writer=None)


def run_steps(trainer: Trainer, count: int) -> list[float]:
    trainer.module.train()
    return [trainer.step(trainer.prepared.train.fetch(0, step)).loss for step in range(count)]


@pytest.mark.parametrize("parts", [2, 5, 16])
def test_micro_batches_give_the_losses_of_one_batch(tmp_path: Path, parts: int) -> None:
    """The same products, added in another order: float32 eps of 6e-8, a few hundred terms, five steps."""
    plain = run_steps(trainer_for(tmp_path / "a", batch=16), 5)
    pieces = run_steps(trainer_for(tmp_path / "b", batch=16, accumulate=parts), 5)
    assert pieces == pytest.approx(plain, rel=1e-5) and pieces != plain


def test_micro_batches_cover_the_samples_and_none_is_empty() -> None:
    labels = torch.arange(5)
    batch = Batch(labels.float(), labels, 20, labels.numpy())
    for parts in (1, 2, 4, 9):
        found = micro_batches(batch, parts)
        assert len(found) == min(parts, 5) and all(len(part.labels) for part in found)
        assert torch.cat([part.labels for part in found]).equal(labels)
        assert all(part.global_count == 20 and part.ids.tolist() == part.labels.tolist() for part in found)
    assert micro_batches(Batch(labels[:0], labels[:0], 20, labels[:0].numpy()), 3) == []


RESNET = {"network": "resnet18", "data": {"source": "synthetic:3x32x32:10:200"}, "update": {"lr": 0.01}}


def test_recomputed_blocks_give_the_same_bits(tmp_path: Path) -> None:
    found = [trainer_for(tmp_path / value, batch=8, recompute=value, **RESNET) for value in ("none", "blocks")]
    assert run_steps(found[0], 3) == run_steps(found[1], 3)
    first, second = (trainer.module.state_dict() for trainer in found)
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    assert first["layer1.0.bn1.num_batches_tracked"] == 3


@pytest.mark.parametrize(("accumulate", "recompute"), [(1, "none"), (4, "none"), (1, "blocks"), (2, "blocks")])
def test_the_predicted_memory_is_what_a_step_holds(tmp_path: Path, accumulate: int, recompute: str) -> None:
    """Within 5 %, of everything but the optimizer's state, which a first step makes; and the plan says why."""
    trainer = trainer_for(tmp_path, batch=32, accumulate=accumulate, recompute=recompute, **RESNET)
    trainer.module.train()
    trainer.step(trainer.prepared.train.fetch(0, 0))
    batch = trainer.prepared.train.fetch(0, 1)
    module, groups = trainer.module, trainer.averager.groups
    held = [batch.images, batch.labels, *module.buffers()]
    held += [tensor for group in groups for tensor in (group.parameter, group.gradient)]
    momentum = [tensor for group in groups for tensor in trainer.optimizer.state[group.parameter].values()]
    before = sum(tensor.untyped_storage().nbytes() for tensor in held + momentum)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        trainer.averager.begin()
        trainer._forward_backward(batch)
    results: Any = record.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    peak = before + max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    graph, plan = trainer.prepared.graph, trainer.prepared.plan
    predicted = worker_bytes(graph, update_rule="momentum", world_size=1, accumulate=accumulate)
    assert predicted == pytest.approx(peak, rel=0.05)
    for lever, value in (("accumulate", accumulate), ("recompute", recompute)):
        asked = value not in (1, "none")
        assert ("MiB instead of" in plan.levers[lever].reason) == asked


@pytest.mark.mpi
@pytest.mark.slow
def test_two_workers_in_micro_batches_give_the_losses_of_one(windlass: Windlass, tmp_path: Path) -> None:
    """Tolerance as above; the plan's reason and the memory line of a dry run say what it changes."""
    out = [tmp_path / name for name in ("one", "two")]
    every = ("--quiet", "--epochs", "1", "--set", "data.augment=[]")
    assert windlass("train", "lenet5", "--out", str(out[0]), *every).code == 0
    assert windlass("train", "lenet5", "--out", str(out[1]), "--workers", "2", "--accumulate", "3", *every).code == 0
    assert losses_of(out[1]) == pytest.approx(losses_of(out[0]), rel=1e-4)
    dry = windlass("train", "resnet18", "--data", "synthetic:3x32x32:10:64", "--recompute", "blocks", "--dry-run")
    assert dry.code == 0 and "recompute blocks: asked for: D " in dry.out and "% more multiply-adds" in dry.out


REFUSED = [
    ({"accumulate": 0}, "accumulate: 0 is out of range; it takes a whole number from 1 to 1024"),
    ({"accumulate": 40, "workers": 2}, "accumulate: a batch of 64 on 2 worker(s) has no 40 micro-batches a worker"),
    ({"recompute": "all"}, "recompute: 'all' is not a value of it; choose from: none, blocks"),
    ({"parallel": "modle"}, "parallel: 'modle' is not a value of it (unknown placement 'modle'; did you mean 'model'?"),
    ({"mesh": "2x2"}, "mesh: '2x2' is not a value of it (a mesh is written as node:2,device:4"),
    ({"mesh": "node:2,device:2", "workers": 2}, "mesh: node:2,device:2 has 4 workers, the run 2"),
    ({"head_batch": 32}, "head_batch: parallel data updates all weights at once; hybrid:b and hybrid:c update"),
    ({"head_batch": 32, "parallel": "hybrid:c"}, "head_batch: one worker hands nothing over in rounds"),
    ({"head_batch": 48, "parallel": "hybrid:c", "workers": 2}, "head_batch: 48 does not divide the batch of 64"),
    ({"head_batch": 128, "parallel": "hybrid:b", "workers": 2}, "head_batch: 128 does not divide the batch of 64"),
    ({"parallel": "model", "recompute": "blocks"}, "recompute: is there for parallel data, not for parallel model"),
    ({"parallel": "tiles", "accumulate": 2}, "accumulate: is there for parallel data, not for parallel tiles"),
    ({"parallel": "hybrid", "elastic": {"enabled": True}}, "elastic: the workers of parallel hybrid hold parts that"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_layers([given])
    assert message in str(caught.value)


def test_what_can_be_is_not() -> None:
    config = config_from_layers([{"parallel": "hybrid:b", "head_batch": 16, "workers": 4, "mesh": "data:2,model:2"}])
    assert (config.batch, config.head_batch) == (64, 16)
    assert config_from_layers([{"parallel": "model", "batch": 2, "workers": 4}]).batch == 2
    assert config_from_layers([{"parallel": "mine.yaml", "head_batch": 32, "workers": 2}]).parallel == "mine.yaml"


def test_a_network_without_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recompute: network 'lenet5' has no blocks"):
        trainer_for(tmp_path, recompute="blocks")


def test_a_plan_file_and_the_configuration_must_agree(windlass: Windlass, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    first = ("--data", "synthetic:1x32x32:10:64", "--batch", "16", "--tune", "off")
    assert windlass("plan", "lenet5", *first, "--accumulate", "4", "--out", str(plan)).code == 0
    run = ("train", "--plan", str(plan), "--dry-run", "--data", "synthetic:1x32x32:10:64")
    assert "accumulate 4" in windlass(*run).out
    refused = windlass(*run, "--accumulate", "2")
    assert refused.code == 2 and "levers.accumulate: the plan says 4, the configuration 2" in refused.err


@pytest.mark.parametrize("text", ["256;128", "1,2,3", "", "a"])
def test_batches_are_one_or_two_numbers(windlass: Windlass, text: str) -> None:
    done = windlass("train", "--batch", text)
    assert done.code == 2 and f"--batch: needs a whole number, or two as in 256,128, got {text!r}" in done.err


def test_options_set_the_keys(windlass: Windlass) -> None:
    options = ("--batch", "256,128", "--parallel", "hybrid:c", "--workers", "2", "--scale-lr", "sqrt")
    mapping = yaml.safe_load(windlass("train", *options, "--memory-limit", "1GiB", "--print-config").out)
    names = ("batch", "head_batch", "parallel", "memory_limit")
    assert [mapping[name] for name in names] == [256, 128, "hybrid:c", "1GiB"]
    assert mapping["update"]["scaling"] == "sqrt"
    refused = windlass("train", "--memory-limit", "lots")
    assert refused.code == 2 and "memory_limit: a size is written like" in refused.err


def test_the_learning_rate_follows_the_batch(tmp_path: Path) -> None:
    update = {"lr": 0.01, "scaling": "linear", "base_batch": 16}
    trainer = trainer_for(tmp_path, batch=64, update=update, schedule={"name": "constant"})
    assert trainer.learning_rate == pytest.approx(0.04)
