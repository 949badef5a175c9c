"""``windlass collectives``: schedules of collective operations, printed and drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from windlass.check.collective import check_schedule, starts
from windlass.errors import ConfigError, unknown
from windlass.plan.collective import SCHEDULES, Op, Receive, Schedule, Send, make_schedule
from windlass.report.collective_picture import MEANINGS, check_picture, draw_schedule, runs

collectives_app = typer.Typer(no_args_is_help=True, help="Collective operations as schedules.", rich_markup_mode=None)

MOST_CHECKED, MOST_RANKS = 128, 10_000
"""Of more ranks, one rank's program is shown, unchecked; or nothing."""
PLAIN_WIDTH, MOST_COLUMNS = 200, 32
"""Letters in a line that goes to a file; ranks side by side."""
SIGNS: dict[Op, str] = {"copy": "=", "add": "+", "fold": "Σ"}
ROOTED = ("broadcast", "reduce")

Times = list[list[list[int]]]


@collectives_app.callback()
def collectives_group() -> None:
    """Collective operations as schedules: which rank sends which chunk to whom, step by step."""


@collectives_app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="Schedule, e.g. " + ", ".join(SCHEDULES["allreduce"]) + ".")],
    ranks: Annotated[
        int | None, typer.Option("--ranks", "-n", help="How many ranks; default 4, or the hosts'.")
    ] = None,
    collective: Annotated[str, typer.Option(help=", ".join(SCHEDULES) + ".")] = "allreduce",
    root: Annotated[int | None, typer.Option(help="Where a broadcast begins and a reduction ends; default 0.")] = None,
    pieces: Annotated[int | None, typer.Option(help="Chunks of a pipelined schedule; default 8.")] = None,
    hosts: Annotated[str | None, typer.Option(help="Hosts x ranks on each, e.g. 2x3; or ranks of each: 3+2+1.")] = None,
    inner: Annotated[
        str | None, typer.Option(help="Schedule between hosts of a hierarchical one; default ring.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Show the program of this rank alone.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it to this file: .png, .svg or .pdf.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Print a schedule, checked, and draw it: a lane for each rank, time downwards, an arrow for each message."""
    schedule = _schedule(name, collective, ranks, root=root, pieces=pieces, hosts=hosts, inner=inner)
    if rank is not None and not 0 <= rank < schedule.size:
        raise ConfigError(f"--rank: there are ranks 0 to {schedule.size - 1}, got {rank}")
    if plot is not None:
        check_picture(schedule, plot)
    times = None
    if schedule.size <= MOST_CHECKED:
        check_schedule(schedule)
        times = starts(schedule)
    if json_output:
        print(json.dumps(_to_mapping(schedule, times, rank), ensure_ascii=False))
    else:
        _print_schedule(schedule, times, rank)
    if plot is not None:
        draw_schedule(schedule, plot)
        if not json_output:
            print(f"drawn: {plot}")


def _schedule(
    name: str,
    collective: str,
    ranks: int | None,
    *,
    root: int | None,
    pieces: int | None,
    hosts: str | None,
    inner: str | None,
) -> Schedule:
    """The schedule that was asked for; options that would change nothing are refused."""
    collective = collective.replace("-", "_")
    if collective not in SCHEDULES:
        raise ConfigError(f"--collective: {unknown('collective', collective, SCHEDULES)}")
    others = [other for other, table in SCHEDULES.items() if name in table]
    if name not in SCHEDULES[collective] and others:
        raise ConfigError(f"{name} is no schedule of {collective}: add --collective {' or '.join(others)}")
    if root is not None and collective not in ROOTED:
        raise ConfigError(f"--root: {collective} has no root; {' and '.join(ROOTED)} have")
    if inner is not None and name != "hierarchical":
        raise ConfigError(f"--inner: is for hierarchical, got {name}")
    if pieces is not None and "pipelined-tree" not in (name, inner):
        raise ConfigError(f"--pieces: is for pipelined-tree, alone or as --inner, got {name}")
    if name == "hierarchical" and hosts is None:
        raise ConfigError("hierarchical needs --hosts, e.g. --hosts 2x3 for two hosts with three ranks each")
    widths = parse_hosts(hosts) if hosts is not None else []
    size = ranks if ranks is not None else sum(widths) or 4
    if not 1 <= size <= MOST_RANKS:
        raise ConfigError(f"--ranks: needs a number from 1 to {MOST_RANKS}, got {size}")
    if widths and sum(widths) != size:
        raise ConfigError(f"--hosts {hosts}: holds {sum(widths)} ranks, --ranks says {size}")
    bounds = [sum(widths[:host]) for host in range(len(widths) + 1)]
    return make_schedule(
        collective, name, size, root=root or 0, pieces=8 if pieces is None else pieces, inner=inner or "ring",
        hosts=[range(first, last) for first, last in pairwise(bounds)],
    )  # fmt: skip


def parse_hosts(text: str) -> list[int]:
    """How many ranks each host has.

    >>> parse_hosts("2x3"), parse_hosts("3+2+1")
    ([3, 3], [3, 2, 1])
    """
    if match := re.fullmatch(r"([0-9]{1,5})[x×]([0-9]{1,5})", text):
        widths = [int(match[2])] * min(int(match[1]), MOST_RANKS + 1)
    elif re.fullmatch(r"[0-9]{1,5}(\+[0-9]{1,5})*", text):
        widths = [int(width) for width in text.split("+")]
    else:
        widths = []
    if not widths or min(widths) < 1:
        raise ConfigError(f"--hosts: needs hosts x ranks on each, as 2x3, or the ranks of each, as 3+2+1; got {text!r}")
    return widths


# --- as text ------------------------------------------------------------------------------------------------


def _print_schedule(schedule: Schedule, times: Times | None, rank: int | None) -> None:
    console = Console(highlight=False)
    width = console.width if console.is_terminal else PLAIN_WIDTH
    console = Console(highlight=False, width=width)
    print("\n".join(_head(schedule, times)))
    if rank is None and times is not None and schedule.size <= MOST_COLUMNS:
        table = _table_of_all(schedule, times)
        if Measurement.get(console, console.options.update(max_width=100_000), table).maximum <= width:
            console.print(table)
            print(_legend(schedule))
            return
    if rank is None:
        print("All ranks do not fit here; this is the program of rank 0. --rank shows another, --plot draws all.")
    console.print(_table_of_one(schedule, times, rank or 0))


def _head(schedule: Schedule, times: Times | None) -> list[str]:
    name, meaning = schedule.algorithm, SCHEDULES[schedule.collective][schedule.algorithm].meaning
    more = [_count(schedule.size, "rank"), _count(schedule.num_chunks, "chunk")]
    if schedule.collective in ROOTED:
        more.append(f"root {schedule.setting.root}")
    if schedule.setting.hosts:
        more.append(f"hosts of {' + '.join(str(len(host)) for host in schedule.setting.hosts)}")
    if name == "hierarchical":
        more.append(f"{schedule.setting.inner} between hosts")
    lines = [f"{schedule.collective} {name}, {', '.join(more)}: {meaning}"]
    if times is None:
        return [*lines, f"Not checked: more than {MOST_CHECKED} ranks."]
    sent = [[m for step in schedule.steps(rank) for m in step if isinstance(m, Send)] for rank in range(schedule.size)]
    messages = max(map(len, sent))
    buffer = schedule.size if schedule.collective == "alltoall" else schedule.num_chunks
    most = max(sum(len(message.chunks) for message in mine) for mine in sent) / buffer
    units = _num_units(times)
    lines.append(
        f"{_count(units, 'unit')} of time, if every message takes one; {_count(sum(map(len, sent)), 'message')}, "
        f"of which a rank sends at most {messages}, {most:.3g} times its buffer. Checked."
    )
    return lines


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _num_units(times: Times) -> int:
    return 1 + max((begin for rank in times for step in rank for begin in step), default=-1)


def _table_of_all(schedule: Schedule, times: Times) -> Table:
    """A row for each unit of time, a column for each rank."""
    cells: list[list[list[str]]] = [[[] for _ in range(schedule.size)] for _ in range(_num_units(times))]
    for rank in range(schedule.size):
        for step, begun in zip(schedule.steps(rank), times[rank], strict=True):
            for message, begin in zip(step, begun, strict=True):
                cells[begin][rank].append(_short(message, schedule.num_chunks))
    table = Table(show_lines=any(len(cell) > 1 for row in cells for cell in row))
    table.add_column("time", justify="right")
    for rank in range(schedule.size):
        table.add_column(f"rank {rank}", no_wrap=True)
    for time, row in enumerate(cells):
        table.add_row(str(time), *("\n".join(cell) for cell in row))
    return table


def _short(message: Send | Receive, num_chunks: int) -> str:
    what = runs(message.chunks) if num_chunks > 1 else ""
    if isinstance(message, Send):
        return f"→{message.to}: {what}" if what else f"→{message.to}"
    return f"←{message.source}: {SIGNS[message.op]}{what}"


def _legend(schedule: Schedule) -> str:
    used = _ops(schedule)
    if not used:
        return "Nothing is sent."
    example = "→1: 5 chunk 5 to rank 1" if schedule.num_chunks > 1 else "→1 to rank 1"
    signs = [f"{SIGNS[op]} {meaning}" for op, meaning in MEANINGS.items() if op in used]
    blocks = [f"chunk {schedule.size}s + d goes from rank s to rank d"] if schedule.collective == "alltoall" else []
    return "; ".join([example, *signs, *blocks])


def _ops(schedule: Schedule) -> set[Op]:
    everyone = range(schedule.size)
    steps = (step for rank in everyone for step in schedule.steps(rank))
    return {message.op for step in steps for message in step if isinstance(message, Receive)}


def _table_of_one(schedule: Schedule, times: Times | None, rank: int) -> Table:
    """A row for each step of a rank."""
    table = Table(title=f"rank {rank}", title_justify="left")
    for name in ("step", "time") if times else ("step",):
        table.add_column(name, justify="right")
    table.add_column("sends")
    table.add_column("receives")
    for number, step in enumerate(schedule.steps(rank)):
        sends = [f"{_words(m.chunks)} to rank {m.to}" for m in step if isinstance(m, Send)]
        receives = [
            f"{_words(m.chunks)} from rank {m.source}, {MEANINGS[m.op]}" for m in step if isinstance(m, Receive)
        ]
        head = [str(number)] + ([runs(sorted(set(times[rank][number])))] if times else [])
        table.add_row(*head, "\n".join(sends), "\n".join(receives))
    return table


def _words(chunks: Sequence[int]) -> str:
    return f"{'chunk' if len(chunks) == 1 else 'chunks'} {runs(chunks)}"


# --- as JSON ------------------------------------------------------------------------------------------------


def _to_mapping(schedule: Schedule, times: Times | None, rank: int | None) -> dict[str, Any]:
    """The schedule and the program of every rank, or of one."""
    if rank is None and times is None:
        raise ConfigError(f"--json: of more than {MOST_CHECKED} ranks, needs --rank for the program of one")
    setting = schedule.setting
    shown = range(schedule.size) if rank is None else [rank]
    return {
        "collective": schedule.collective,
        "algorithm": schedule.algorithm,
        "ranks": schedule.size,
        "chunks": schedule.num_chunks,
        "root": setting.root if schedule.collective in ROOTED else None,
        "hosts": [list(host) for host in setting.hosts],
        "inner": setting.inner if schedule.algorithm == "hierarchical" else None,
        "ordered": schedule.ordered,
        "units": _num_units(times) if times else None,
        "checked": times is not None,
        "programs": {str(each): _program(schedule, times, each) for each in shown},
    }


def _program(schedule: Schedule, times: Times | None, rank: int) -> list[list[dict[str, Any]]]:
    return [
        [
            _message(message) | ({"time": times[rank][number][place]} if times else {})
            for place, message in enumerate(step)
        ]
        for number, step in enumerate(schedule.steps(rank))
    ]


def _message(message: Send | Receive) -> dict[str, Any]:
    if isinstance(message, Send):
        return {"send_to": message.to, "chunks": list(message.chunks)}
    return {"receive_from": message.source, "chunks": list(message.chunks), "op": message.op}
