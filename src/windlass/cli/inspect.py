"""``windlass inspect``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from windlass.cli.inspect_parallel import (
    BATCH_OF_WORKER,
    PLAIN_WIDTH,
    Asked,
    find,
    num_workers,
    print_placement,
    to_mapping,
)
from windlass.cli.inspect_precision import NOTES, Compared, compare, comparison
from windlass.cli.inspect_precision import to_mapping as beside_float32
from windlass.cli.levers import MESH_HELP, PARALLEL_HELP, PRECISION_HELP
from windlass.config import assignment
from windlass.errors import ConfigError
from windlass.networks import NETWORKS, check_network_name
from windlass.plan.graph import Graph, Layer
from windlass.plan.recipe import parse_recipe
from windlass.report.units import num_bytes, plain

if TYPE_CHECKING:
    from torch import nn


def inspect_command(
    network: Annotated[str, typer.Argument(help="Built-in name, or package.module:function.")],
    batch: Annotated[
        int | None,
        typer.Option(help="Samples of a step on one worker, default 1; with --parallel of all, default 128 each."),
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Classes; default the network's own.")] = None,
    channels: Annotated[int | None, typer.Option(help="Channels of the input; default the network's own.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the input; default the network's own.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="network_args.KEY=VALUE of the network's constructor.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the DAG, or the placement, into this file (.png, .svg, .pdf).")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"Memories under a recipe, beside those of float32. {PRECISION_HELP}")
    ] = None,
    parallel: Annotated[
        str | None, typer.Option(help=f"Instead, what each worker holds and sends. {PARALLEL_HELP}")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="With --parallel: how many; default the mesh's, or 2.")] = None,
    mesh: Annotated[str | None, typer.Option(help=f"With --parallel: {MESH_HELP}")] = None,
    rank: Annotated[int | None, typer.Option(help="With --parallel: the worker whose layers are shown.")] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="With --parallel: refuse what needs more on any worker, as 500MiB.")
    ] = None,
    update: Annotated[
        str | None, typer.Option(help="With --parallel: the update rule of training; default momentum.")
    ] = None,
) -> None:
    """Print a network's layers: shapes, parameters, multiply-adds, and the four memories of training."""
    recipe = parse_recipe(precision or "float32")
    if parallel is not None:
        if precision is not None:
            raise ConfigError("--precision: is there for one worker alone; leave out --precision or --parallel")
        asked = Asked(parallel, workers, mesh, rank or 0, memory_limit, update or "momentum")
        size = _batch(batch, default=BATCH_OF_WORKER * num_workers(asked))
        module, shape, num_classes = build(
            network, batch=size, classes=classes, channels=channels, size=image_size, settings=settings or []
        )
        _inspect_placement(module, shape, asked, network=network, num_classes=num_classes, json_output=json_output,
                           plot=plot)  # fmt: skip
        return
    given = {"--workers": workers, "--mesh": mesh, "--rank": rank, "--memory-limit": memory_limit, "--update": update}
    for option, value in given.items():
        if value is not None:
            raise ConfigError(f"{option}: says something about a placement, which --parallel names")
    batch = _batch(batch, default=1)
    module, shape, num_classes = build(
        network, batch=batch, classes=classes, channels=channels, size=image_size, settings=settings or []
    )
    compared: Compared | None = None
    if recipe.is_plain:
        graph = _capture(module, shape, network=network, num_classes=num_classes)
    else:
        compared = compare(module, shape, recipe, network=network, num_classes=num_classes)
        graph = compared.after
    if plot is not None:
        from windlass.report.dag import draw_graph

        draw_graph(graph, plot)
    if json_output:
        totals = {
            "num_parameters": graph.num_parameters,
            "forward_macs": graph.forward_macs,
            "backward_macs": graph.backward_macs,
            "memories": graph.memories(),
        }
        beside = {} if compared is None else beside_float32(compared)
        print(json.dumps({**dataclasses.asdict(graph), "totals": totals, **beside}, ensure_ascii=False))
        return
    _print_graph(graph)
    if compared is not None:
        _console().print(comparison(compared))
        for note in NOTES:
            print(note)
    if plot is not None:
        print(f"drawn: {plot}")


def _batch(batch: int | None, *, default: int) -> int:
    return default if batch is None else batch


def _inspect_placement(
    module: nn.Module, input_shape: tuple[int, ...], asked: Asked, *, network: str, num_classes: int,
    json_output: bool, plot: Path | None,
) -> None:  # fmt: skip
    if plot is not None:
        from windlass.report.placement_picture import check_placement_picture

        check_placement_picture(plot, workers=num_workers(asked))
    found = find(module, input_shape, asked, network=network, num_classes=num_classes)
    if plot is not None:
        from windlass.report.placement_picture import draw_placement

        title = f"{network}, {asked.parallel}, {input_shape[0]} samples a step"
        draw_placement(found.derived, plot, title=title)
    if json_output:
        print(json.dumps(to_mapping(found, asked), ensure_ascii=False))
        return
    print_placement(found, asked, input_shape)
    if plot is not None:
        print(f"drawn: {plot}")


def build_and_capture(
    network: str,
    *,
    batch: int,
    classes: int | None,
    channels: int | None,
    size: int | None,
    settings: list[str],
) -> tuple[nn.Module, Graph]:
    """Builds and captures a network by name; what is not given is the network's own default."""
    module, shape, num_classes = build(
        network, batch=batch, classes=classes, channels=channels, size=size, settings=settings
    )
    return module, _capture(module, shape, network=network, num_classes=num_classes)


def _capture(module: nn.Module, shape: tuple[int, ...], *, network: str, num_classes: int) -> Graph:
    from windlass.networks.capture import capture

    return capture(module, shape, name=network, num_classes=num_classes)


def build(
    network: str,
    *,
    batch: int,
    classes: int | None,
    channels: int | None,
    size: int | None,
    settings: list[str],
) -> tuple[nn.Module, tuple[int, int, int, int], int]:
    """Builds a network by name, with the shape of its input and the number of its classes."""
    check_network_name(network)
    if batch < 1:
        raise ConfigError(f"--batch: needs a number of at least 1, got {batch}")
    for option, value in (("--classes", classes), ("--channels", channels), ("--image-size", size)):
        if value is not None and value < 1:
            raise ConfigError(f"{option}: needs a number of at least 1, got {value}")
    arguments: dict[str, object] = {}
    for setting in settings:
        mapping = assignment(setting)
        if set(mapping) != {"network_args"} or not isinstance(mapping["network_args"], dict):
            raise ConfigError(f"--set: needs network_args.KEY=VALUE here, got {setting!r}")
        arguments |= mapping["network_args"]
    entry = NETWORKS.get(network)
    num_classes = classes or (entry.num_classes if entry else 10)
    in_channels = channels or (entry.in_channels if entry else 3)
    side = size or (entry.default_size if entry else 32)

    from windlass.networks import build_network

    module = build_network(network, num_classes=num_classes, in_channels=in_channels, image_size=side, **arguments)
    return module, (batch, in_channels, side, side), num_classes


Column = tuple[str, Callable[[Layer], str]]


def _print_graph(graph: Graph) -> None:
    parameters, macs = max(graph.num_parameters, 1), max(graph.forward_macs + graph.backward_macs, 1)
    columns: list[tuple[str, str, Callable[[Layer], str], str]] = [
        ("layer", "left", lambda layer: layer.name, "total"),
        ("kind", "left", lambda layer: layer.kind, ""),
        ("inputs", "left", lambda layer: ", ".join(layer.inputs), ""),
        ("output", "right", lambda layer: "×".join(map(str, layer.output_shape)), ""),
        ("parameters", "right", lambda layer: f"{layer.num_parameters:,}", f"{graph.num_parameters:,}"),
        ("share", "right", lambda layer: f"{layer.num_parameters / parameters:.1%}", ""),
        ("forward MACs", "right", lambda layer: f"{layer.forward_macs:,}", f"{graph.forward_macs:,}"),
        ("backward MACs", "right", lambda layer: f"{layer.backward_macs:,}", f"{graph.backward_macs:,}"),
        ("share", "right", lambda layer: f"{(layer.forward_macs + layer.backward_macs) / macs:.1%}", ""),
    ]
    memories = graph.memories()
    fields = {"D": "kept_bytes", "W": "weight_bytes", "∇D": "output_grad_bytes", "∇W": "weight_grad_bytes"}
    for name, attribute in fields.items():
        columns.append((name, "right", _bytes_of(attribute), _size(memories[name])))
    console = _console()
    table = Table(title=_title(graph), width=None if console.is_terminal else console.width)
    for name, side, _, total in columns:
        table.add_column(name, footer=total, justify="left" if side == "left" else "right", overflow="fold")
    table.show_footer = True
    for layer in graph.layers:
        table.add_row(*(value(layer) for _, _, value, _ in columns))
    console.print(table)
    print(
        f"predicted peak of a step: {_size(graph.peak_bytes)}, at {graph.peak_at} "
        f"(input and labels {_size(graph.input_bytes)} included)"
    )


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def _title(graph: Graph) -> str:
    number_format = "" if graph.number_format == "float32" else f", {graph.number_format}"
    return f"{graph.network}, input {'×'.join(map(str, graph.input_shape))}{number_format}"


def _bytes_of(attribute: str) -> Callable[[Layer], str]:
    return lambda layer: _size(getattr(layer, attribute))


def _size(size: float) -> str:
    return plain(num_bytes(size))
