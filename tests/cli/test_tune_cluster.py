"""``windlass tune cluster``: it measures real ranks and keeps a table that is found again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from windlass.cli import main
from windlass.tuning.cluster import load_chooser


@pytest.mark.mpi
def test_ranks_are_measured_and_the_table_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "measured.json"
    assert main(["tune", "cluster", "--ranks", "2", "--sizes", "64,256KiB", "--turns", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "measured between 2 ranks on 1 host (host:2)" in printed and "| 256KiB |" in printed
    sizes = [event for event in json.loads(path.read_text())["events"] if event["kind"] == "size"]
    choose = load_chooser(2, [(0, 1)])
    assert choose is not None
    for event in sizes:
        assert str(choose(event["num_bytes"])) == event["chosen"]
        assert {"library", "shared"} < set(event["seconds"])


def test_under_mpiexec_the_ranks_are_not_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert main(["tune", "cluster", "--ranks", "2"]) == 2
    assert "the ranks are those that are there" in capsys.readouterr().err


def test_a_network_needs_no_word_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "lenet5", "--batch", "0"]) == main(["tune", "network", "lenet5", "--batch", "0"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == second and "--batch" in first
