"""The benchmark of placements: its rows from events, its rivals in real ranks, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from windlass.bench.exposed import Clock, timed
from windlass.bench.parallel import Training, parse_link, parse_ways, parse_workers, rows_of
from windlass.bench.parallel_rank import card_bytes
from windlass.cli import main
from windlass.cli.bench_parallel import table
from windlass.engine import namespaces
from windlass.errors import ConfigError

TRAINING = Training(
    network="lenet5", batch=4, image_size=32, channels=1, classes=10, ways=("data", "model"), turns=2, steps=2
)


def turn(way: str, number: int, seconds: tuple[float, float], **more: Any) -> dict[str, Any]:
    known = {"losses": [0.25, 0.5], "exposed_s": 0.1, "sent": 8.0, "head_sent": 2.0, "wire": None, "peak": None}
    ranks = [known | {"seconds": each} | more for each in seconds]
    return {"kind": "turn", "way": way, "turn": number, "workers": 2, "ranks": ranks}


def events() -> list[dict[str, Any]]:
    unknown = {"sent": None, "head_sent": None, "peak": None}
    expected = {"data": {"sent": 8, "head_sent": 2, "peak": 90}, "model": {"sent": 7, "head_sent": 2, "peak": 40}}
    ddp = {"exposed_s": None, "sent": None, "head_sent": None}
    return [
        {"kind": "expected", "workers": 2, "ranks": [expected | {"ddp": unknown}] * 2},
        turn("data", 0, (1.0, 2.0), peak=100),
        turn("ddp", 0, (4.0, 3.0), peak=100, **ddp),
        turn("model", 0, (0.5, 0.25), peak=50),
        turn("model", 1, (1.5, 1.0)),
        turn("data", 1, (4.0, 2.0)),
        turn("ddp", 1, (6.0, 6.0), **ddp),
    ]


def test_rows_are_medians_of_the_slowest_rank_beside_ddp_in_the_same_turn() -> None:
    data, model, ddp = rows_of(events(), TRAINING, 2)
    assert [row.way for row in (data, model, ddp)] == ["data", "model", "ddp"]
    assert (data.seconds, data.low_s, data.high_s) == (3.0, 2.5, 3.5)
    assert data.images_per_s == pytest.approx(8 / 3)
    assert data.times_ddp == (4 / 2 + 6 / 4) / 2 and ddp.times_ddp == 1
    assert data.losses == (0.5, 1.0)  # what the ranks' addends make
    assert (model.sent, model.predicted_sent, model.peak, model.predicted_peak) == (8.0, 7, 50, 40)
    assert ddp.sent is ddp.predicted_sent is ddp.exposed_s is ddp.wire is None and ddp.peak == 100


def test_the_table_shows_predictions_where_they_differ() -> None:
    lines = table(rows_of(events(), TRAINING, 2))
    data, model, ddp = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert data[4:7] == ["8 B", "2 B", "100 B (90 B)"] and model[4] == "8 B (7 B)"
    assert ddp[4:8] == ["", "", "100 B", ""]
    assert "card" not in lines[0]


def test_nested_uses_of_a_clock_count_once() -> None:
    clock = Clock()
    with clock:
        with clock:
            pass
        assert clock.seconds == 0
    first = clock.seconds
    assert first > 0

    class Request:
        def test(self) -> bool:
            return True

        def wait(self) -> None:
            return

    request = timed(lambda send, receive: Request(), clock)(None, None)  # type: ignore[arg-type]
    after_start = clock.seconds
    assert request.test() and first < after_start < clock.seconds


def test_a_card_that_is_not_there_has_sent_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Inter-| Receive | Transmit\n face |bytes |bytes\n  eth0: 11 1 0 0 0 0 0 0 222 2 0 0 0 0 0 0\n"
    (tmp_path / "dev").write_text(text)
    monkeypatch.setattr("windlass.bench.parallel_rank.CARDS", tmp_path / "dev")
    assert card_bytes("eth0") == 222 and card_bytes("eth") == 0 and card_bytes("") == 0


@pytest.mark.mpi
def test_all_placements_and_ddp_train_alike_and_send_what_was_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "rows.json", tmp_path / "rows.png"
    ways = "data,model,hybrid:a,hybrid:b,hybrid:c"
    arguments = ["--network", "lenet5", "--workers", "2", "--batch-per-worker", "3", "--turns", "1", "--ways", ways]
    assert main(["bench", "parallel", *arguments, "--json", str(out), "--plot", str(plot)]) == 0
    assert "2 workers × " in capsys.readouterr().out and plot.read_bytes()[:4] == b"\x89PNG"
    rows = {row["way"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [*ways.split(","), "ddp"]
    for row in rows.values():
        assert row["losses"] == pytest.approx(rows["ddp"]["losses"], rel=1e-5)  # float32, other orders of addition
        assert len(row["losses"]) == 2 and row["losses"][0] != row["losses"][1]
    assert rows["model"]["sent"] == rows["model"]["predicted_sent"]  # nothing is summed
    for way in ways.split(",")[1:]:
        assert rows[way]["head_sent"] == rows[way]["predicted_head_sent"]
    for way in ("data", "hybrid:a", "hybrid:b", "hybrid:c"):
        assert rows[way]["peak"] == pytest.approx(rows[way]["predicted_peak"], rel=0.05), way
    # Sums go in flat tensors in which each parameter begins at a multiple of 16 numbers.
    assert rows["data"]["predicted_sent"] <= rows["data"]["sent"] <= 1.02 * rows["data"]["predicted_sent"]
    assert rows["model"]["sent"] < rows["hybrid:a"]["sent"] < rows["data"]["sent"]


def test_where_links_are_not_permitted_the_command_says_so_and_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(namespaces, "namespaces_trouble", lambda: "network namespaces are not permitted here: no")
    assert main(["bench", "parallel", "--network", "lenet5", "--link", "1Gbit"]) == 0
    assert capsys.readouterr().out == "skipped: network namespaces are not permitted here: no\n"


def test_options() -> None:
    link = parse_link("1Gbit")
    assert (link.bits_per_s, link.latency_ns) == (10**9, 100_000) and parse_link("1Gbit, 0us").latency_ns == 0
    assert parse_ways("hybrid:b,data,data") == ("hybrid:b", "data") and parse_workers("4,2") == (4, 2)
    with pytest.raises(ConfigError, match="--ways: needs some of data, "):
        parse_ways(",")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "1"], "--workers: needs whole numbers of at least 2, comma-separated, got '1'"),
        (["--ways", "hybrd:a"], "--ways: unknown placement 'hybrd:a'; did you mean 'hybrid:a'"),
        (["--link", "fast"], "--link fast: a bandwidth is written like"),
        (["--link", "1Gbit,soon"], "--link 1Gbit,soon: a time is written like"),
        (["--batch-per-worker", "0"], "--batch-per-worker: needs at least 1, got 0"),
        (["--image-size", "3"], "--image-size: needs at least "),
        (["--turns", "0"], "--turns: needs at least 1, got 0"),
        (["--layout", "rows"], "--layout: unknown layout 'rows'"),
        (["--set", "seed=1"], "--set: needs network_args.KEY=VALUE here, got 'seed=1'"),
        (["--plot", "p.doc"], "--plot p.doc: needs a name that ends in"),
        (["--network", "lenet"], "--network: unknown network 'lenet'; did you mean 'lenet5'"),
        (["--network", "coates"], "--network: coates learns without labels"),
        (["--network", "resnet18", "--ways", "hybrid:b", "--image-size", "0"], "--image-size"),
    ],
)
def test_wrong_settings_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["bench", "parallel", *(["--network", "lenet5"] if "--network" not in arguments else []), *arguments]) == 2
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
