"""Bytes of a step, from placements alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from placement_nets import NETS, Net, alexnet, inception, residual
from windlass.plan.derive import Derived, derive
from windlass.plan.graph import INPUT
from windlass.plan.mesh import Mesh
from windlass.plan.placement import Handover, Placement
from windlass.plan.placements import BUILDERS, by_name
from windlass.plan.traffic import LayerTraffic

MESHES = ["x:1", "x:2", "x:3", "node:2,device:2"]


def of_alexnet(name: str, workers: int, batch: int) -> Derived:
    ops = alexnet(batch)
    return derive(ops, by_name(name, ops, workers), outputs=["classifier.7"])


def head_bytes(found: Derived, rank: int) -> int:
    """Sent for the fully connected layers, forward, backward and for weights."""
    return sum(row.sent for row in found.traffic(rank) if "classifier" in row.name)


FC_PARAMETERS = 58_631_144


def test_data_parallelism_sends_the_fully_connected_weights() -> None:
    """2 (p - 1) / p of the parameters each way, to within the pieces' rounding: 4 bytes a parameter and piece."""
    for workers in (2, 4):
        sent = head_bytes(of_alexnet("data", workers, 128 * workers), 0)
        assert abs(sent - 8 * (workers - 1) / workers * FC_PARAMETERS) <= 6 * 4 * 2 * workers


def test_hybrid_sends_the_activities_at_the_handover_and_between_the_layers() -> None:
    """At two workers of 128 samples each: fc6's inputs, half of fc6's and fc7's outputs and half of the logits."""
    for scheme in "abc":
        assert head_bytes(of_alexnet(f"hybrid:{scheme}", 2, 256), 0) == 2 * 4 * (
            128 * 9216 + 256 * 2048 + 256 * 2048 + 128 * 500
        )


@pytest.mark.parametrize(("workers", "share"), [(2, 0.1), (4, 0.2)])
def test_hybrid_sends_a_fraction_of_what_data_parallelism_does(workers: int, share: float) -> None:
    data, hybrid = (of_alexnet(name, workers, 128 * workers) for name in ("data", "hybrid"))
    for rank in range(workers):
        assert head_bytes(hybrid, rank) < share * head_bytes(data, rank)


@pytest.mark.parametrize(("net", "name", "mesh"), list(itertools.product(NETS, BUILDERS, MESHES)))
def test_what_is_sent_is_received(net: str, name: str, mesh: str) -> None:
    ops, where = NETS[net](11), Mesh.parse(mesh)
    found = derive(ops, by_name(name, ops, where.size, mesh=where), outputs=[ops[-1].name])
    ranks = [found.traffic(rank) for rank in range(where.size)]
    assert len({tuple(row.name for row in rows) for rows in ranks}) == 1
    for rows in zip(*ranks, strict=True):
        for phase in ("forward", "backward", "gradient"):
            sent, received = (sum(getattr(row, f"{phase}_{way}") for row in rows) for way in ("sent", "received"))
            assert sent == received, f"{rows[0].name} {phase}"
            assert where.size > 1 or sent == 0


def test_elements_and_batches_scale_it() -> None:
    found = of_alexnet("hybrid", 2, 256)
    single, double = found.traffic(0), found.traffic(0, itemsize=8)
    assert [2 * row.sent for row in single] == [row.sent for row in double]
    assert found.traffic(1, batch=64) == of_alexnet("hybrid", 2, 64).traffic(1)


# --- fringes and statistics ---------------------------------------------------------------------------------


def one_conv(mesh: str, *ways: str, kernel: int = 3, depth: int = 1) -> Derived:
    """Convolutions with padding on 2 samples of 3 channels of 10 x 8."""
    net, source = Net((2, 3, 10, 8)), INPUT
    for number in range(depth):
        source = net.conv(f"conv{number}", source, 3, kernel, padding=kernel // 2)
    return derive(net.ops, Placement(Mesh.parse(mesh), ways), outputs=[source])


def row_of(found: Derived, rank: int, name: str) -> LayerTraffic:
    return next(row for row in found.traffic(rank) if row.name == name)


def test_a_row_goes_each_way_between_tiles() -> None:
    found = one_conv("r:2", "rows", depth=2)
    first, second = (row_of(found, 0, name) for name in ("conv0", "conv1"))
    row = 2 * 3 * 8 * 4
    assert (first.forward_sent, first.forward_received, first.backward_sent, first.backward_received) == (
        row,
        row,
        0,
        0,
    )
    assert (second.backward_sent, second.backward_received) == (row, row)
    middle = row_of(one_conv("r:3", "rows"), 1, "conv0")
    assert (middle.forward_sent, middle.forward_received) == (2 * row, 2 * row)


def test_a_fringe_goes_back_to_whom_it_came_from() -> None:
    """Stride 2 over 10 rows without padding: the upper tile reads rows 0 to 4, the lower 4 to 8, so row 4 goes down."""
    net = Net((2, 3, 10, 8))
    net.pool("pool", net.conv("conv", INPUT, 3, 1), 3, stride=2)
    found = derive(net.ops, Placement(Mesh.parse("r:2"), ("rows",)), outputs=["pool"])
    upper, lower = (row_of(found, rank, "pool") for rank in range(2))
    row = 2 * 3 * 8 * 4
    assert (upper.forward_sent, upper.forward_received, upper.backward_sent, upper.backward_received) == (
        row,
        0,
        0,
        row,
    )
    assert (lower.forward_sent, lower.forward_received, lower.backward_sent, lower.backward_received) == (
        0,
        row,
        row,
        0,
    )


def test_a_shared_move_counts_once() -> None:
    ops = inception(8)
    found = derive(ops, by_name("model", ops, 2), outputs=["fc"])
    first, second = (row_of(found, 0, name) for name in ("one", "reduce"))
    assert first.forward_sent == 8 * 3 * 9 * 9 * 4 and first.backward_sent > 0
    assert (second.forward_sent, second.backward_sent) == (0, 0)


def test_columns_are_sent_with_the_rows_that_were_fetched() -> None:
    """5 x 4 tiles: a row of 4, then a column of 5 and the fetched row's corner."""
    corner = row_of(one_conv("r:2,c:2", "rows", "columns"), 0, "conv0")
    assert corner.forward_sent == corner.forward_received == 2 * 3 * 4 * (4 + 6)


def test_thin_tiles_fetch_from_beyond_their_neighbours() -> None:
    """Ten tiles of one row each under a window of 5."""
    found, row = one_conv("r:10", "rows", kernel=5), 2 * 3 * 8 * 4
    assert [row_of(found, rank, "conv0").forward_received // row for rank in (0, 1, 5, 9)] == [2, 3, 4, 2]


def test_statistics_are_summed_over_all_that_cut_samples_or_places() -> None:
    """2 C + 1 numbers forward and 2 C backward: at two members each sends all of them, in two rounds of a half."""
    ops = residual()
    for name in ("data", "tiles"):
        row = row_of(derive(ops, by_name(name, ops, 2), outputs=["fc"]), 0, "bn0")
        assert (row.forward_sent, row.backward_sent) == (4 * 9, 4 * 8)
        assert row.gradient_sent == 4 * (4 + 4)
    row = row_of(derive(ops, by_name("model", ops, 2), outputs=["fc"]), 0, "bn0")
    assert row.sent == row.received == 0


# --- rounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [256, 250, 31])
def test_rounds_change_when_bytes_go_but_not_how_many(batch: int) -> None:
    """All workers' together; a round's logits are cut anew, so a worker's own part may differ by some samples."""
    totals = {}
    for scheme in "abc":
        found = of_alexnet(f"hybrid:{scheme}", 4, batch)
        rows = [row for rank in range(4) for row in found.traffic(rank)]
        labels = sum(row.sent for row in rows if row.name == "labels")
        assert labels == (0 if scheme == "a" else 3 * batch * 8)
        logits = [row.sent for row in rows if row.name.startswith("loss")]
        totals[scheme] = sum(row.sent for row in rows) - labels - sum(logits)
    assert totals["a"] == totals["b"] == totals["c"]


def test_weights_of_the_head_are_summed_at_every_update() -> None:
    ops, mesh = alexnet(256), Mesh.parse("node:2,device:2")
    once = by_name("hybrid:c", ops, 4, mesh=mesh)
    twice = replace(once, handover=Handover("c", "classifier.2", rounds=4, update_every=2))
    rows = [derive(ops, placement, outputs=["classifier.7"]).traffic(3) for placement in (once, twice)]
    for one, two in zip(*rows, strict=True):
        factor = 2 if "classifier" in one.name and "loss" not in one.name else 1
        assert two.gradient_sent == factor * one.gradient_sent
        assert (two.forward_sent, two.backward_sent) == (one.forward_sent, one.backward_sent)
