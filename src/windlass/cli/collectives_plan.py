"""``windlass collectives plan``: which schedule would be chosen for which size, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from windlass.errors import ConfigError, unknown
from windlass.plan.collective import SCHEDULES
from windlass.plan.linkcost import DEFAULT_PROFILES, Profile, changed_network, default_profile, profile_from_mapping
from windlass.plan.sizes import format_bytes, parse_bits_per_s, parse_ns, size_range
from windlass.plan.topology import TOPOLOGY_EXAMPLES, Topology, parse_topology
from windlass.report.units import duration, plain
from windlass.report.units import num_bytes as bytes_in_words

if TYPE_CHECKING:
    from windlass.tuning.collective_choice import Choice, SizeRange
    from windlass.tuning.collective_table import CollectiveTable

PLAIN_WIDTH = 200
"""Letters in a line that goes to a file."""
SIZES = "1KiB..64MiB"
PROFILE_HELP = f"Costs of links: {', '.join(DEFAULT_PROFILES)} (assumed figures), or a YAML file."


def plan_command(
    topology: Annotated[
        str | None, typer.Option(help=f"{TOPOLOGY_EXAMPLES}; default: a host for each rank, behind one switch.")
    ] = None,
    ranks: Annotated[int | None, typer.Option("--ranks", "-n", help="How many; default the topology's.")] = None,
    collective: Annotated[str, typer.Option(help=", ".join(SCHEDULES) + ".")] = "allreduce",
    sizes: Annotated[str, typer.Option(help="Bytes: a range by powers of 4, or a list.")] = SIZES,
    profile: Annotated[str | None, typer.Option(help=PROFILE_HELP)] = None,
    bandwidth: Annotated[str | None, typer.Option(help="Of a network card, e.g. 10Gbit.")] = None,
    latency: Annotated[str | None, typer.Option(help="Between hosts, e.g. 20us.")] = None,
    overhead: Annotated[str | None, typer.Option(help="Of each side for a message between hosts, e.g. 2us.")] = None,
    table: Annotated[Path | None, typer.Option(help="Measured table (JSON), which goes before the model.")] = None,
    fixed_order: Annotated[bool, typer.Option("--fixed-order", help="Add in the order of ranks only.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """List by size the schedule that would be chosen, its predicted time, the runner-up, and why."""
    if collective not in SCHEDULES:
        raise ConfigError(unknown("collective", collective, SCHEDULES))
    if table is not None and profile is not None:
        raise ConfigError("--profile: the table brings its own costs")
    measured = _read_table(table) if table is not None else None
    place = _topology(topology or (measured.topology if measured else None), ranks)
    if measured is not None and measured.ranks != place.size:
        raise ConfigError(f"--table: it is of {measured.ranks} ranks, the topology of {place.size}")
    costs = changed_network(
        measured.profile if measured else _profile(profile),
        bits_per_s=parse_bits_per_s(bandwidth) if bandwidth else None,
        latency_ns=parse_ns(latency) if latency else None,
        overhead_ns=parse_ns(overhead) if overhead else None,
    )
    wanted = size_range(sizes)

    from windlass.tuning.collective_choice import choose_schedule, ranges_of

    choices = [
        choose_schedule(collective, size, topology=place, profile=costs, table=measured, fixed_order=fixed_order)
        for size in wanted
    ]
    if json_output:
        print(json.dumps(_to_mapping(choices, ranges_of(choices), place, costs), ensure_ascii=False))
    else:
        _print_choices(choices, ranges_of(choices), place, costs)


def _topology(text: str | None, ranks: int | None) -> Topology:
    if text is None:
        if ranks is None:
            raise ConfigError("--topology or --ranks is needed, e.g. --topology switch:4x2")
        if ranks < 1:
            raise ConfigError(f"--ranks: needs a number of at least 1, got {ranks}")
        return parse_topology(f"switch:{ranks}x1")
    topology = parse_topology(text)
    if ranks is not None and ranks != topology.size:
        raise ConfigError(f"--ranks: topology {topology.text} has {topology.size} ranks, got {ranks}")
    return topology


def _profile(name: str | None) -> Profile:
    if name is None or name in DEFAULT_PROFILES or not Path(name).exists():
        return default_profile(name or next(iter(DEFAULT_PROFILES)))
    try:
        return profile_from_mapping(yaml.safe_load(Path(name).read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--profile: cannot read {name}: {' '.join(str(error).split())}") from error


def _read_table(path: Path) -> CollectiveTable:
    from windlass.tuning.collective_table import table_from_mapping

    try:
        return table_from_mapping(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--table: cannot read {path}: {' '.join(str(error).split())}") from error


# --- as a table ---------------------------------------------------------------------------------------------


def _print_choices(choices: list[Choice], ranges: list[SizeRange], topology: Topology, profile: Profile) -> None:
    console = Console(highlight=False)
    width = None if console.is_terminal else PLAIN_WIDTH
    hosts = f"{topology.size} ranks on {len(topology.hosts)} {'host' if len(topology.hosts) == 1 else 'hosts'}"
    table = Table(width=width)
    for name, side in COLUMNS.items():
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    for choice in choices:
        table.add_row(*_cells(choice, topology, profile))
    print(f"{choices[0].collective} on {topology.text}: {hosts}; costs {profile.source}")
    (console if width is None else Console(highlight=False, width=width)).print(table)
    for each in ranges:
        upper = f" to {format_bytes(each.to_bytes)}" if each.to_bytes != each.from_bytes else ""
        print(f"{format_bytes(each.from_bytes)}{upper}: {each.name}")


COLUMNS = {
    "size": "right", "schedule": "left", "predicted": "right", "runner-up": "left", "its time": "right",
    "busiest link": "right", "why": "left",
}  # fmt: skip


def _cells(choice: Choice, topology: Topology, profile: Profile) -> list[str]:
    name, time = choice.runner_up or ("–", None)
    busiest = _busiest(choice, topology, profile)
    return [
        format_bytes(choice.num_bytes),
        choice.name,
        _time(choice.predicted_ns),
        name,
        "–" if time is None else _time(time),
        "–" if busiest is None else plain(bytes_in_words(busiest)),
        choice.reason,
    ]


def _time(nanoseconds: int) -> str:
    return plain(duration(nanoseconds / 1e9))


def _busiest(choice: Choice, topology: Topology, profile: Profile) -> int | None:
    from windlass.simulation.collective_time import busiest_link_bytes

    if isinstance(choice.schedule, str) or not topology.num_links:
        return None
    return busiest_link_bytes(choice.schedule, choice.num_bytes, profile, topology)


# --- as JSON ------------------------------------------------------------------------------------------------


def _to_mapping(choices: list[Choice], ranges: list[SizeRange], topology: Topology, profile: Profile) -> dict[str, Any]:
    return {
        "collective": choices[0].collective,
        "topology": topology.text,
        "ranks": topology.size,
        "hosts": len(topology.hosts),
        "profile": profile.to_mapping(),
        "choices": [_choice_to_mapping(choice, topology, profile) for choice in choices],
        "ranges": [{"from_bytes": each.from_bytes, "to_bytes": each.to_bytes, "name": each.name} for each in ranges],
    }


def _choice_to_mapping(choice: Choice, topology: Topology, profile: Profile) -> dict[str, Any]:
    schedule = None if isinstance(choice.schedule, str) else choice.schedule
    return {
        "num_bytes": choice.num_bytes,
        "name": choice.name,
        "algorithm": choice.name.partition(":")[0],
        "pieces": schedule.setting.pieces if schedule else None,
        "inner": schedule.setting.inner if schedule else None,
        "segment_bytes": choice.segment_bytes,
        "predicted_ns": choice.predicted_ns,
        "busiest_link_bytes": _busiest(choice, topology, profile),
        "reason": choice.reason,
        "rivals": dict(choice.rivals),
    }
