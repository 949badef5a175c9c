"""``windlass tune``, ``bench conv``, ``bench step`` and ``--tune``: what they print and leave, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import losses_of
from windlass.cli import main
from windlass.plan.convolution import DIRECTIONS

NETWORK = """
from torch import nn

def small(num_classes, in_channels, image_size):
    return nn.Sequential(
        nn.Conv2d(in_channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes),
    )
"""
SMALL = "convnet_for_tests:small"
BENCH = ("bench", "conv", "--channels", "4", "--size", "12", "--batch", "1", "--turns", "2")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a network in it, and an empty cache beside it."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(work))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (work / "convnet_for_tests.py").write_text(NETWORK)
    return work


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    before = sorted(Path().rglob("*"))
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("windlass: ") and captured.err.count("\n") == 1, captured.err
    assert sorted(Path().rglob("*")) == before, "something was written"
    return captured.err


REFUSED = [
    (["tune", "lenet"], "unknown network 'lenet'; did you mean 'lenet5'"),
    (["tune", "lenet5", "--batch", "0"], "--batch: needs a number of at least 1, got 0"),
    (["tune", "lenet5", "--threads", "-1"], "--threads: needs a number of at least 0, got -1"),
    (["tune", "lenet5", "--image-size", "0"], "--image-size: needs a number of at least 1, got 0"),
    (["tune", "lenet5", "--layout", "nhwc"], "--layout: needs channels_last or contiguous, got 'nhwc'"),
    (["tune", "lenet5", "--accuracy", "stric"], "accuracy: unknown accuracy 'stric'; did you mean 'strict'"),
    (["tune", "lenet5", "--tune", "mesure"], "tune: unknown way to tune 'mesure'; did you mean 'measure'"),
    (["tune", "lenet5", "--workspace-mb", "-1"], "workspace_mb: needs a number of at least 0, got -1"),
    (["train", "--tune", "always"], "tune: unknown way to tune 'always'"),
    (["train", "--accuracy", "high"], "accuracy: unknown accuracy 'high'"),
    (["train", "--set", "workspace_mb=-5"], "workspace_mb: needs a number of at least 0, got -5"),
    (["plan", "lenet5", "--tune", "of"], "tune: unknown way to tune 'of'; did you mean 'off'"),
    (["bench", "conv", "--network", "vgg"], "--network: unknown network 'vgg'; did you mean 'vgg19'"),
    (["bench", "conv", "--kernel-sizes", "3,five"], "--kernel-sizes: needs whole numbers of at least 1"),
    (["bench", "conv", "--kernel-sizes", ","], "--kernel-sizes: needs whole numbers of at least 1"),
    (["bench", "conv", "--kernel-sizes", "0"], "--kernel-sizes: needs whole numbers of at least 1"),
    (["bench", "conv", "--channels", "0"], "--channels: needs at least 1, got 0"),
    (["bench", "conv", "--turns", "0"], "--turns: needs at least 1, got 0"),
    (["bench", "conv", "--threads", "-2"], "--threads: needs at least 0, got -2"),
    (["bench", "conv", "--directions", "foward"], "--directions: unknown direction 'foward'; did you mean 'forward'"),
    (["bench", "conv", "--accuracy", "best"], "accuracy: unknown accuracy 'best'"),
    (["bench", "conv", "--plot", "speed.doc"], "--plot speed.doc: needs a name that ends in .png"),
    (["bench", "conv", "--plot", "no/speed.png"], "--plot no/speed.png: there is no folder no"),
    (["bench", "conv", "--json", "no/speed.json"], "--json no/speed.json: there is no folder no"),
    (["bench", "step", "--network", "vgg61"], "--network: unknown network 'vgg61'; did you mean"),
    (["bench", "step", "--turns", "0"], "--turns: needs at least 1, got 0"),
    (["bench", "step", "--image-size", "-1"], "--image-size: needs at least 0, got -1"),
    (["bench", "step", "--tune", "on"], "tune: unknown way to tune 'on'"),
]


@pytest.mark.parametrize(("arguments", "part"), REFUSED)
def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], part: str) -> None:
    assert part in refused(capsys, *arguments)


@pytest.mark.parametrize("tune", ["model", "measure", "off"])
def test_tune_prints_a_row_for_every_convolution_and_direction(capsys: pytest.CaptureFixture[str], tune: str) -> None:
    arguments = ["tune", SMALL, "--batch", "2", "--image-size", "12", "--channels", "3", "--tune", tune]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{SMALL}, input 2×3×12×12, channels_last, ")
    assert lines[1].startswith("measured peaks: ")
    assert lines[2].split()[:4] == ["layer", "convolution", "direction", "algorithm"]
    assert [line.split()[0] for line in lines[4:9]] == ["0", "weight", "2", "input", "weight"]
    assert "of 2 convolutions by another algorithm" in lines[9]
    assert main([*arguments, "--json", "--layout", "contiguous"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in found["layers"]] == ["0", "2"]
    assert found["input_shape"] == [2, 3, 12, 12] and found["layout"] == "contiguous"
    assert set(found["layers"][1]["directions"]) == set(DIRECTIONS)
    for row in found["layers"][1]["directions"].values():
        assert row["predicted_s"]["torch"] > 0 and row["reason"]


def test_a_second_time_nothing_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["tune", SMALL, "--batch", "4", "--image-size", "16", "--channels", "8", "--json"]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    files = sorted((tmp_path / "cache").rglob("*.json"))
    assert len(files) == 1
    before = files[0].read_bytes()
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert json.loads(files[0].read_bytes())["times"] == json.loads(before)["times"]


def test_a_damaged_cache_is_one_line_and_no_more(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["tune", SMALL, "--batch", "2", "--image-size", "8", "--tune", "model"]
    assert main(arguments) == 0
    (file,) = (tmp_path / "cache").rglob("*.json")
    file.write_text("{")
    capsys.readouterr()
    assert main(arguments) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"windlass: {file} is damaged and will be written anew") and err.count("\n") == 1
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_tuned_plan_trains_as_it_says_and_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", SMALL, "--batch", "256", "--out", "plan.yaml"]) == 0
    plan = yaml.safe_load(Path("plan.yaml").read_text())
    assert plan["levers"]["convolution"]["value"] == "torch", "tuning is off by itself"
    plan["levers"]["convolution"] = "auto"
    plan["layers"] = {"2": {"kind": "conv2d", "convolution": "winograd-4x4/direct/winograd-2x2"}}
    Path("edited.yaml").write_text(yaml.safe_dump(plan))
    common = ["--batch", "256", "--epochs", "1", "--quiet", "--set", "data.holdout=0.7"]
    assert main(["train", SMALL, *common, "--out", "torch"]) == 0
    assert main(["train", "--plan", "edited.yaml", *common, "--out", "edited"]) == 0
    saved = yaml.safe_load(Path("edited/plan.yaml").read_text())["layers"]
    assert saved["2"]["convolution"] == "winograd-4x4/direct/winograd-2x2"
    assert set(saved) == {"0", "2"}, "the row that was left out is filled in"
    ours, torchs = losses_of(Path("edited")), losses_of(Path("torch"))
    # Winograd rounds a few times more than direct convolution; a few steps do not make it visible.
    assert ours == pytest.approx(torchs, rel=1e-4)
    assert main(["train", "--resume", "--out", "edited", "--epochs", "2", "--quiet"]) == 0
    assert yaml.safe_load(Path("edited/plan.yaml").read_text())["layers"] == saved
    assert main(["train", "--resume", "--out", "torch", "--plan", "", "--epochs", "2", "--quiet"]) == 0
    assert losses_of(Path("edited")) == pytest.approx(losses_of(Path("torch")), rel=1e-3)


def test_a_plan_for_what_an_algorithm_cannot_do_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "resnet18", "--data", "synthetic", "--out", "plan.yaml"]) == 0
    plan: dict[str, Any] = yaml.safe_load(Path("plan.yaml").read_text())
    name = next(name for name in plan["layers"] if "shortcut" in name)
    plan["layers"][name]["convolution"] = "winograd-4x4"
    Path("bad.yaml").write_text(yaml.safe_dump(plan))
    capsys.readouterr()
    line = refused(capsys, "train", "--data", "synthetic", "--plan", "bad.yaml", "--out", "out")
    assert f"plan bad.yaml: layers.{name}.convolution: winograd-4x4 needs filters with sides from 2 to 7" in line


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.mpi)])
def test_training_tunes_on_rank_0_for_all(workers: str) -> None:
    common = ["--batch", "256", "--epochs", "1", "--quiet", "--set", "data.holdout=0.7"]
    assert main(["train", SMALL, *common, "--workers", workers, "--tune", "model", "--out", "tuned"]) == 0
    assert main(["train", SMALL, *common, "--out", "torch"]) == 0
    plan = yaml.safe_load(Path("tuned/plan.yaml").read_text())
    assert plan["levers"]["convolution"]["value"] == "auto"
    assert all(row["reason"] for row in plan["layers"].values())
    assert losses_of(Path("tuned")) == pytest.approx(losses_of(Path("torch")), rel=1e-4)


def test_exact_training_is_today_s_bit_for_bit() -> None:
    common = ["--batch", "512", "--epochs", "1", "--quiet"]
    assert main(["train", SMALL, *common, "--out", "plain"]) == 0
    assert main(["train", SMALL, *common, "--tune", "measure", "--accuracy", "exact", "--out", "exact"]) == 0
    assert losses_of(Path("plain")) == losses_of(Path("exact"))


@pytest.mark.slow
def test_bench_conv_measures_all_beside_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "--kernel-sizes", "3,5", "--json", "conv.json", "--plot", "conv.png"]) == 0
    out = capsys.readouterr().out
    assert "| 3x3 | 1x4x12x12 -> 4, 3x3, pad 1 | forward |" in out
    assert "weight: auto " in out
    found = json.loads(Path("conv.json").read_text())
    assert len(Path("conv.png").read_bytes()) > 10_000
    by = {(row["case"], row["direction"], row["by"]): row for row in found["rows"]}
    for case, ours in (("3x3", {"direct", "im2col", "winograd-4x4"}), ("5x5", {"direct", "fft-16", "winograd-2x2"})):
        for direction in DIRECTIONS:
            rows = {key[2]: row for key, row in by.items() if key[:2] == (case, direction)}
            assert {"PyTorch channels_last", "PyTorch NCHW", *ours} <= set(rows)
            assert sum(row["is_auto"] for row in rows.values()) == 1
            for row in rows.values():
                assert row["low_s"] <= row["seconds"] <= row["high_s"]
                # Float32's rounding is 6e-8; the worst algorithm here errs some ten times more.
                assert row["error"] < 1e-5, row
    assert found["machine"]["peak_flops"] > 0
    assert main([*BENCH, "--kernel-sizes", "3", "--depthwise", "--directions", "weight", "--details"]) == 0
    out = capsys.readouterr().out
    assert "4 groups" in out and "| forward |" not in out and "PyTorch NCHW" in out


def test_bench_conv_of_a_network_has_each_distinct_layer_once(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "conv", "--network", "lenet5", "--batch", "1", "--turns", "1", "--directions", "forward"]
    assert main([*arguments, "--plot", "bars.svg", "--json", "conv.json"]) == 0
    out = capsys.readouterr().out
    assert "| c1 | 1x1x32x32 -> 6, 5x5 | forward |" in out and "| c5 |" in out
    assert "<svg" in Path("bars.svg").read_text()
    means = json.loads(Path("conv.json").read_text())["geometric_means"]
    assert {"direction": "forward", "by": "PyTorch channels_last", "speedup": 1.0} in means
    assert any(mean["by"] == "auto" for mean in means)


@pytest.mark.slow
def test_bench_step_measures_in_processes_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "step", "--network", "lenet5", "--batch", "4", "--turns", "2", "--tune", "model"]
    assert main([*arguments, "--json", "step.json"]) == 0
    assert "| Windlass | " in capsys.readouterr().out
    found = json.loads(Path("step.json").read_text())
    rows = {row["by"]: row for row in found["rows"]}
    assert list(rows) == ["PyTorch", "PyTorch, freed memory kept", "Windlass", "Windlass, freed memory kept"]
    assert rows["PyTorch"]["speedup"] == 1.0
    for row in rows.values():
        assert row["turns"] == 2 and row["seconds"] > 0
        assert row["first_loss"] == pytest.approx(rows["PyTorch"]["first_loss"], rel=1e-4)
        assert row["last_loss"] < row["first_loss"]
