"""Pictures of placements: what a column shows, and that every placement can be drawn."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from placement_nets import NETS, alexnet, chain
from windlass.errors import ConfigError
from windlass.plan.derive import Derived, derive
from windlass.plan.layout import Split
from windlass.plan.mesh import Mesh
from windlass.plan.placement import Handover, Op
from windlass.plan.placements import BUILDERS, by_name
from windlass.report.placement_columns import columns_of, joined
from windlass.report.placement_picture import draw_placement
from windlass.report.rounds_picture import rounds_of


def derived(ops: tuple[Op, ...], name: str, workers: int, mesh: str | None = None) -> Derived:
    placement = by_name(name, ops, workers, mesh=Mesh.parse(mesh) if mesh else None)
    return derive(ops, placement, outputs=(ops[-1].name,))


def test_a_hybrid_alexnet_has_its_moves_before_the_linear_layers_and_its_sums_below_the_convolutions() -> None:
    columns = {column.names[0]: column for column in columns_of(derived(alexnet(256), "hybrid", 2))}
    names = list(columns)
    assert (names[0], names[-1], len(names)) == ("input", "loss", 10)
    convolutions = [column for name, column in columns.items() if name.startswith("features")]
    assert all(column.layout == (Split("batch"),) and not column.moves for column in convolutions)
    assert all(column.gradient_bytes and not column.forward_bytes for column in convolutions)
    first = columns["classifier.2"]
    assert [move.words for move in first.moves] == ["gather batch over hybrid"]
    assert [move.words for move in first.back_moves] == ["sum over hybrid, each its batch"]
    assert first.forward_bytes == first.backward_bytes == 128 * 9216 * 4  # its half of the batch, to the one other
    assert first.gradient_bytes == 0 and first.layout == (Split("channel"),)


def test_bytes_of_the_columns_are_those_of_the_placement() -> None:
    found = derived(alexnet(250), "hybrid:b", 4)
    columns, rows = columns_of(found), [found.traffic(rank) for rank in range(4)]
    for kind in ("forward", "backward", "gradient"):
        most = sum(max(getattr(row, f"{kind}_sent") for row in same) for same in zip(*rows, strict=True))
        assert sum(getattr(column, f"{kind}_bytes") for column in columns) == most


def test_fringes_and_statistics_are_moves_both_ways() -> None:
    columns = columns_of(derived(NETS["residual"](8), "tiles", 2))
    kinds = {move.kind for column in columns for move in column.moves}
    assert {"fringe", "statistics"} <= kinds
    assert not columns[1].back_moves  # no gradient goes to the samples
    assert any(move.kind == "fringe" for column in columns[2:] for move in column.back_moves)


def test_neighbours_that_are_placed_alike_share_a_column_with_the_sum_of_their_bytes() -> None:
    columns = columns_of(derived(alexnet(256), "data", 2))
    few = joined(columns)
    assert [len(column.names) for column in few] == [1, 5, 3, 1]
    assert sum(column.gradient_bytes for column in few) == sum(column.gradient_bytes for column in columns)
    assert few[1].names == tuple(f"features.{number}" for number in (0, 3, 6, 8, 10))


def test_columns_with_messages_between_them_are_not_joined() -> None:
    few = joined(columns_of(derived(chain(), "model", 2)))
    assert all(len(column.names) == 1 for column in few)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("net", ["chain", "residual"])
def test_every_placement_can_be_drawn(name: str, net: str, tmp_path: Path) -> None:
    found = derived(NETS[net](8), name, 3)
    draw_placement(found, tmp_path / "p.svg", title="the title")
    text = (tmp_path / "p.svg").read_text()
    assert "the title" in text and "worker 2" in text and "worker 3" not in text
    for column in columns_of(found):
        assert column.names[0] in text
    assert ("scheme" in text) == name.startswith("hybrid")


def test_workers_are_named_by_their_place_and_the_same_picture_is_the_same_file(tmp_path: Path) -> None:
    found = derived(chain(8), "hybrid", 4, "node:2,device:2")
    for name in ("a.svg", "b.svg"):
        draw_placement(found, tmp_path / name, title="")
    assert "node 1, device 0" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    draw_placement(found, tmp_path / "c.png", title="")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("name", "workers", "message"),
    [
        ("p.doc", 2, "needs a name that ends in .png, .svg, .pdf"),
        ("no/p.svg", 2, "there is no folder"),
        ("p.svg", 17, "a picture shows 16 workers at most, got 17"),
    ],
)
def test_pictures_that_nobody_could_read_are_refused(name: str, workers: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        draw_placement(derived(chain(20), "data", workers), tmp_path / name, title="")


@pytest.mark.parametrize("scheme", ["a", "b", "c"])
def test_the_rounds_that_are_drawn_hand_every_sample_over_once(scheme: str) -> None:
    counts = [5, 4, 4]
    rounds = rounds_of(Handover(scheme, "fc"), counts)
    assert len(rounds) == (1 if scheme == "a" else 3)
    for member, count in enumerate(counts):
        spans = [turn.spans[member] for turn in rounds if turn.spans[member][0] < turn.spans[member][1]]
        assert spans[0][0] == 0 and spans[-1][1] == count
        assert all(before[1] == after[0] for before, after in pairwise(spans))
