"""Placements by name and from files."""

from __future__ import annotations

import itertools

import pytest

from placement_nets import NETS, Net, alexnet, lenet5, residual
from windlass.errors import ConfigError
from windlass.plan.graph import INPUT
from windlass.plan.mesh import Mesh
from windlass.plan.placement import INPUT_WAYS, WAYS, Handover, Placement, placement_from_mapping
from windlass.plan.placements import BUILDERS, by_name


@pytest.mark.parametrize(("net", "name", "workers"), list(itertools.product(NETS, BUILDERS, (1, 2, 3, 4))))
def test_builders_name_every_layer_with_weights(net: str, name: str, workers: int) -> None:
    ops = NETS[net]()
    placement = by_name(name, ops, workers)
    assert placement.mesh == Mesh(((name.partition(":")[0], workers),))
    assert set(placement.layers) >= {op.name for op in ops if op.kind in ("conv2d", "linear", "PartialConv2d")}
    assert all(way in WAYS for ways in placement.layers.values() for way in ways)
    assert placement.input[0] in INPUT_WAYS
    assert placement_from_mapping(placement.to_mapping()) == placement


def test_hybrid_hands_over_before_the_first_linear_layer() -> None:
    placement = by_name("hybrid:c", alexnet(8), 2)
    assert placement.handover == Handover("c", "classifier.2")
    ways = {name: row[0] for name, row in placement.layers.items()}
    assert {way for name, way in ways.items() if name.startswith("features")} == {"batch"}
    assert {way for name, way in ways.items() if name.startswith("classifier")} == {"out"}
    assert by_name("hybrid", lenet5(), 2).handover == Handover("a", "f6")


def test_model_parallelism_divides_what_can_be_divided() -> None:
    placement = by_name("model", lenet5(), 2)
    assert placement.input == ("whole",)
    assert placement.layers == {"c1": ("out",), "c3": ("replicate",), "c5": ("out",), "f6": ("out",)}


def test_tiles_end_where_there_are_fewer_rows_than_workers() -> None:
    ops = residual()
    assert by_name("tiles", ops, 4).layers["b2.conv2"] == ("rows",)
    assert by_name("tiles", ops, 5).layers["b2.conv2"] == ("out",)
    assert by_name("tiles", ops, 5).layers["fc"] == ("out",)


def test_outer_axes_cut_the_batch() -> None:
    placement = by_name("hybrid", alexnet(8), 8, mesh=Mesh.parse("node:4,device:2"))
    assert placement.input == ("batch", "batch")
    assert placement.layers["features.0"] == ("batch", "batch") and placement.layers["classifier.7"] == ("batch", "out")


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown placement 'hybird'; did you mean 'hybrid"):
        by_name("hybird", alexnet(8), 2)
    with pytest.raises(ConfigError, match=r"mesh node:2,device:2 has 4 workers, the run 8"):
        by_name("data", alexnet(8), 8, mesh=Mesh.parse("node:2,device:2"))
    net = Net((4, 3, 8, 8))
    net.conv("only", INPUT, 4, 3)
    with pytest.raises(ConfigError, match="has none"):
        by_name("hybrid", net.ops, 2)


WRITTEN = {
    "mesh": "node:2,device:2",
    "input": ["batch", "whole"],
    "layers": {"features.*": ["batch", "out"], "classifier.7": ["batch", "in"]},
    "handover": {"scheme": "c", "before": "classifier.2", "rounds": 4, "update_every": 2},
}


def test_a_file_is_kept() -> None:
    placement = placement_from_mapping(WRITTEN)
    assert placement == Placement(
        Mesh.parse("node:2,device:2"),
        ("batch", "whole"),
        {"features.*": ("batch", "out"), "classifier.7": ("batch", "in")},
        Handover("c", "classifier.2", 4, 2),
    )
    assert placement.to_mapping() == WRITTEN


def test_a_file_may_be_short() -> None:
    placement = placement_from_mapping({"mesh": "m:2", "layers": {"fc": "out"}})
    assert placement.input == ("batch",) and placement.layers == {"fc": ("out",)} and placement.handover is None


SPOILT = [
    ({"mesh": "2 by 2"}, "a mesh is written as node:2,device:4"),
    ({"mesh": 4}, "my.yaml: mesh: needs a text"),
    ({"layer": {}}, "my.yaml: unknown entry 'layer'; did you mean 'layers'"),
    ({"input": ["batch"]}, r"my.yaml: input: the mesh node:2,device:2 has 2 axes and .* got \['batch'\]"),
    ({"input": ["batch", "out"]}, "my.yaml: input: unknown way 'out'"),
    ({"layers": {"fc": ["batch", "row"]}}, "my.yaml: layers.fc: unknown way 'row'; did you mean 'rows'"),
    ({"layers": {"fc": ["batch"]}}, "my.yaml: layers.fc: the mesh node:2,device:2 has 2 axes"),
    ({"layers": ["fc"]}, "my.yaml: layers: needs a mapping"),
    ({"handover": {"scheme": "d", "before": "fc"}}, "my.yaml: handover.scheme: unknown scheme 'd'"),
    ({"handover": {"scheme": "b"}}, "my.yaml: handover: before: needs a text"),
    ({"handover": {"scheme": "b", "before": "fc", "rounds": -1}}, "my.yaml: handover: rounds: needs a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("spoilt", "message"), SPOILT)
def test_a_spoilt_file_is_refused_with_its_place(spoilt: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        placement_from_mapping(WRITTEN | spoilt, where="my.yaml")
