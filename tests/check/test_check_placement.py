"""Placements that cannot work are refused, naming layer, axis and sizes; those that can are not."""

from __future__ import annotations

import itertools

import pytest

from placement_nets import NETS, Net, alexnet, chain, inception, lenet5, residual
from windlass.check.placement import check_placement
from windlass.errors import ConfigError
from windlass.plan.graph import INPUT
from windlass.plan.mesh import Mesh
from windlass.plan.placement import Op, Placement, placement_from_mapping
from windlass.plan.placements import BUILDERS, by_name


@pytest.mark.parametrize(("net", "name", "workers"), list(itertools.product(NETS, BUILDERS, (1, 2, 3, 4))))
def test_placements_by_name_pass(net: str, name: str, workers: int) -> None:
    ops = NETS[net](17)
    check_placement(ops, by_name(name, ops, workers), workers=workers)


@pytest.mark.parametrize(("net", "name"), list(itertools.product(NETS, BUILDERS)))
def test_three_tiers_pass(net: str, name: str) -> None:
    ops = NETS[net](17)
    check_placement(ops, by_name(name, ops, 4, mesh=Mesh.parse("node:2,device:2")), workers=4)


def test_sizes_need_not_divide() -> None:
    """7 samples on 4, 5 maps on 4, a map of 4 rows on 5."""
    check_placement(chain(7), by_name("data", chain(7), 4))
    check_placement(chain(7), by_name("model", chain(7), 4))
    check_placement(chain(7), Placement(Mesh.parse("m:5"), ("rows",), {"conv2": ("rows",)}))


def grouped() -> tuple[Op, ...]:
    net = Net((8, 4, 9, 9))
    net.conv("depthwise", INPUT, 4, 3, groups=4)
    return tuple(net.ops)


def called_twice() -> tuple[Op, ...]:
    net = Net((8, 4))
    net.linear("fc#2", net.linear("fc", INPUT, 4), 4)
    return tuple(net.ops)


def normed_head() -> tuple[Op, ...]:
    net = Net((16, 4, 5, 5))
    flat = net.flatten("flatten", net.conv("conv", INPUT, 4, 3))
    net.linear("fc2", net.norm("bn", net.linear("fc1", flat, 6)), 3)
    return tuple(net.ops)


HEAD: dict[str, object] = {"fc*": "out"}
REFUSED: list[tuple[tuple[Op, ...], dict[str, object], str]] = [
    (chain(), {"layers": {"fc3": ["out"]}}, r"layers: unknown layer 'fc3'; did you mean 'fc2' or 'fc1'"),
    (chain(), {"layers": {"features.*": "out"}},
     r"layers.features.\*: no layer with weights of this name: conv1, conv2"),
    (chain(), {"layers": {"fc1": "rows"}},
     r"layers.fc1: axis m of 2: linear \(7×84 to 7×9\) cannot be rows: a layer of kind linear can be batch or"),
    (chain(), {"layers": {"relu1": "in"}}, r"layers.relu1: axis m of 2: relu .* cannot be in"),
    (lenet5(), {"layers": {"c3": "out"}}, r"layers.c3: axis m of 2: PartialConv2d .* cannot be out"),
    (grouped(), {"layers": {"depthwise": "in"}},
     r"layers.depthwise: axis m of 2: conv2d \(8×4×9×9 to 8×4×7×7\) cannot be in: .* 4 groups"),
    (called_twice(), {"layers": {"fc": "out", "fc#2": "in"}}, r"layers.fc#2: it is fc called again, and that is out"),
    (chain(), {"mesh": "m:8"}, r"input: the batch is cut into 8 parts on the mesh m:8, and has only 7 samples"),
    (chain(), {"mesh": "a:2,b:2", "input": ["rows", "rows"]}, r"input: axis b of 2: rows are cut along one axis only"),
    (called_twice(), {"input": ["rows"]}, r"input: axis m of 2: only images .* have rows, got \(8, 4\)"),
    (chain(), {"mesh": "a:2,b:2", "input": ["rows", "whole"], "layers": {"conv2": ["rows", "rows"]}},
     r"layers.conv2: axis a of 2 and axis b of 2 both cut the height of 7×7×4×3"),
]  # fmt: skip
HANDOVERS: list[tuple[tuple[Op, ...], dict[str, object], dict[str, object], str]] = [
    (alexnet(8), {}, {"scheme": "b", "before": "classifier.22"},
     r"before: unknown layer 'classifier.22'; did you mean 'classifier.2'"),
    (alexnet(8), {}, {"scheme": "b", "before": "classifier.2"},
     r"before: classifier.1 lies as \(batch\) and classifier.2 needs \(batch\) on the mesh m:2"),
    (inception(16), {"fc": "out"}, {"scheme": "c", "before": "three"},
     r"before: scheme c hands one tensor over .* but 3 cross: reduce into three, one into cat, projected into cat"),
    (chain(16), {"fc1": "out", "fc2": "batch"}, {"scheme": "c", "before": "fc1"},
     r" fc2 in the head cuts samples along axis m of 2 again"),
    (normed_head(), HEAD, {"scheme": "c", "before": "fc1"}, r" bn in the head normalises over the batch"),
    (chain(16), HEAD, {"scheme": "c", "before": "fc1", "rounds": 9},
     r"rounds: 9 rounds along axis m of 2, but a member has only 8 of the 16 samples"),
    (chain(16), HEAD, {"scheme": "b", "before": "fc1", "rounds": 4}, r" in scheme b each of the 2 members sends once"),
    (chain(16), HEAD, {"scheme": "c", "before": "fc1", "rounds": 2, "update_every": 3},
     r"update_every: an update after every 3 rounds, but there are 2"),
    (chain(16), HEAD, {"scheme": "a", "before": "fc1", "update_every": 1},
     r" scheme a hands everything over at once"),
]  # fmt: skip
REFUSED += [
    (ops, {"layers": layers, "handover": handover}, rf"handover[.:]{message}")
    for ops, layers, handover, message in HANDOVERS
]


@pytest.mark.parametrize(("ops", "written", "message"), REFUSED)
def test_what_cannot_work_is_refused_with_its_place(
    ops: tuple[Op, ...], written: dict[str, object], message: str
) -> None:
    placement = placement_from_mapping({"mesh": "m:2"} | written)
    with pytest.raises(ConfigError, match=f"my.yaml: {message}"):
        check_placement(ops, placement, where="my.yaml")


def test_other_numbers_of_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match="mesh: data:4 has 4 workers, but the run has 3"):
        check_placement(chain(), by_name("data", chain(), 4), workers=3)


def test_ways_made_by_a_program_are_checked_too() -> None:
    mesh = Mesh.parse("node:2,device:2")
    for placement, message in (
        (
            Placement(mesh, ("batch",)),
            "input: the mesh node:2,device:2 has 2 axes and needs as many ways, got 1: batch",
        ),
        (Placement(mesh, ("batch", "in")), "input: axis device of 2: unknown way 'in'"),
        (Placement(mesh, ("batch", "whole"), {"fc1": ("out",)}), r"layers.fc1: the mesh node:2,device:2 has 2 axes"),
        (Placement(mesh, ("batch", "whole"), {"fc1": ("batch", "half")}), r"layers.fc1: axis device of 2: unknown way"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_placement(chain(), placement)


def test_a_mutant_of_every_named_layer_is_refused() -> None:
    """Each layer of a good placement in turn given a way that its kind has not."""
    ops = residual()
    good = by_name("data", ops, 2)
    for name in good.layers:
        wrong = "rows" if name == "fc" else "half"
        with pytest.raises(ConfigError, match=f"layers.{name}: axis data of 2"):
            check_placement(ops, Placement(good.mesh, good.input, {**good.layers, name: (wrong,)}))
