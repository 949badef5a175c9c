"""`windlass.train`, and the trainer against a loop written out by hand."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import windlass
from windlass.config import config_from_layers
from windlass.data.serving import Batch
from windlass.engine.watch import StopRequest
from windlass.engine.world import LocalWorld
from windlass.errors import ConfigError, DataError, StoppedError
from windlass.job import Job
from windlass.loop import Trainer
from windlass.objective import objective
from windlass.plan.plan import Choice
from windlass.prepare import prepare


def test_train_returns_a_result(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    result = windlass.train(
        "lenet5", "digits", epochs=2, out=str(tmp_path / "out"), progress=False, on_event=events.append
    )
    assert result.status == "done"
    assert result.folder == tmp_path / "out"
    assert [row["epoch"] for row in result.trace] == [0, 1]
    assert result.values["test_loss"] == result.trace[-1]["test_loss"]
    assert result.best is not None
    assert result.best["value"] == max(row["test_accuracy"] for row in result.trace)
    assert (result.folder / result.best["checkpoint"] / "weights.safetensors").exists()
    assert events[0]["kind"] == "begin"


@pytest.mark.mpi
def test_train_starts_ranks_and_takes_a_plan(tmp_path: Path) -> None:
    from windlass.tuning.choose import choose_plan

    config = config_from_layers([{"workers": 2}])
    graph = prepare(Job(config, ""), LocalWorld()).graph
    plan = choose_plan(graph, workers=2, batch=64)
    levers = {**plan.levers, "bucket_bytes": Choice(2048, "tried out")}
    edited = windlass.Plan(**{**{f: getattr(plan, f) for f in plan.__dataclass_fields__}, "levers": levers})
    result = windlass.train(plan=edited, epochs=1, out=str(tmp_path / "out"), progress=False)
    assert "tried out" in (result.folder / "plan.yaml").read_text()
    assert result.values["train_loss"] > 0


def test_train_takes_a_module(tmp_path: Path) -> None:
    linear = nn.Linear(64, 10)
    module = nn.Sequential(nn.Flatten(), linear)
    before = linear.weight.detach().clone()
    data = {"image_size": 8, "augment": []}
    result = windlass.train(module, data=data, epochs=1, out=str(tmp_path / "a"), progress=False)
    assert result.status == "done"
    assert not torch.equal(before, linear.weight)
    config = (tmp_path / "a" / "config.yaml").read_text()
    assert "network: torch.nn.modules.container:Sequential" in config, "a module of one's own has no built-in name"
    assert "weight_decay: 0.0" in config, "nor LeNet-5's recipe"
    with pytest.raises(ConfigError, match="several workers build the network themselves"):
        windlass.train(module, data=data, workers=2, out=str(tmp_path / "b"), progress=False)


def test_a_resume_needs_no_more_than_the_folder(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    windlass.train("resnet18", "synthetic:3x8x8:3:40", batch=16, epochs=1, out=out, progress=False)
    result = windlass.train(out=out, resume=True, epochs=2, progress=False)
    assert [row["epoch"] for row in result.trace] == [1]
    with pytest.raises(ConfigError, match=r"network: the run in .* has 'resnet18', not 'vgg11'"):
        windlass.train("vgg11", out=out, resume=True, progress=False)


def test_errors_are_raised_with_their_exit_code(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        windlass.train(epohcs=3, progress=False)
    with pytest.raises(DataError) as caught:
        windlass.train(data=f"mnist:{tmp_path / 'none'}", progress=False)
    assert caught.value.exit_code == 3


def test_train_works_outside_the_main_thread(tmp_path: Path) -> None:
    results: list[windlass.Result] = []

    def work() -> None:
        results.append(windlass.train(epochs=1, out=str(tmp_path / "out"), progress=False))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0].status == "done"


def trainer_for(folder: Path, *, module: nn.Module | None = None, **options: Any) -> Trainer:
    """A trainer on one rank."""
    config = config_from_layers([options])
    prepared = prepare(Job(config, str(folder)), LocalWorld(), module=module)
    return Trainer(prepared, emit=lambda event: None, stop=StopRequest(), note=lambda a, b: None, writer=None)


@pytest.mark.parametrize("network", ["lenet5", "resnet18"])
def test_steps_equal_a_loop_written_by_hand(tmp_path: Path, network: str) -> None:
    """Five steps of momentum with weight decay and a schedule against PyTorch's textbook loop.

    Tolerance: both do the same float32 operations on the same batches; only the fused optimizer and the
    division by the batch (of the sum here, inside the mean there) round differently: a few eps = 6e-8 a
    step, so 1e-5 after five.
    """
    update = {"name": "momentum", "lr": 0.02, "weight_decay": 1e-3}
    trainer = trainer_for(
        tmp_path, network=network, data={"source": "synthetic:1x32x32:10:100", "augment": []}, update=update,
        batch=16, epochs=2, schedule={"name": "linear", "warmup_epochs": 0.5},
    )  # fmt: skip
    import copy

    module = copy.deepcopy(trainer.module)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3)
    num_steps, losses = trainer.prepared.train.num_steps, []
    for step in range(5):
        batch = trainer.prepared.train.fetch(0, step)
        rate = 0.02 * min(1.0, (step + 1) / (0.5 * num_steps)) * (1 - step / num_steps / 2)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(batch.images), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append((trainer.step(batch).loss, loss.item()))
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-5)
    for (name, ours_p), theirs_p in zip(trainer.module.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(ours_p, theirs_p, rtol=1e-4, atol=1e-6, msg=name)


def test_objective_weighs_auxiliary_heads() -> None:
    class Heads(nn.Module):
        auxiliary_weight = 0.25

    labels = torch.tensor([0, 2])
    outputs = tuple(torch.randn(2, 3) for _ in range(3))
    parts = [nn.functional.cross_entropy(output, labels, reduction="sum") for output in outputs]
    assert objective(Heads(), outputs, labels) == pytest.approx(parts[0] + 0.25 * (parts[1] + parts[2]))
    assert objective(Heads(), outputs[0], labels) == parts[0]


def test_an_empty_shard_takes_part(tmp_path: Path) -> None:
    """A rank without samples in a partial batch contributes zeros and goes on."""
    trainer = trainer_for(tmp_path)
    batch = trainer.prepared.train.fetch(0, 0)
    empty = Batch(batch.images[:0], batch.labels[:0], 64, batch.ids[:0])
    trainer.step(empty)
    assert all(bool((group.gradient == 0).all()) for group in trainer.averager.groups)


def test_stop_is_noticed_during_evaluation_and_the_resumed_run_evaluates_again(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    trainer = trainer_for(folder, epochs=1)

    def note(phase: str, step: int) -> None:
        if phase == "evaluation":
            trainer._stop.ask("a test")

    trainer._note = note
    with pytest.raises(StoppedError, match=r"stopped on request \(a test\) after step 23"):
        trainer.run()
    manifest = json.loads((folder / "checkpoints" / "last" / "manifest.json").read_text())
    assert manifest["progress"]["epoch"] == 0
    assert manifest["progress"]["position"] == 23
    config = config_from_layers([{"epochs": 1}])
    again = Trainer(
        prepare(Job(config, str(folder), resume=True), LocalWorld()),
        emit=lambda event: None, stop=StopRequest(), note=lambda a, b: None, writer=None,
    )  # fmt: skip
    straight = trainer_for(tmp_path / "straight", epochs=1)
    assert again.run().metrics["test_loss"] == straight.run().metrics["test_loss"]
