"""``windlass bench cluster``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from windlass.errors import ConfigError
from windlass.plan.sizes import format_bytes, parse_ns, size_range
from windlass.runs.files import write_atomically

JUDGED_BYTES = 64 << 10
"""From here on the error of predictions is given."""
FLAT = ("ring", "recursive-doubling")


def bench_cluster_command(
    hosts: Annotated[int, typer.Option(help="Hosts: network namespaces of this machine.")] = 4,
    ranks_per_host: Annotated[int, typer.Option(help="Ranks on each host.")] = 2,
    latency: Annotated[str, typer.Option(help="From card to card; several settings comma-separated.")] = "5ms,500us",
    bandwidth: Annotated[
        str, typer.Option(help="Of each host's cable, in each direction; likewise.")
    ] = "50Mbit,20Mbit",
    sizes: Annotated[str, typer.Option(help="Sizes of buffers: a range by powers of four, or a list.")] = "4KiB..1MiB",
    turns: Annotated[int, typer.Option(help="Turns of each; medians are over them.")] = 5,
    library: Annotated[bool, typer.Option(help="Measure the MPI library's own too.")] = True,
    cut_after: Annotated[
        str | None, typer.Option(help="Instead: sum without end, and cut the last host's cable after so long.")
    ] = None,
    timeout: Annotated[str, typer.Option(help="With --cut-after: how long a rank waits for others.")] = "2s",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Allreduce by every schedule over a cluster of network namespaces, predicted beside measured."""
    from windlass.bench.cluster import check_setting, parse_links
    from windlass.bench.convplot import check_plot_path
    from windlass.cli.bench import _check_json
    from windlass.engine.namespaces import namespaces_trouble, pick_shaper

    settings = parse_links(latency, bandwidth)
    buffers = size_range(sizes)
    check_setting(hosts=hosts, per_host=ranks_per_host, turns=turns)
    _check_json(json_path)
    if plot is not None:
        check_plot_path(plot)
    trouble = namespaces_trouble()
    try:
        pick_shaper(latency_ns=settings[0].latency_ns)
    except ConfigError as error:
        trouble = trouble or str(error)
    if trouble:
        print(f"skipped: {trouble}")
        return
    if cut_after is not None:
        _cut(settings[0], hosts, ranks_per_host, buffers[-1], cut_after, timeout)
        return
    _measure(settings, hosts, ranks_per_host, buffers, turns, library=library, json_path=json_path, plot=plot)


def _measure(
    settings: list[Any], hosts: int, per_host: int, buffers: list[int], turns: int, *,
    library: bool, json_path: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    from windlass.bench.cluster import bench_cluster, describe_links, results_to_json
    from windlass.cli.bench import _versions
    from windlass.runs.folder import describe_machine

    machine = describe_machine(hosts=[], threads=1, versions=_versions())
    print(f"{machine['cpu']}, commit {machine['commit'] or '?'}: {hosts} hosts of {per_host}, {turns} turns, float32")
    print("all hosts share this machine's cores: links must be slow enough to be what is waited for")
    results = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for links in settings:
            task = progress.add_task(describe_links(links), total=None)

            def on_event(event: dict[str, Any], task: Any = task, name: str = describe_links(links)) -> None:
                what = {"point": "timing messages of", "size": "measured"}.get(event["kind"])
                if what:
                    progress.update(task, description=f"{name}: {what} {format_bytes(event['num_bytes'])}")

            results.append(
                bench_cluster(
                    links,
                    hosts=hosts,
                    per_host=per_host,
                    sizes=buffers,
                    turns=turns,
                    on_event=on_event,
                    library=library,
                )
            )
            progress.remove_task(task)
            _print(results[-1])
    _print_crossovers(results, buffers)
    if json_path is not None:
        write_atomically(json_path, results_to_json(results, machine))
    if plot is not None:
        from windlass.bench.clusterplot import draw_cluster

        draw_cluster(results, plot, title=f"Allreduce, {hosts} hosts of {per_host} ranks on one machine")


def _print(result: Any) -> None:
    from windlass.bench.cluster import describe_links

    print(f"\n{describe_links(result.links)}; {result.shaped_by}")
    for name in ("host", "network") if "host" in result.points else ("network",):
        cost = result.profile[name]
        parts = [_segment(each) for each in cost["segments"]]
        print(f"  {name}: overhead {cost['overhead_ns'] / 1e3:.1f} µs, {'; '.join(parts)}")
    print("\nms at the slowest rank: measured (predicted)\n")
    names = list(dict.fromkeys(row.by for row in result.rows))
    print("| buffer | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for num_bytes in dict.fromkeys(row.num_bytes for row in result.rows):
        cells = [_cell(row) for name in names for row in result.rows if (row.by, row.num_bytes) == (name, num_bytes)]
        print(f"| {format_bytes(num_bytes)} | " + " | ".join(cells) + " |")
    errors = result.errors(from_bytes=JUDGED_BYTES)
    if len(errors) > 1:
        worst = sorted((error, name) for name, error in errors.items() if name != "all")[::-1]
        listed = ", ".join(f"{name} {100 * error:.1f} %" for error, name in worst)
        print(f"\npredictions from {format_bytes(JUDGED_BYTES)} up are off by {100 * errors['all']:.1f} % in the mean")
        print(f"(geometric; by schedule: {listed})")
    _print_hierarchical(result)


def _segment(segment: dict[str, int]) -> str:
    latency_us, ps = segment["alpha_ns"] / 1e3, segment["ps_per_byte"]
    return f"from {format_bytes(segment['from_bytes'])} {latency_us:,.0f} µs + {ps:,} ps/byte"


def _cell(row: Any) -> str:
    return f"{1e3 * row.measured_s:,.1f}" + (f" ({1e3 * row.predicted_s:,.1f})" if row.predicted_s else "")


def _print_hierarchical(result: Any) -> None:
    """How many times as fast as flat schedules the best hierarchical one is."""
    measured = {(row.by, row.num_bytes): row.measured_s for row in result.rows}
    for num_bytes in dict.fromkeys(row.num_bytes for row in result.rows):
        ours = {
            by: time for (by, size), time in measured.items() if size == num_bytes and by.startswith("hierarchical")
        }
        if ours:
            best = min(ours, key=lambda by: ours[by])
            against = ", ".join(f"{measured[name, num_bytes] / ours[best]:.2f}× {name}" for name in FLAT)
            print(f"{format_bytes(num_bytes)}: {best} is {against}")


def _print_crossovers(results: list[Any], buffers: list[int]) -> None:
    from windlass.bench.cluster import describe_links

    print("\nwhat the chooser takes (the fastest measured)\n")
    print("| links | " + " | ".join(map(format_bytes, buffers)) + " |\n|---|" + "---|" * len(buffers))
    for result in results:
        cells = []
        for num_bytes in buffers:
            chosen, fastest = (result.fastest(num_bytes, measured=measured) for measured in (False, True))
            cells.append(chosen if chosen == fastest else f"{chosen} ({fastest})")
        print(f"| {describe_links(result.links)} | " + " | ".join(cells) + " |")
    print()
    for result in results:
        parts = [f"{name} from {format_bytes(num_bytes)}" for num_bytes, name in result.crossovers()]
        print(f"{describe_links(result.links)}, predicted to 16MiB: {', '.join(parts)}")


def _cut(links: Any, hosts: int, per_host: int, num_bytes: int, cut_after: str, timeout: str) -> None:
    from windlass.bench.cluster import cut_cluster

    message, after_s = cut_cluster(
        links, hosts=hosts, per_host=per_host, num_bytes=num_bytes, after_s=parse_ns(cut_after) / 1e9,
        timeout_s=parse_ns(timeout) / 1e9,
    )  # fmt: skip
    print(f"{after_s:.1f} s after the cable of host{hosts - 1} was cut: {message}")
