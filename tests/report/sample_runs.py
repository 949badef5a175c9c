"""Run folders as the trainer writes them, made up from a seed."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from windlass.plan.graph import INPUT, Graph, Layer

Row = dict[str, Any]

BATCH = 64


def lenet_graph() -> Graph:
    """LeNet-5 on 28×28 images, counted by hand."""
    return Graph(
        network="lenet5",
        input_shape=(BATCH, 1, 28, 28),
        layers=(
            conv("features.0", INPUT, 1, 6, 28, kernel=5),
            plain("features.1", "tanh", "features.0", (6, 28, 28)),
            plain("features.2", "avg_pool2d", "features.1", (6, 14, 14)),
            conv("features.3", "features.2", 6, 16, 10, kernel=5),
            plain("features.4", "tanh", "features.3", (16, 10, 10)),
            plain("features.5", "avg_pool2d", "features.4", (16, 5, 5)),
            plain("flatten", "flatten", "features.5", (400,)),
            linear("classifier.0", "flatten", 400, 120),
            plain("classifier.1", "tanh", "classifier.0", (120,)),
            linear("classifier.2", "classifier.1", 120, 84),
            plain("classifier.3", "tanh", "classifier.2", (84,)),
            linear("classifier.4", "classifier.3", 84, 10),
        ),
        input_bytes=BATCH * (28 * 28 * 4 + 8),
        peak_bytes=5_843_216,
        peak_at="features.1 (backward)",
    )


def deep_graph(num_blocks: int = 30) -> Graph:
    """A chain with more layers than a table shows at once."""
    layers = [conv("stem", INPUT, 3, 16, 32, kernel=3)]
    for i in range(num_blocks):
        layers.append(conv(f"blocks.{i}.conv", layers[-1].name, 16, 16, 32, kernel=3))
        layers.append(plain(f"blocks.{i}.relu", "relu", layers[-1].name, (16, 32, 32)))
    return Graph(
        network="deep",
        input_shape=(BATCH, 3, 32, 32),
        layers=tuple(layers),
        input_bytes=BATCH * 3 * 32 * 32 * 4,
        peak_bytes=2_000_000_000,
        peak_at="blocks.3.conv",
    )


def conv(name: str, source: str, c: int, k: int, side: int, *, kernel: int) -> Layer:
    weights = k * c * kernel * kernel
    macs = BATCH * weights * side * side
    out = 4 * BATCH * k * side * side
    return Layer(
        name=name,
        kind="conv2d",
        inputs=(source,),
        output_shape=(BATCH, k, side, side),
        num_parameters=weights + k,
        forward_macs=macs,
        backward_macs=macs if source == INPUT else 2 * macs,
        kept_bytes=out,
        weight_bytes=4 * (weights + k),
        output_grad_bytes=out,
        weight_grad_bytes=4 * (weights + k),
        attributes=(("kernel", (kernel, kernel)), ("stride", (1, 1))),
    )


def linear(name: str, source: str, num_in: int, num_out: int) -> Layer:
    return Layer(
        name=name,
        kind="linear",
        inputs=(source,),
        output_shape=(BATCH, num_out),
        num_parameters=num_in * num_out + num_out,
        forward_macs=BATCH * num_in * num_out,
        backward_macs=2 * BATCH * num_in * num_out,
        kept_bytes=4 * BATCH * num_out,
        weight_bytes=4 * (num_in * num_out + num_out),
        output_grad_bytes=4 * BATCH * num_out,
        weight_grad_bytes=4 * (num_in * num_out + num_out),
    )


def plain(name: str, kind: str, source: str, shape: tuple[int, ...]) -> Layer:
    num_bytes = 4 * BATCH * math.prod(shape)
    return Layer(
        name=name,
        kind=kind,
        inputs=(source,),
        output_shape=(BATCH, *shape),
        num_parameters=0,
        forward_macs=0,
        backward_macs=0,
        kept_bytes=0 if kind == "flatten" else num_bytes,
        weight_bytes=0,
        output_grad_bytes=num_bytes,
        weight_grad_bytes=0,
    )


def step_row(step: int, *, epoch: int, loss: float, accuracy: float, lr: float, parts: dict[str, float]) -> Row:
    row: Row = {"kind": "step", "step": step, "epoch": epoch, "loss": loss, "accuracy": accuracy, "lr": lr}
    row |= {"images": BATCH, "seconds": sum(parts.values())}
    return row | {f"{name}_s": seconds for name, seconds in parts.items()}


def training_rows(
    *, seed: int = 0, num_epochs: int = 8, steps_per_epoch: int = 60, workers: int = 2, speed: float = 1.0
) -> list[Row]:
    """A run that goes well, with a slow first step; every epoch ends with a test and a checkpoint."""
    rng = random.Random(seed)
    rows: list[Row] = []
    num_steps, best = num_epochs * steps_per_epoch, 0.0
    for step in range(1, num_steps + 1):
        done = step / max(1, 8 * 60) / speed
        loss = (2.2 * math.exp(-7 * done) + 0.05) * math.exp(rng.gauss(0, 0.25))
        accuracy = max(0.0, min(1.0, 1 - 0.35 * loss + rng.gauss(0, 0.02)))
        slow = 9.0 if step == 1 else math.exp(rng.gauss(0, 0.08)) / speed
        parts = {
            "data": 0.00012 * slow * (6 if rng.random() < 0.03 else 1),
            "forward": 0.00085 * slow,
            "backward": 0.0014 * slow,
            "communication": (0.0 if workers == 1 else 0.00041) * slow,
            "update": 0.00019 * slow,
            "other": 0.00006 * slow,
        }
        epoch = (step - 1) // steps_per_epoch
        lr = 0.05 * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        rows.append(step_row(step, epoch=epoch, loss=loss, accuracy=accuracy, lr=lr, parts=parts))
        if step % steps_per_epoch == 0:
            test_loss = 1.1 * (2.2 * math.exp(-7 * done) + 0.05) + rng.uniform(0, 0.01)
            test_accuracy = 1 - 0.33 * test_loss
            own = [row for row in rows if row["kind"] == "step" and row["epoch"] == epoch]
            rows.append(
                {
                    "kind": "epoch",
                    "epoch": epoch,
                    "step": step,
                    "train_loss": sum(row["loss"] for row in own) / len(own),
                    "train_accuracy": sum(row["accuracy"] for row in own) / len(own),
                    "test_loss": test_loss,
                    "test_accuracy": test_accuracy,
                    "images_per_s": BATCH * len(own) / sum(row["seconds"] for row in own),
                    "seconds": 1.1 * sum(row["seconds"] for row in own),
                    "data_share": sum(row["data_s"] for row in own) / sum(row["seconds"] for row in own),
                }
            )
            name = f"step-{step:08d}"
            rows.append({"kind": "checkpoint", "step": step, "name": name, "best": test_accuracy > best})
            best = max(best, test_accuracy)
    return rows


def end_row(rows: list[Row], *, status: str = "done", message: str = "") -> Row:
    steps = [row for row in rows if row["kind"] == "step"]
    tests = [row for row in rows if row["kind"] == "epoch"]
    row: Row = {
        "kind": "end",
        "status": status,
        "step": steps[-1]["step"] if steps else 0,
        "message": message,
    }
    row["seconds"] = 1.2 * sum(step["seconds"] for step in steps)
    if tests:
        top = max(tests, key=lambda test: float(test["test_accuracy"]))
        row["best"] = {
            "metric": "test_accuracy",
            "value": top["test_accuracy"],
            "step": top["step"],
            "checkpoint": f"step-{top['step']:08d}",
        }
    return row


def config_of(**changes: object) -> Row:
    config: Row = {
        "network": "lenet5",
        "data": {"source": "digits", "augment": [], "holdout": 0.2},
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0005},
        "schedule": {"name": "cosine", "warmup_steps": 0},
        "epochs": 8,
        "batch": BATCH,
        "workers": 2,
        "seed": 17,
    }
    return config | changes


def plan_of(graph: Graph | None = None, *, workers: int = 2) -> Row:
    layers = (graph or lenet_graph()).layers
    return {
        "network": "lenet5",
        "workers": workers,
        "batch": BATCH,
        "levers": {
            "convolution": {"value": "auto", "reason": "fastest of those measured for every layer"},
            "allreduce": {"value": "ring", "reason": "two workers on one host"},
            "overlap": {"value": True, "reason": "the backward pass hides most of the communication"},
            "precision": {"value": "float32", "reason": "the processor has no faster 16-bit arithmetic"},
        },
        "layers": {
            layer.name: {"kind": layer.kind, "convolution": "im2col" if layer.kind == "conv2d" else None}
            for layer in layers
        },
    }


MACHINE: Row = {
    "host": "node-17",
    "cpu": "AMD EPYC 9655",
    "cores": 2,
    "memory_bytes": 16 * 2**30,
    "python": "3.12.4",
    "torch": "2.13.0",
    "mpi": "Open MPI 5.0.8",
    "windlass": "0.1.0",
    "commit": "4f2c1ab",
    "started": "2026-03-02 14:05:11",
}


def write_run(
    folder: Path,
    rows: list[Row],
    *,
    config: Row | None = None,
    plan: Row | None = None,
    graph: Graph | None = None,
    tail: str = "",
) -> Path:
    """Writes a complete run folder; `tail` follows the last row as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of() if config is None else config))
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan_of() if plan is None else plan))
    (folder / "graph.json").write_text(json.dumps(asdict(graph or lenet_graph())))
    (folder / "machine.json").write_text(json.dumps(MACHINE))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + tail)
    return folder


def good_run(folder: Path, *, seed: int = 0, num_epochs: int = 8) -> Path:
    rows = training_rows(seed=seed, num_epochs=num_epochs)
    return write_run(folder, [*rows, end_row(rows)])
