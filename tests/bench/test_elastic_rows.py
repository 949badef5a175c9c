"""The benchmark of killed ranks, without killing any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from windlass.bench.elastic import Loss, _row, rows_of, rows_to_json
from windlass.cli import main

LOSSES = [
    Loss(by="windlass", noticed_s=seconds, next_step_s=2 * seconds, steps_again=0, new_processes=0)
    for seconds in (0.1, 0.5, 0.2)
]


def test_a_row_has_the_median_and_the_worst() -> None:
    row = _row("windlass", 4, LOSSES)
    assert (row.workers, row.kills) == (4, 3)
    assert (row.noticed_s, row.worst_noticed_s, row.next_step_s, row.worst_next_step_s) == (0.2, 0.5, 0.4, 1.0)
    content = json.loads(rows_to_json([row], LOSSES, {"cpu": "a"}))
    assert content["rows"][0]["by"] == "windlass" and len(content["losses"]) == 3


def test_a_line_that_is_half_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "rank-0-1.jsonl").write_text('{"kind": "hello"}\n{"kind": "st')
    assert list(rows_of(tmp_path)) == [{"kind": "hello"}]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--workers", "2", "--kills", "2"), "at least 3, got 2"),
        (("--kills", "0"), "--kills: needs at least 1, got 0"),
        (("--network", "lenet"), "did you mean 'lenet5'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "elastic", *options]) == 2
    assert said in capsys.readouterr().err
