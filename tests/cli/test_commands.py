"""The commands at work, in this process: what they print and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from conftest import losses_of, rows_of
from windlass.cli import main
from windlass.data.serving import BatchServer  # noqa: F401  (PyTorch is imported before time is short)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_leaves_a_whole_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    folder = Path("runs/lenet5-digits-001")
    assert f"folder {folder}" in out
    assert "epoch   2" in out
    assert "left " in out
    assert "images/s" in out
    for name in ("config.yaml", "plan.yaml", "graph.json", "machine.json", "metrics.jsonl", "metrics.csv"):
        assert (folder / name).stat().st_size > 100, name
    assert list(folder.glob("tensorboard/events*"))
    assert "<html" in (folder / "report.html").read_text()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["epochs"] == 2
    assert config["update"]["momentum"] == 0.9
    header, *epochs = (folder / "metrics.csv").read_text().splitlines()
    assert header.startswith("epoch,step,lr,train_loss")
    assert len(epochs) == 2
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"best", "last", "step-00000023", "step-00000046"}
    assert main(["train", "--epochs", "1", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert Path("runs/lenet5-digits-002/report.html").exists()


def test_the_saved_configuration_runs_again_to_the_same_losses() -> None:
    assert main(["train", "--epochs", "1", "--quiet", "--out", "a", "--seed", "3", "--update", "adagrad"]) == 0
    assert main(["train", "--config", "a/config.yaml", "--quiet", "--set", "out=b"]) == 0
    assert losses_of(Path("a")) == losses_of(Path("b"))
    assert len(losses_of(Path("a"))) == 23


def test_json_is_one_event_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--epochs", "2", "--json", "--out", "out"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "begin"
    assert kinds[-1] == "end"
    assert kinds.count("epoch") == 2
    assert events[-1]["metrics"]["test_accuracy"] == events[-1]["best"]["value"]


def test_dry_run_checks_everything_and_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--out", "out"]) == 0
    out = capsys.readouterr().out
    for name in ("configuration", "data", "network", "plan", "memory", "disk", "one step"):
        assert f"{name}: " in out
    assert "1,438 to train" not in out
    assert "1438 to train, 359 to test" in out
    assert list(Path().iterdir()) == []


def test_print_config_is_a_configuration_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "resnet18", "--data", "synthetic", "--print-config", "--lr", "0.5"]) == 0
    mapping = yaml.safe_load(capsys.readouterr().out)
    numbers = {"lr": 0.5, "momentum": 0.9, "dampening": 0.0, "weight_decay": 1e-4}
    assert mapping["update"] == {"name": "momentum", **numbers, "scaling": "none", "base_batch": 128}
    assert list(Path().iterdir()) == []


def test_options_and_settings_are_said_in_one_breath(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--lr", "0.02", "--set", "update.name=adam", "--print-config"]) == 0
    update = yaml.safe_load(capsys.readouterr().out)["update"]
    assert (update["name"], update["lr"]) == ("adam", 0.02)
    assert main(["train", "--update", "momentum", "--print-config"]) == 0
    update = yaml.safe_load(capsys.readouterr().out)["update"]
    assert (update["lr"], update["weight_decay"]) == (0.1, 5e-4), "LeNet-5's recipe names the same rule"


def test_early_stop(capsys: pytest.CaptureFixture[str]) -> None:
    """A rate of zero never improves: patience 2 ends after epochs 1 (the best), 2 and 3."""
    assert main(["train", "--lr", "0", "--set", "early_stop.patience=2", "--out", "out"]) == 0
    assert "done (no longer improving) after 69 steps" in capsys.readouterr().out


def test_log_every_thins_the_rows() -> None:
    assert main(["train", "--epochs", "1", "--quiet", "--out", "out", "--set", "log_every=10"]) == 0
    rows = rows_of(Path("out"))
    assert [row["step"] for row in rows if row["kind"] == "step"] == [10, 20]


def test_report_of_several_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in ("0", "1"):
        assert main(["train", "--epochs", "1", "--quiet", "--out", f"run{seed}", "--seed", seed]) == 0
    assert main(["report", "run0", "run1"]) == 0
    assert capsys.readouterr().out == "comparison.html\n"
    page = Path("comparison.html").read_text()
    assert "run0" in page
    assert "run1" in page
    assert "seed" in page
    before = Path("run0/report.html").read_text()
    Path("run0/report.html").unlink()
    assert main(["report", "run0"]) == 0
    assert Path("run0/report.html").read_text() == before
    assert main(["report", "nowhere"]) == 3


def test_inspect_prints_the_paper_s_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "lenet5", "--plot", "dag.svg"]) == 0
    out = capsys.readouterr().out
    assert "48,120" in out
    assert "60,000" in out
    assert "predicted peak of a step" in out
    assert "<svg" in Path("dag.svg").read_text()
    assert main(["inspect", "googlenet", "--batch", "2", "--json"]) == 0
    graph = json.loads(capsys.readouterr().out)
    joins = [layer for layer in graph["layers"] if layer["kind"] == "cat"]
    assert [len(join["inputs"]) for join in joins] == [4] * 9
    assert graph["totals"]["memories"]["∇W"] == 4 * graph["totals"]["num_parameters"]


def test_plan_gives_every_lever_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    from windlass.plan.levers import LEVERS

    assert main(["plan", "resnet18", "--data", "synthetic", "--workers", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert set(plan["levers"]) == set(LEVERS)
    assert all(choice["reason"] for choice in plan["levers"].values())
    assert plan["workers"] == 4
    assert plan["levers"]["layout"]["value"] == "channels_last"
    assert len(plan["layers"]) == 20


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("windlass ")
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in ("train", "plan", "inspect", "report", "bench"):
        assert command in out
    assert "75 stopped on request" in " ".join(out.split())


@pytest.mark.mpi
def test_bench_train_measures_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "--networks", "lenet5", "--turns", "2", "--json", "bench.json"]) == 0
    assert "| lenet5 | 2 ×" in capsys.readouterr().out
    (row,) = json.loads(Path("bench.json").read_text())["rows"]
    assert row["turns"] == 2
    assert row["windlass_images_per_s"] > 0
    assert row["ddp_images_per_s"] > 0
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
