"""``windlass collectives show``: what it prints, draws and refuses."""

from __future__ import annotations

import itertools
import json
import re
import struct
import xml.etree.ElementTree as Xml
from pathlib import Path
from typing import Any

import pytest

from windlass.cli import main
from windlass.plan.collective import SCHEDULES, Receive, Send, make_schedule
from windlass.report.collective_picture import arrows, draw_schedule, is_turning

NAMES = [(collective, name) for collective, table in SCHEDULES.items() for name in table]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["collectives", "show", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def options(collective: str, name: str) -> list[str]:
    """What the command needs to show a schedule of 6 ranks."""
    return [name, "--collective", collective, "-n", "6", *(["--hosts", "2x3"] if name == "hierarchical" else [])]


# --- printed ------------------------------------------------------------------------------------------------


def test_a_table_of_time_and_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "ring", "-n", "3").splitlines()
    assert lines[0] == "allreduce ring, 3 ranks, 3 chunks: chunks go round twice"
    assert lines[1] == (
        "4 units of time, if every message takes one; 12 messages, of which a rank sends at most 4, "
        "1.33 times its buffer. Checked."
    )
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines if "│" in line]
    assert cells[0] == ["0", "→1: 2", "→2: 0", "→0: 1"]
    assert cells[1] == ["", "←2: +1", "←0: +2", "←1: +0"]
    assert cells[-1] == ["", "←2: =1", "←0: =2", "←1: =0"]
    assert lines[-1] == "→1: 5 chunk 5 to rank 1; = copied; + added"


def test_the_program_of_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "binomial", "-n", "6", "--rank", "4")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert rows == [
        ["0", "0", "", "chunk 0 from rank 5, added"],
        ["1", "2", "chunk 0 to rank 0", ""],
        ["2", "3", "", "chunk 0 from rank 0, copied"],
        ["3", "4", "chunk 0 to rank 5", ""],
    ]


def test_of_many_ranks_one_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "recursive-doubling", "-n", "64")
    assert "All ranks do not fit here; this is the program of rank 0." in out and "…" not in out
    assert "chunk 0 to rank 32" in out and "Checked." in out
    out = shown(capsys, "recursive-doubling", "-n", "4096", "--rank", "4095")
    assert "Not checked: more than 128 ranks." in out and "chunk 0 to rank 2047" in out


@pytest.mark.parametrize(("collective", "name"), NAMES)
def test_every_schedule_as_json_is_the_schedule(capsys: pytest.CaptureFixture[str], collective: str, name: str) -> None:
    assert shown(capsys, *options(collective, name)).startswith(f"{collective} {name}, 6 ranks, ")
    found: dict[str, Any] = json.loads(shown(capsys, *options(collective, name), "--json"))
    hosts = [range(3), range(3, 6)] if name == "hierarchical" else []
    schedule = make_schedule(collective, name, 6, hosts=hosts)
    assert (found["collective"], found["algorithm"], found["ranks"]) == (collective, name, 6)
    assert found["chunks"] == schedule.num_chunks and found["checked"]
    assert found["hosts"] == [list(host) for host in hosts]
    for rank in range(6):
        read = [tuple(map(message_of, step)) for step in found["programs"][str(rank)]]
        assert read == [tuple(map(plain, step)) for step in schedule.steps(rank)]
    times = [m["time"] for program in found["programs"].values() for step in program for m in step]
    assert found["units"] == max(times) + 1


def message_of(row: dict[str, Any]) -> Send | Receive:
    chunks = tuple(row["chunks"])
    if "send_to" in row:
        return Send(row["send_to"], chunks)
    return Receive(row["receive_from"], chunks, row["op"])


def plain(message: Send | Receive) -> Send | Receive:
    if isinstance(message, Send):
        return Send(message.to, tuple(message.chunks))
    return Receive(message.source, tuple(message.chunks), message.op)


def test_json_of_one_rank_of_many(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, "ring", "-n", "1000", "--rank", "7", "--json"))
    assert list(found["programs"]) == ["7"] and len(found["programs"]["7"]) == 1998
    assert found["units"] is None and not found["checked"]


def test_hosts_say_how_many_ranks_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "hierarchical", "--hosts", "3+2+1", "--inner", "pipelined-tree", "--pieces", "2")
    assert "allreduce hierarchical, 6 ranks, 2 chunks, hosts of 3 + 2 + 1, pipelined-tree between hosts: " in out
    assert "root 2" in shown(capsys, "binomial", "--collective", "broadcast", "--root", "2", "-n", "5")
    assert "reduce_scatter ring, 4 ranks" in shown(capsys, "ring", "--collective", "reduce-scatter")
    assert "Nothing is sent." in shown(capsys, "ring", "-n", "1")


# --- refused ------------------------------------------------------------------------------------------------

REFUSED = [
    ("rng", "unknown schedule of allreduce 'rng'; did you mean 'ring'"),
    ("bruck", "bruck is no schedule of allreduce: add --collective allgather or alltoall"),
    ("ring --collective allredce", "--collective: unknown collective 'allredce'; did you mean 'allreduce'"),
    ("ring -n 0", "--ranks: needs a number from 1 to 10000, got 0"),
    ("ring -n many", "Invalid value for '--ranks'"),
    ("ring --root 1", "--root: allreduce has no root; broadcast and reduce have"),
    ("binomial --collective reduce --root 4", "root 4 is not one of ranks 0 to 3"),
    ("ring --rank 4", "--rank: there are ranks 0 to 3, got 4"),
    ("ring --pieces 2", "--pieces: is for pipelined-tree"),
    ("pipelined-tree --pieces 0", "needs at least 1 piece, got 0"),
    ("ring --inner ring", "--inner: is for hierarchical, got ring"),
    ("hierarchical", "hierarchical needs --hosts, e.g. --hosts 2x3"),
    ("hierarchical --hosts 2x2 --inner rng", "unknown schedule between hosts 'rng'; did you mean 'ring'"),
    ("hierarchical --hosts 2x2 --inner hierarchical", "unknown schedule between hosts 'hierarchical'"),
    ("ring --hosts 2y3", "--hosts: needs hosts x ranks on each, as 2x3, or the ranks of each, as 3+2+1; got '2y3'"),
    ("ring --hosts 3+0", "got '3+0'"),
    ("ring -n 5 --hosts 2x3", "--hosts 2x3: holds 6 ranks, --ranks says 5"),
    ("ring --hosts 99999x99999", "--ranks: needs a number from 1 to 10000, got"),
    ("ring -n 200 --json", "--json: of more than 128 ranks, needs --rank"),
    ("ring --plot x.gif", "--plot x.gif: needs a name that ends in .png, .svg, .pdf"),
    ("ring --plot none/x.png", "--plot none/x.png: there is no folder none"),
    ("ring -n 40 --plot x.png", "--plot x.png: a picture shows 32 ranks at most, got 40"),
    ("pipelined-tree --pieces 200 --plot x.png", "a picture shows 150 rows of time at most, got 203"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_wrong_usage_is_one_line_and_2(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert main(["collectives", "show", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err
    assert not list(Path().iterdir())


# --- drawn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("collective", "name"), NAMES)
def test_every_schedule_can_be_drawn(capsys: pytest.CaptureFixture[str], collective: str, name: str) -> None:
    out = shown(capsys, *options(collective, name), "--plot", "a.svg")
    assert out.endswith("drawn: a.svg\n")
    texts = [node.text for node in Xml.parse("a.svg").iter() if node.text and node.text.strip()]
    assert f"{collective}: {name}, 6 ranks" in texts
    assert {f"rank {rank}" for rank in range(6)} <= set(texts)


def test_the_same_schedule_gives_the_same_file(tmp_path: Path) -> None:
    schedule = make_schedule("allreduce", "rabenseifner", 6)
    for name in ("a.svg", "b.svg"):
        draw_schedule(schedule, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    for name, head in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.PNG", b"\x89PNG")):
        draw_schedule(schedule, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(head)


def test_pictures_grow_with_ranks_and_time(tmp_path: Path) -> None:
    sizes = []
    for size in (1, 2, 16):
        draw_schedule(make_schedule("allreduce", "ring", size), tmp_path / "a.png")
        sizes.append(struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24]))
    assert sizes[0][0] <= sizes[1][0] < sizes[2][0] and sizes[0][1] < sizes[1][1] < sizes[2][1]


@pytest.mark.parametrize(("collective", "name"), NAMES)
def test_there_is_an_arrow_for_every_message(collective: str, name: str) -> None:
    hosts = [(0, 2, 4), (1, 3, 5)] if name == "hierarchical" else []
    schedule = make_schedule(collective, name, 6, hosts=hosts)
    lanes = [0, 3, 1, 4, 2, 5] if hosts else range(6)
    wanted = [
        (lanes[rank], lanes[m.to], tuple(m.chunks))
        for rank in range(6)
        for step in schedule.steps(rank)
        for m in step
        if isinstance(m, Send)
    ]
    assert sorted((arrow.source, arrow.to, arrow.chunks) for arrow in arrows(schedule)) == sorted(wanted)


def test_arrows_go_round_where_all_go_the_same_way() -> None:
    def turning(collective: str, name: str) -> list[bool]:
        rows = itertools.groupby(arrows(make_schedule(collective, name, 5)), key=lambda arrow: arrow.row)
        return [is_turning(list(row), 5) for _, row in rows]

    assert all(turning("allreduce", "ring")) and all(turning("alltoall", "bruck"))
    assert not any(turning("allreduce", "naive"))


# --- the page -----------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_shows_schedules_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Its pictures are there and have the table's words; its commands run."""
    page = (DOCS / "collectives.md").read_text()
    found = re.findall(r"\]\(images/((\w+)-([\w-]+)\.svg)\)", page)
    pictures = [(file, collective, name) for file, collective, name in found if name in SCHEDULES.get(collective, {})]
    assert {name for _, collective, name in pictures if collective == "allreduce"} == set(SCHEDULES["allreduce"])
    for file, collective, name in pictures:
        texts = [node.text for node in Xml.parse(DOCS / "images" / file).iter() if node.text]
        assert any(text.startswith(f"{collective}: {name}, ") for text in texts)
        assert SCHEDULES[collective][name].meaning in texts
    commands = re.findall(r"windlass collectives show ([^`#\n]*)", page)
    assert len(commands) >= 4
    for command in commands:
        shown(capsys, *command.split())
