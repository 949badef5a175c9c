"""``windlass collectives plan``: what it lists, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from windlass.cli import main
from windlass.plan.linkcost import default_profile
from windlass.tuning.collective_table import CollectiveTable, TableRow


def plan(*arguments: str) -> int:
    return main(["collectives", "plan", *arguments])


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert plan(*arguments, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert isinstance(content, dict)
    return content


def test_lists_a_line_for_each_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--ranks", "64", "--topology", "fat-tree:16x4:r4:o2", "--sizes", "1KiB..64MiB") == 0
    printed = capsys.readouterr().out
    assert "allreduce on fat-tree:16x4:r4:o2: 64 ranks on 16 hosts; costs assumed: 10 Gbit/s" in printed
    for size in ("1KiB", "4KiB", "16KiB", "64KiB", "256KiB", "1MiB", "4MiB", "16MiB", "64MiB"):
        assert f" {size} │" in printed
    for column in ("schedule", "predicted", "runner-up", "busiest link", "why"):
        assert column in printed
    assert "steps against" in printed and "1KiB to " in printed


def test_json_has_all(capsys: pytest.CaptureFixture[str]) -> None:
    content = as_json(capsys, "--topology", "switch:4x2", "--sizes", "1KiB,16MiB")
    assert (content["ranks"], content["hosts"], content["topology"]) == (8, 4, "switch:4x2")
    first, last = content["choices"]
    assert (first["num_bytes"], last["num_bytes"]) == (1024, 16 << 20)
    assert first["name"] != last["name"] and first["predicted_ns"] == min(first["rivals"].values())
    assert last["busiest_link_bytes"] > 16 << 20
    assert [each["from_bytes"] for each in content["ranges"]] == [1024, 16 << 20]


def test_links_of_other_speed_change_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """Latency alone: few steps for every size; bandwidth alone: few bytes for every size."""
    common = ("--ranks", "16", "--sizes", "64KiB", "--overhead", "0us")
    far = as_json(capsys, *common, "--bandwidth", "1000Gbit", "--latency", "10ms")
    thin = as_json(capsys, *common, "--bandwidth", "1Mbit", "--latency", "0us")
    names = [content["choices"][0]["name"] for content in (far, thin)]
    assert names[0] in ("direct", "naive") and names[1] in ("direct", "ring", "rabenseifner") and names[0] != names[1]
    assert far["profile"]["network"]["segments"] == [{"from_bytes": 0, "alpha_ns": 10**7, "ps_per_byte": 8}]


def test_fixed_order(capsys: pytest.CaptureFixture[str]) -> None:
    content = as_json(capsys, "-n", "6", "--sizes", "1KiB..64MiB", "--fixed-order")
    assert {each["name"] for each in content["choices"]} <= {"naive", "direct"}


def test_every_collective(capsys: pytest.CaptureFixture[str]) -> None:
    for collective in ("reduce_scatter", "allgather", "broadcast", "reduce", "alltoall"):
        content = as_json(capsys, "-n", "6", "--sizes", "1KiB", "--collective", collective)
        assert content["collective"] == collective
    assert plan("--collective", "reduce", "-n", "6", "--sizes", "1KiB") == 0
    assert "–" in capsys.readouterr().out, "there is no runner-up"


def test_costs_and_measured_choices_from_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    costs, table = tmp_path / "costs.yaml", tmp_path / "table.json"
    costs.write_text(yaml.safe_dump(default_profile("loopback").to_mapping()))
    content = as_json(capsys, "-n", "4", "--sizes", "1KiB", "--profile", str(costs))
    assert content["profile"] == default_profile("loopback").to_mapping()
    row = TableRow(collective="allreduce", from_bytes=0, to_bytes=None, schedule="library",
                   measured_s={"library": 0.5})  # fmt: skip
    measured = CollectiveTable(
        fingerprint="x", date="today", versions={}, topology="switch:2x2", ranks=4, profile=default_profile(),
        rows=(row,),
    )  # fmt: skip
    table.write_text(json.dumps(measured.to_mapping()))
    content = as_json(capsys, "--sizes", "1KiB", "--table", str(table))
    assert content["topology"] == "switch:2x2" and content["choices"][0]["name"] == "library"
    assert plan("--sizes", "1KiB", "--table", str(table)) == 0
    assert "measured the fastest" in capsys.readouterr().out


REFUSED = [
    ((), "--topology or --ranks is needed"),
    (("--ranks", "8", "--topology", "ring:9"), "--ranks: topology ring:9 has 9 ranks, got 8"),
    (("--ranks", "0"), "--ranks: needs a number of at least 1, got 0"),
    (("--topology", "rings:9"), "unknown topology 'rings'; did you mean 'ring'"),
    (("-n", "4", "--collective", "allredce"), "unknown collective 'allredce'; did you mean 'allreduce'"),
    (("-n", "4", "--sizes", "4KiB..1KiB"), "a range of sizes goes from"),
    (("-n", "4", "--bandwidth", "10GB"), "a bandwidth is written like 10Gbit"),
    (("-n", "4", "--bandwidth", "0Gbit"), "a bandwidth must be above 0"),
    (("-n", "4", "--latency", "20"), "a time is written like 20us"),
    (("-n", "4", "--profile", "nowhere"), "unknown profile 'nowhere'"),
    (("-n", "4", "--table", "nowhere.json"), "--table: cannot read nowhere.json"),
    (("-n", "4", "--profile", "."), "--profile: cannot read ."),
    (("-n", "4", "--profile", "loopback", "--table", "x"), "--profile: the table brings its own costs"),
    (("-n", "4", "--collective", "reduce", "--fixed-order"), "no schedule of reduce adds in the order of ranks"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refuses_in_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("windlass: ") and message in captured.err
