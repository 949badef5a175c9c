"""Training under recipes: the same on any number of workers, resumed bit for bit, 16-bit exchange, refusals."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import Windlass, losses_of, rows_of, run
from windlass.errors import ConfigError
from windlass.plan.recipe import parse_recipe
from windlass.precision import dequantize, quantize

DIGITS = ("train", "lenet5", "--data", "digits", "--batch", "60", "--quiet")

NETWORK = textwrap.dedent(
    """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, stride=2)
            self.norm = nn.BatchNorm2d(8)
            self.drop = nn.Dropout(0.3)
            self.fc = nn.Linear(8 * 9, num_classes)
        def forward(self, x):
            return self.fc(self.drop(self.norm(self.conv(x)).relu().flatten(1)))
    """
)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return load_file(found / "weights.safetensors")


@pytest.mark.mpi
def test_any_number_of_workers_trains_alike(windlass: Windlass, tmp_path: Path) -> None:
    """Random bits belong to samples, and the summed gradient is rounded once.

    Tolerance: ranks change the order of float32 sums, so about one gradient in 2^10 (float32 sums differ by 1e-7
    relative, steps are 2^-14 of numbers near 2^-10) is rounded to the neighbouring number, one step of 6e-5 times the
    learning rate; a loss of 2 moves by far less than 1e-4 of itself.  Other random bits for another number of workers
    would move it by 1e-3 (`test_seeds_differ`).
    """
    losses = {}
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        run(windlass, folder, *DIGITS, "--epochs", "1", "--workers", str(workers), "--precision", "fixed16")
        losses[workers] = losses_of(folder)
    assert losses[3] == pytest.approx(losses[1], rel=1e-4)


def test_seeds_differ(windlass: Windlass, tmp_path: Path) -> None:
    plain = losses_of(run(windlass, tmp_path / "a", *DIGITS, "--epochs", "1"))
    rounded = losses_of(run(windlass, tmp_path / "b", *DIGITS, "--epochs", "1", "--precision", "fixed16"))
    assert max(abs(a - b) for a, b in zip(plain, rounded, strict=True)) > 1e-4


def test_weights_are_numbers_of_their_formats(windlass: Windlass, tmp_path: Path) -> None:
    recipe = "fixed16,f6.weights=<4,6>"
    folder = run(windlass, tmp_path / "a", *DIGITS, "--epochs", "1", "--precision", recipe)
    rows = [row for row in rows_of(folder) if row["kind"] == "precision"]
    assert len(rows) == 1
    formats = {(row["role"], row["layer"]): row["format"] for row in rows[0]["rows"]}
    assert formats["weights", "c1.weight"] == "fixed(16,14)" and formats["weights", "f6.weight"] == "fixed(10,6)"
    for name, weight in weights_of(folder).items():
        if name.endswith("codes"):
            continue
        number = parse_recipe(recipe).number("weights", name)
        assert torch.equal(quantize(weight, number, "nearest"), weight), name
        assert torch.equal(dequantize(quantize(weight, number, "nearest", dtype=torch.int16), number), weight), name
    plan = yaml.safe_load((folder / "plan.yaml").read_text())
    assert plan["levers"]["number_format"]["value"] == recipe
    assert "<6,10>" in plan["levers"]["number_format"]["reason"]


@pytest.mark.mpi
@pytest.mark.parametrize(
    "recipe", ["fixed16,late=0.5:+4", pytest.param("bfloat16", marks=pytest.mark.slow), "bfloat16,exchange=16bit"]
)
def test_a_run_that_resumes_is_the_run_without_a_stop(windlass: Windlass, tmp_path: Path, recipe: str) -> None:
    """With BatchNorm and dropout, inside an epoch, before and after the switch to wider formats."""
    (tmp_path / "nets.py").write_text(NETWORK)
    base = ("train", "nets:Net", "--data", "digits", "--batch", "60", "--quiet", "--epochs", "2", "--workers", "2",
            "--precision", recipe, "--set", "checkpoint.every_steps=15", "--set", "checkpoint.keep_last=9")  # fmt: skip
    whole = run(windlass, tmp_path / "whole", *base)
    for start in ("step-00000015", "step-00000045")[: 2 if "late" in recipe else 1]:
        folder = tmp_path / start
        shutil.copytree(whole, folder, symlinks=True)
        done = windlass("train", "--out", str(folder), "--resume-from", start, "--quiet")
        assert done.code == 0, done.err
        assert losses_of(folder) == losses_of(whole)
        for name, weight in weights_of(folder).items():
            assert torch.equal(weight, weights_of(whole)[name]), name


@pytest.mark.mpi
def test_gradients_travel_in_half_the_bytes(windlass: Windlass, tmp_path: Path) -> None:
    """Two workers hand over half of each buffer twice: as many bytes as a buffer of 16-bit numbers has."""
    base = (*DIGITS, "--epochs", "1", "--workers", "2")
    folder = run(windlass, tmp_path / "a", *base, "--precision", "fixed16,exchange=16bit")
    steps = [row for row in rows_of(folder) if row["kind"] == "step"]
    num_parameters = 60_000
    assert all(2 * num_parameters <= row["sent_bytes"] <= 2.02 * num_parameters for row in steps)
    wide = losses_of(run(windlass, tmp_path / "b", *base, "--precision", "fixed16"))
    assert losses_of(folder) == pytest.approx(wide, rel=0.05) and losses_of(folder) != wide
    said = [row["allreduce"] for row in rows_of(folder) if row["kind"] == "end"]
    assert said == ["24 sums of fixed(16,14), exchanged in 16 bits and added in 32"]


def test_updates_that_all_round_to_zero_are_said(windlass: Windlass, tmp_path: Path) -> None:
    """Nearest rounding at steps of 1/4: no update reaches 1/8."""
    folder = tmp_path / "a"
    recipe = "weights=<14,2>,updates=<14,2>,rounding=nearest"
    done = windlass("train", "lenet5", "--data", "digits", "--batch", "60", "--epochs", "1", "--precision", recipe,
                    "--lr", "0.001", "--out", str(folder), "--json")  # fmt: skip
    assert done.code == 0, done.err
    events = [json.loads(line) for line in done.out.splitlines()]
    warnings = [event["message"] for event in events if event["kind"] == "warning"]
    assert any("rounded to zero" in message for message in warnings), warnings
    assert "rounded to zero" in (folder / "report.html").read_text()
    updates = [
        row for row in next(r for r in rows_of(folder) if r["kind"] == "precision")["rows"] if row["role"] == "updates"
    ]
    assert updates and all(row["moved"] == 0 for row in updates)


@pytest.mark.parametrize(
    ("workers", "recipe", "rel"),
    [
        ("1", "fixed16", 0.02),
        pytest.param("2", "fixed16", 0.02, marks=[pytest.mark.mpi, pytest.mark.slow]),
        pytest.param("2", "fixed16,exchange=16bit", 0.05, marks=[pytest.mark.mpi, pytest.mark.slow]),
    ],
)
def test_accumulated_gradients_are_rounded_once(
    windlass: Windlass, tmp_path: Path, workers: str, recipe: str, rel: float
) -> None:
    """Micro-batches: LeNet-5 has no batch statistics, so only the order of sums and the bits' streams differ."""
    base = (*DIGITS, "--epochs", "1", "--precision")
    parts = run(windlass, tmp_path / "a", *base, recipe, "--workers", workers, "--accumulate", "2")
    whole = run(windlass, tmp_path / "b", *base, "fixed16")
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=rel)


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("--precision", "fixed17"), "unknown recipe 'fixed17'; did you mean 'fixed16'?"),
    (("--precision", "fixed16,weigths=<2,14>"), "unknown role or setting 'weigths'; did you mean 'weights'?"),
    (("--precision", "fixed16,weights=<2,30>"), "WL of a fixed-point format is 1 to 24, got 32"),
    (("--precision", "fixed16,c9.weights=<2,6>"), "unknown layer 'c9'; did you mean"),
    (
        ("--precision", "fixed16", "--parallel", "model", "--workers", "2"),
        "number_format: fixed16 is there for parallel data",
    ),
    (("--precision", "fixed16", "--recompute", "blocks"), "recompute: what is computed again would be rounded again"),
    (
        ("--precision", "fixed16", "--elastic", "--workers", "2"),
        "elastic: is there for float32, not for number format fixed16",
    ),
    (
        ("--precision", "fixed16,exchange=16bit,late=0.5:+4"),
        "exchange=16bit: late formats would have more than 16 bits",
    ),
    (("--precision", "fixed16,exchange=8bit"), "unknown exchange '8bit'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_is_refused_in_one_line(
    windlass: Windlass, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = windlass("train", "lenet5", "--data", "digits", "--out", "out", "--quiet", *arguments)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.mpi
def test_nan_ends_the_run_with_the_weights_before(windlass: Windlass, tmp_path: Path) -> None:
    """NaN has no code: it is counted, and the step that made it is not taken."""
    (tmp_path / "bad.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn

            class Net(nn.Module):
                def __init__(self, num_classes):
                    super().__init__()
                    self.fc = nn.Linear(64, num_classes)
                    self.steps = 0
                def forward(self, x):
                    y = self.fc(x.flatten(1))
                    self.steps += self.training and type(x) is torch.Tensor  # not where shapes alone are seen
                    if self.steps == 4:
                        y.register_hook(lambda g: g * float("nan"))
                    return y
            """
        )
    )
    for workers in ("1", "2"):
        done = windlass("train", "bad:Net", "--data", "digits", "--batch", "60", "--epochs", "1", "--quiet",
                        "--workers", workers, "--precision", "fixed16", "--out", workers)  # fmt: skip
        assert done.code == 4 and "a gradient that is not finite" in done.err and "step 4" in done.err, done.err


def test_a_plan_with_an_algorithm_too_inexact_is_refused(windlass: Windlass, tmp_path: Path) -> None:
    done = windlass(
        "plan", "resnet18", "--data", "synthetic:3x32x32", "--tune", "off", "--precision", "fixed16", "-o", "plan.yaml"
    )
    assert done.code == 0, done.err
    plan: dict[str, Any] = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert "12.7 times" in plan["levers"]["convolution"]["reason"]
    name = next(name for name in plan["layers"] if name.endswith("layer1.0.conv1"))
    plan["layers"][name]["convolution"] = "winograd-6x6"
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    done = windlass("train", "--data", "synthetic:3x32x32", "--plan", "plan.yaml", "--dry-run", "--quiet")
    assert done.code == 2 and "winograd-6x6 is about 21 times as inexact as direct convolution" in done.err, done.err


def test_a_recipe_for_layers_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="unknown layer 'c9"):
        parse_recipe("fixed16,c9.weights=<2,14>").check_layers(["c1", "c3"])
