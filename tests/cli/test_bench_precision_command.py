"""``windlass bench precision``: a short experiment in real processes, the cost of a step, Ctrl-C, and refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from windlass.cli import main


def test_an_experiment_prints_recipes_table_and_plot(windlass: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--networks", "dnn", "--epochs", "1", "--seeds", "1", "--fl", "14,8"]
    done = windlass("bench", "precision", *arguments, "--json", "rows.json", "--plot", "curves.png")
    assert done.code == 0, done.err
    assert "digits: 1,438 samples to learn, 359 to test; minibatches of 100" in done.out
    assert "stochastic, FL 14: --precision 'fixed16'" in done.out
    assert "nearest, FL 8: --precision 'weights=<8,8>" in done.out and "dnn, 1 epoch(s), 1 seed(s)" in done.out
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["way"]: row for row in found["rows"]}
    assert list(rows) == ["float32", "stochastic, FL 14", "stochastic, FL 8", "nearest, FL 14", "nearest, FL 8"]
    for way in rows:
        assert f"| {way} | {rows[way]['test_error']:.2f} (" in done.out
    assert len(found["runs"]) == 5 and found["machine"]["cpu"]
    assert rows["nearest, FL 8"]["still"] > rows["stochastic, FL 8"]["still"] == 0


def test_an_interrupt_keeps_finished_runs(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = start(
        "bench", "precision", "--data", "digits", "--networks", "dnn", "--epochs", "4", "--seeds", "999",
        "--processes", "1", "--fl", "8", "--json", "rows.json",
    )  # fmt: skip
    path = tmp_path / "rows.json"
    deadline = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
    assert "of 2997 runs are finished" in out and "| float32 |" in out
    assert json.loads(path.read_text())["runs"][0]["way"] == "float32"


def test_the_cost_of_a_step(windlass: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["--networks", "lenet5", "--batch", "2", "--turns", "2", "--threads", "1", "--json", "cost.json"]
    done = windlass("bench", "precision", "--cost", *arguments)
    assert done.code == 0, done.err
    assert "| lenet5, 2×1×32×32 | float32 | 2 |" in done.out and "| lenet5, 2×1×32×32 | fixed16 | 2 |" in done.out
    found = json.loads((tmp_path / "cost.json").read_text())
    rows = {row["by"]: row for row in found["rows"]}
    assert rows["float32"]["times_float32"] == 1.0 and rows["fixed16"]["seconds"] > 0
    assert found["recipe"] == "fixed16" and found["machine"]["keeps_memory"] is False
    assert ("QPyTorch" in rows) != bool(found["notes"])


DATA = ["--data", "digits", "--networks", "dnn"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--data: needs images to learn, such as mnist:PATH"),
        (["--data", "digits"], 2, "--data digits: cnn needs images of side 16 at least, got 8"),
        (["--data", "mnist:nowhere"], 3, "nowhere: no such folder"),
        (["--data", "minst:nowhere"], 2, "unknown data source 'minst'; did you mean 'mnist'"),
        (
            ["--data", "digits", "--networks", "dnm"],
            2,
            "--networks: unknown network of the paper 'dnm'; did you mean 'dnn'",
        ),
        ([*DATA, "--fl", "16"], 2, "--fl: needs fraction bits of 16, 1 to 15, comma-separated, got '16'"),
        ([*DATA, "--fl", "few"], 2, "got 'few'"),
        ([*DATA, "--rounding", "neares"], 2, "--rounding: unknown rounding 'neares'; did you mean 'nearest'"),
        ([*DATA, "--epochs", "0"], 2, "--epochs: needs at least 1, got 0"),
        ([*DATA, "--seeds", "0"], 2, "--seeds: needs at least 1, got 0"),
        ([*DATA, "--processes", "-1"], 2, "--processes: needs at least 0, got -1"),
        ([*DATA, "--plot", "p.doc"], 2, "--plot p.doc: needs a name that ends in"),
        ([*DATA, "--json", "nowhere/rows.json"], 2, "there is no folder nowhere"),
        (["--cost", "--data", "digits"], 2, "--cost trains nothing"),
        (["--cost", "--networks", "lenet"], 2, "--networks: unknown network 'lenet'; did you mean 'lenet5'"),
        (["--cost", "--networks", "coates"], 2, "--networks: unknown network 'coates'"),
        (["--cost", "--batch", "0"], 2, "--batch: needs at least 1, got 0"),
        (["--cost", "--turns", "0"], 2, "--turns: needs at least 1, got 0"),
        (["--cost", "--layout", "rows"], 2, "--layout: unknown layout 'rows'"),
        (["--cost", "--recipe", "fixd16"], 2, "did you mean 'fixed16'"),
        ([*DATA, "--batch", "3"], 2, "--batch: goes with --cost"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "precision", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
