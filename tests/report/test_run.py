from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from sample_runs import MACHINE, config_of, end_row, lenet_graph, plan_of, training_rows, write_run

from windlass.errors import DataError
from windlass.report.run import load_run


def test_a_complete_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rows = training_rows(num_epochs=2, steps_per_epoch=5)
    run = load_run(write_run(tmp_path / "good", [*rows, end_row(rows)]))
    steps = [row for row in rows if row["kind"] == "step"]
    assert run.name == "good"
    assert run.config == config_of()
    assert run.plan == plan_of()
    assert run.machine == MACHINE
    assert run.problems == ()
    assert run.status == "done"
    assert run.num_steps == 10
    for name in ("step", "loss", "accuracy", "lr", "images", "seconds", "data_s", "other_s"):
        assert list(run.steps[name]) == [row[name] for row in steps]
    assert [row["epoch"] for row in run.epochs] == [0, 1]
    assert [row["name"] for row in run.checkpoints] == ["step-00000005", "step-00000010"]


def test_the_graph_comes_back_whole(tmp_path: Path) -> None:
    graph = load_run(write_run(tmp_path, [])).graph
    assert graph is not None
    assert graph.digest() == lenet_graph().digest()
    assert graph.memories() == lenet_graph().memories()
    assert (graph.input_shape, graph.peak_bytes) == (lenet_graph().input_shape, lenet_graph().peak_bytes)


@pytest.mark.parametrize("missing", [("config.yaml",), ("metrics.jsonl",), ("config.yaml", "metrics.jsonl")])
def test_a_folder_that_is_no_run_is_refused_naming_what_is_missing(tmp_path: Path, missing: tuple[str, ...]) -> None:
    write_run(tmp_path, [])
    for name in missing:
        (tmp_path / name).unlink()
    with pytest.raises(DataError) as refusal:
        load_run(tmp_path)
    assert " and ".join(missing) in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize(
    "tail",
    [
        '{"kind":"step","st',
        '{"kind":"step","step":4',
        "7",
        "\udcff".encode("utf-8", "replace").decode() + "{",
    ],
)
def test_a_half_written_last_line_is_skipped_and_said(tmp_path: Path, tail: str) -> None:
    rows = training_rows(num_epochs=1, steps_per_epoch=3)[:3]
    run = load_run(write_run(tmp_path, rows, tail=tail))
    assert run.num_steps == 3
    assert any("line 4" in problem and "half-written" in problem for problem in run.problems)
    assert run.status == "unfinished"
    assert any("killed" in problem for problem in run.problems)


def test_unreadable_lines_are_counted_and_unknown_kinds_left_out(tmp_path: Path) -> None:
    rows = training_rows(num_epochs=1, steps_per_epoch=3)
    folder = write_run(tmp_path, [{"kind": "novelty", "x": 1}, *rows, end_row(rows)])
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["not json", '{"kind":"step"}', "", *lines]) + "\n")
    run = load_run(folder)
    assert run.num_steps == 3
    assert run.problems == ("2 unreadable lines were skipped in metrics.jsonl, the first at line 1.",)


def test_a_resumed_run_counts_the_steps_done_last(tmp_path: Path) -> None:
    first = training_rows(seed=1, num_epochs=2, steps_per_epoch=4)[:-3]  # a crash inside the second epoch
    again = [row for row in training_rows(seed=2, num_epochs=2, steps_per_epoch=4) if row["step"] > 4]
    resume = {"kind": "resume", "step": 4, "workers": 1}
    run = load_run(write_run(tmp_path, [*first, {"kind": "end", "status": "stopped"}, resume, *again]))
    losses = [row["loss"] for row in [*first, *again] if row["kind"] == "step"]
    assert list(run.steps["step"]) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(run.steps["loss"]) == [*losses[:4], *losses[-4:]]
    assert [row["epoch"] for row in run.epochs] == [0, 1]
    assert [row["step"] for row in run.checkpoints] == [4, 8]
    assert run.resumes == (resume,)
    assert run.status == "unfinished"


def test_columns_that_come_late_or_hold_no_number_are_nan(tmp_path: Path) -> None:
    rows = [
        {"kind": "step", "step": 1, "loss": None, "seconds": 0.1},
        {"kind": "step", "step": 2, "loss": math.inf, "seconds": 0.1, "bytes_sent": 12, "note": "word"},
        {"kind": "step", "step": 3, "loss": 10**400, "bytes_sent": 13},
    ]
    run = load_run(write_run(tmp_path, rows))
    assert {len(column) for column in run.steps.values()} == {3}
    assert all(map(math.isnan, run.steps["loss"]))
    assert math.isnan(run.steps["bytes_sent"][0])
    assert list(run.steps["bytes_sent"])[1:] == [12, 13]
    assert math.isnan(run.steps["seconds"][2])
    assert "note" not in run.steps
    assert all(map(math.isnan, run.column("never")))
    assert any("not finite from step 1." in problem for problem in run.problems)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("graph.json", "{"),
        ("graph.json", "[1]"),
        ("graph.json", json.dumps({"network": "x", "layers": []})),
        ("graph.json", json.dumps({"network": "x", "input_shape": 3, "layers": [7]})),
        ("plan.yaml", "a: [1"),
        ("plan.yaml", "just words"),
        ("machine.json", "\x00"),
        ("config.yaml", "a: : b"),
    ],
)
def test_a_broken_file_is_named_and_the_rest_is_read(tmp_path: Path, name: str, content: str) -> None:
    rows = training_rows(num_epochs=1, steps_per_epoch=3)
    folder = write_run(tmp_path, [*rows, end_row(rows)])
    (folder / name).write_text(content)
    run = load_run(folder)
    assert run.num_steps == 3
    assert len(run.problems) == 1
    assert name in run.problems[0]


def test_missing_companions_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path, [])
    for name in ("plan.yaml", "graph.json", "machine.json"):
        (folder / name).unlink()
    run = load_run(folder)
    assert run.graph is None
    for name in ("plan.yaml", "graph.json", "machine.json"):
        assert f"There is no {name}." in run.problems
    assert "No step was recorded." in run.problems
