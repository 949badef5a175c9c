"""Rows of metrics: written, cut back on resume, read, and refused by a full disk."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from windlass.errors import WriteError
from windlass.runs import metrics
from windlass.runs.metrics import EPOCH_COLUMNS, MetricsWriter, read_rows

Row = dict[str, Any]


def step(number: int) -> Row:
    return {"kind": "step", "step": number, "epoch": 0, "loss": 1 / number, "accuracy": 0.1, "lr": 0.1 + 0.2}


def epoch(number: int, at: int, **more: Any) -> Row:
    return {
        "kind": "epoch", "epoch": number, "step": at, "lr": 0.01, "train_loss": 0.5, "train_accuracy": 0.25,
        "test_loss": 0.75, "test_accuracy": 1 / 3, "images_per_s": 100.5, "seconds": 2.5, "data_share": 0.125, **more,
    }  # fmt: skip


ROWS = [step(1), step(2), epoch(0, 2), {"kind": "checkpoint", "step": 2}, step(3), step(4), epoch(1, 4)]


def write(folder: Path, rows: list[Row], *, at: int = 0) -> None:
    writer = MetricsWriter(folder, step=at)
    for row in rows:
        writer.write(row)
    writer.close()


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_row_comes_back_exactly(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    assert read_rows(tmp_path / "metrics.jsonl") == ROWS


def test_the_table_has_the_epochs_and_their_columns(tmp_path: Path) -> None:
    write(tmp_path, [*ROWS, epoch(2, 6, extra="not a column")])
    rows = table(tmp_path)
    assert [list(row) for row in rows] == [list(EPOCH_COLUMNS)] * 3
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert {name: float(rows[0][name]) for name in EPOCH_COLUMNS} == {name: ROWS[2][name] for name in EPOCH_COLUMNS}


def test_rows_of_epochs_are_on_the_disk_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, step=0)
    try:
        writer.write(step(1))
        writer.write(epoch(0, 1))
        assert read_rows(tmp_path / "metrics.jsonl") == [step(1), epoch(0, 1)]
        assert len(table(tmp_path)) == 1
    finally:
        writer.close()


@pytest.mark.parametrize(("wait_s", "steps"), [(0.0, [1, 2, 3, 4]), (float("inf"), [])])
def test_events_for_tensorboard_have_every_epoch_and_steps_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_s: float, steps: list[int]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    monkeypatch.setattr(metrics, "BOARD_S", wait_s)
    write(tmp_path, ROWS)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    found = {name: [(event.step, event.value) for event in board.Scalars(name)] for name in board.Tags()["scalars"]}
    assert {f"epoch/{name}" for name in EPOCH_COLUMNS[3:]} == {name for name in found if name.startswith("epoch/")}
    assert found["epoch/test_loss"] == [(2, 0.75), (4, 0.75)]
    for name in ("step/loss", "step/accuracy", "step/lr"):
        assert [step for step, _ in found.get(name, [])] == steps


def precision(number: int, at: int) -> Row:
    entry = {"role": "updates", "layer": "c1.weight", "format": "<2,14>", "elements": 40, "saturated": 1, "zeroed": 15}
    entry |= {"error_sum": 0.5, "moved": 5}
    return {"kind": "precision", "epoch": number, "step": at, "recipe": "fixed16", "rows": [entry]}


def test_what_rounding_did_goes_to_tensorboard_by_role(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, [step(1), precision(0, 1), step(2), precision(1, 2)])
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    names = sorted(name for name in board.Tags()["scalars"] if name.startswith("precision/"))
    assert names == ["precision/updates/error", "precision/updates/saturated", "precision/updates/zeroed"]
    found = [[(event.step, event.value) for event in board.Scalars(name)] for name in names]
    assert found == [[(at, pytest.approx(value)) for at in (1, 2)] for value in (0.5 / 40, 1 / 40, 0.75)]


def test_a_row_about_rounding_stands_where_its_steps_stand(tmp_path: Path) -> None:
    write(tmp_path, [step(1), step(2), precision(0, 2), step(3), precision(1, 3)])
    MetricsWriter(tmp_path, step=2, epoch=0).close()
    assert read_rows(tmp_path / "metrics.jsonl") == [step(1), step(2), precision(0, 2)]


@pytest.mark.parametrize("at", range(6))
def test_on_resume_rows_beyond_the_step_are_dropped(tmp_path: Path, at: int) -> None:
    end: Row = {"kind": "end", "step": 2, "status": "stopped"}
    write(tmp_path, [*ROWS[:4], end, *ROWS[4:]])
    write(tmp_path, [step(9)], at=at)
    assert read_rows(tmp_path / "metrics.jsonl") == [row for row in ROWS if row["step"] <= at] + [step(9)]


def test_the_table_is_cut_back_too_and_goes_on(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    write(tmp_path, [], at=3)
    assert [row["step"] for row in table(tmp_path)] == ["2"]
    write(tmp_path, [epoch(1, 4), epoch(2, 6)], at=3)
    assert [row["step"] for row in table(tmp_path)] == ["2", "4", "6"]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_half_written_last_line_is_dropped_for_good(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, [step(1), step(2)])
    whole = path.read_text()
    path.write_text(whole[:-cut] if cut > 1 else whole + '{"kind": "st')
    kept = [step(1)] if cut > 1 else [step(1), step(2)]
    assert read_rows(path) == kept
    write(tmp_path, [step(7)], at=5)
    assert read_rows(path) == [*kept, step(7)]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*kept, step(7)]


def test_without_a_file_there_are_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_a_folder_that_is_gone_is_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"cannot write .*metrics\.jsonl"):
        MetricsWriter(tmp_path / "missing", step=0)


LIMITED = """
import resource, sys
from pathlib import Path
from windlass.errors import WriteError
from windlass.runs import metrics
from windlass.runs.metrics import MetricsWriter

writer = MetricsWriter(Path(sys.argv[1]), step=0)
row = {"kind": sys.argv[2], "epoch": 0, "step": 1, "loss": 0.5}
writer.write(row)
resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
codes = []
for action in [*[lambda: writer.write(row)] * 2000, writer.close]:
    try:
        action()
    except WriteError as error:
        codes.append(error.exit_code)
print(len(codes) > 0 and set(codes))
"""


@pytest.mark.parametrize("kind", ["step", "epoch"])
def test_a_full_disk_is_a_write_error_in_writing_and_in_closing(tmp_path: Path, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), kind], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "{5}\n"), done.stderr
