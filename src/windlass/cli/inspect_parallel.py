"""``windlass inspect --parallel``: what every worker holds and sends under a placement, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from windlass.errors import ConfigError, unknown
from windlass.optim.rules import UPDATE_RULES
from windlass.plan.derive import Derived, Description
from windlass.plan.graph import Graph, Layer
from windlass.plan.mesh import Mesh
from windlass.plan.sizes import parse_bytes
from windlass.plan.traffic import LayerTraffic
from windlass.report.units import num_bytes, plain

if TYPE_CHECKING:
    from torch import nn

BATCH_OF_WORKER = 128
"""Samples a worker where --batch is not given: those of Krizhevsky 2014."""
PLAIN_WIDTH = 200
WORDS = {
    "batch": "samples",
    "out": "outputs",
    "in": "inputs",
    "rows": "rows",
    "columns": "columns",
    "replicate": "nothing",
}
"""What an axis divides, by way."""
MEMORIES = {"D": "kept_bytes", "W": "weight_bytes", "∇D": "output_grad_bytes", "∇W": "weight_grad_bytes"}


@dataclass(frozen=True)
class Asked:
    """What the options say.

    Attributes:
        parallel: a placement's name or file.
        workers: how many; None: the mesh's, or 2.
        mesh: its text.
        rank: whose layers are shown.
        memory_limit: a size, or None.
        update: the update rule that the limit counts with.
    """

    parallel: str
    workers: int | None
    mesh: str | None
    rank: int
    memory_limit: str | None
    update: str


@dataclass(frozen=True)
class Found:
    """A placement with all that is known of it.

    Attributes:
        derived: what follows from it.
        graphs: every worker's part of the network, by rank.
        traffic: every worker's bytes, by rank and layer.
        needed: predicted most bytes of every worker's tensors in training, where gradients leave in buckets during
            the backward pass.
    """

    derived: Derived
    graphs: Sequence[Graph]
    traffic: Sequence[tuple[LayerTraffic, ...]]
    needed: Sequence[int]

    def totals(self, rank: int) -> dict[str, int]:
        """A worker's bytes in one step."""
        rows = self.traffic[rank]
        names = [f"{phase}_{way}" for phase in ("forward", "backward", "gradient") for way in ("sent", "received")]
        return {name: sum(getattr(row, name) for row in rows) for name in names}

    def layers(self, rank: int) -> dict[str, Layer]:
        """A worker's layers with their memories; the moves of the outputs are those of the main output's loss."""
        main = self.derived.outputs[0].tag
        names = {row.name for row in self.derived.describe(rank)}
        return {main if layer.name not in names else layer.name: layer for layer in self.graphs[rank].layers}

    def rows(self, rank: int) -> tuple[Description, ...]:
        """A worker's layers, and what else sends: labels, say."""
        layers = self.derived.describe(rank)
        known = {row.name for row in layers}
        others = (row.name for row in self.traffic[rank] if row.name not in known)
        return (*layers, *(Description(name, "", (), (), "", "") for name in others))


def num_workers(asked: Asked) -> int:
    """How many workers are meant; options that do not fit each other are refused.

    Raises:
        ConfigError: names the option.
    """
    mesh = Mesh.parse(asked.mesh) if asked.mesh is not None else None
    if asked.workers is not None and asked.workers < 1:
        raise ConfigError(f"--workers: needs a number of at least 1, got {asked.workers}")
    workers = asked.workers or (mesh.size if mesh is not None else 0) or _workers_of_file(asked.parallel) or 2
    if not 0 <= asked.rank < workers:
        raise ConfigError(f"--rank: there are workers 0 to {workers - 1}, got {asked.rank}")
    if asked.update not in UPDATE_RULES:
        raise ConfigError(f"--update: {unknown('update rule', asked.update, UPDATE_RULES)}")
    return workers


def _limit(text: str) -> int:
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise ConfigError(f"--memory-limit: {error}") from None


def _workers_of_file(parallel: str) -> int:
    from windlass.parallel.find import read_placement
    from windlass.plan.levers import PLACEMENT_FILES

    return read_placement(Path(parallel)).mesh.size if parallel.endswith(PLACEMENT_FILES) else 0


def find(module: nn.Module, input_shape: tuple[int, ...], asked: Asked, *, network: str, num_classes: int) -> Found:
    """Traces, checks, derives and predicts.

    Raises:
        ConfigError: the placement does not fit the network, or a worker's memory.
    """
    from windlass.objective import has_own_loss
    from windlass.parallel.find import find_placement
    from windlass.parallel.limits import check_memory, predict_all, training_bytes
    from windlass.parallel.trace import trace
    from windlass.plan.derive import derive
    from windlass.resources import OPTIMIZER_COPIES

    workers = num_workers(asked)
    traced = trace(module, input_shape)
    mesh = Mesh.parse(asked.mesh) if asked.mesh is not None else None
    placement = find_placement(asked.parallel, traced.ops, workers=workers, mesh=mesh, outputs=traced.outputs)
    derived = derive(traced.ops, placement, outputs=traced.outputs, own_loss=has_own_loss(module))
    graphs, leaving = (
        predict_all(module, derived, input_shape, network=network, num_classes=num_classes, keep_gradients=keep)
        for keep in (True, False)
    )
    copies = OPTIMIZER_COPIES[UPDATE_RULES[asked.update].torch_class]
    needed = [training_bytes(graph, derived, rank, optimizer_copies=copies) for rank, graph in enumerate(leaving)]
    if asked.memory_limit is not None:
        check_memory(needed, _limit(asked.memory_limit), placement=asked.parallel)
    return Found(derived, graphs, [derived.traffic(rank) for rank in range(workers)], needed)


# --- as JSON ------------------------------------------------------------------------------------------------


def to_mapping(found: Found, asked: Asked) -> dict[str, Any]:
    """Everything that the tables show."""
    mesh = found.derived.placement.mesh
    graph = found.graphs[asked.rank]
    layers = found.layers(asked.rank)
    traffic = {row.name: row for row in found.traffic[asked.rank]}
    rows = [
        {
            **asdict(row),
            "memories": {name: getattr(layers.get(row.name), key, 0) for name, key in MEMORIES.items()},
            "bytes": _bytes_of(traffic.get(row.name)),
        }
        for row in found.rows(asked.rank)
    ]
    workers = [
        {
            "rank": rank,
            "coordinates": list(mesh.coordinates(rank)),
            "memories": part.memories(),
            "peak_bytes": part.peak_bytes,
            "peak_at": part.peak_at,
            "training_bytes": found.needed[rank],
            "bytes": found.totals(rank),
        }
        for rank, part in enumerate(found.graphs)
    ]
    return {
        "network": graph.network,
        "placement": found.derived.placement.to_mapping(),
        "rank": asked.rank,
        "layers": rows,
        "workers": workers,
    }


def _bytes_of(row: LayerTraffic | None) -> dict[str, int]:
    return {name: value for name, value in asdict(row or LayerTraffic("")).items() if name != "name"}


# --- as text ------------------------------------------------------------------------------------------------


def print_placement(found: Found, asked: Asked, input_shape: tuple[int, ...]) -> None:
    """The tables of one worker's layers and of all workers, and what is sent."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    console.print(_layers_table(found, asked, input_shape))
    console.print(_workers_table(found, asked))
    for line in messages(found.derived.describe(asked.rank)):
        print(line)


def _layers_table(found: Found, asked: Asked, input_shape: tuple[int, ...]) -> Table:
    mesh, graph = found.derived.placement.mesh, found.graphs[asked.rank]
    layers = found.layers(asked.rank)
    traffic = {row.name: row for row in found.traffic[asked.rank]}
    totals, memories = found.totals(asked.rank), graph.memories()
    columns: list[tuple[str, Callable[[Description], str], str]] = [
        ("layer", lambda row: row.name, "total"),
        ("kind", lambda row: row.kind, ""),
        ("divided", lambda row: divided(row.ways, mesh), ""),
        ("output", lambda row: "×".join(map(str, row.local_shape)), ""),
    ]
    for name, key in MEMORIES.items():
        columns.append((name, _memory_of(layers, key), _size(memories[name])))
    for phase in ("forward", "backward", "gradient"):
        total = both(totals[f"{phase}_sent"], totals[f"{phase}_received"])
        columns.append((f"{phase} ↑↓", _phase_of(traffic, phase), total))
    batch = "×".join(map(str, input_shape))
    title = (
        f"{graph.network}, {asked.parallel} on {mesh}: worker {asked.rank} of {mesh.size}, all workers' input {batch}"
    )
    table = Table(title=title, show_footer=True)
    for number, (name, _, total) in enumerate(columns):
        table.add_column(name, footer=total, justify="left" if number < 3 else "right", overflow="fold")
    for row in found.rows(asked.rank):
        table.add_row(*(value(row) for _, value, _ in columns))
    return table


def _workers_table(found: Found, asked: Asked) -> Table:
    mesh = found.derived.placement.mesh
    table = Table(title="bytes of each worker in a step")
    names = ["worker", *mesh.names, "W", "sent ↑", "received ↓", "predicted peak", "at", f"in training, {asked.update}"]
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if name == "at" else "right", overflow="fold", no_wrap=number == 0)
    for rank, graph in enumerate(found.graphs):
        totals = found.totals(rank)
        ways = (sum(totals[name] for name in totals if name.endswith(way)) for way in ("sent", "received"))
        table.add_row(
            str(rank), *map(str, mesh.coordinates(rank)), _size(graph.memories()["W"]), *map(_size, ways),
            _size(graph.peak_bytes), graph.peak_at, _size(found.needed[rank]),
        )  # fmt: skip
    return table


def messages(rows: Sequence[Description]) -> list[str]:
    """What is sent before each layer, and back, in words."""
    lines = []
    for row in rows:
        ways = [f"{sign} {words}" for sign, words in (("→", row.moves), ("←", row.back_moves)) if words]
        if ways:
            lines.append(f"{row.name}: {'   '.join(ways)}")
    return lines or ["nothing is sent but sums of weights' gradients"]


def divided(ways: Sequence[str], mesh: Mesh) -> str:
    """What the axes divide.

    >>> divided(("batch", "out"), Mesh.parse("node:2,device:2"))
    'samples over node, outputs over device'
    """
    if len(mesh.axes) == 1:
        return ", ".join(WORDS[way] for way in ways)
    parts = [f"{WORDS[way]} over {name}" for way, name in zip(ways, mesh.names, strict=False) if way != "replicate"]
    return ", ".join(parts) or (WORDS["replicate"] if ways else "")


def _memory_of(layers: Mapping[str, Layer], key: str) -> Callable[[Description], str]:
    return lambda row: _size(getattr(layers.get(row.name), key, 0), zero="")


def _phase_of(traffic: Mapping[str, LayerTraffic], phase: str) -> Callable[[Description], str]:
    def cell(row: Description) -> str:
        found = traffic.get(row.name)
        return both(getattr(found, f"{phase}_sent", 0), getattr(found, f"{phase}_received", 0))

    return cell


def both(sent: int, received: int) -> str:
    """Bytes each way; one number where they are equal.

    >>> both(2048, 2048), both(0, 0), both(1024, 2048)
    ('2.00 KiB', '', '1.00 KiB ↑ 2.00 KiB ↓')
    """
    if sent == received:
        return _size(sent, zero="")
    return f"{_size(sent)} ↑ {_size(received)} ↓"


def _size(size: float, *, zero: str = "0 B") -> str:
    return plain(num_bytes(size)) if size else zero
