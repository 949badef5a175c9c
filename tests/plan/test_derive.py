"""What follows from a placement: moves, parts of weights, sums; and that the parts compute what the whole computes."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from layout_blocks import Block, Blocks, cut, run_steps

from placement_nets import NETS, Net, alexnet, chain, inception, lenet5, residual, window
from windlass.plan.derive import Derived, Parameter, Placed, derive
from windlass.plan.graph import INPUT
from windlass.plan.layout import PARTIAL, WHOLE, Layout, Split, extents, gradient_of, route
from windlass.plan.mesh import Mesh
from windlass.plan.placement import Op, Placement
from windlass.plan.placements import BUILDERS, by_name

B, C, H, W = Split("batch"), Split("channel"), Split("height"), Split("width")
MESHES = ["x:1", "x:2", "x:3", "x:4", "node:2,device:2", "node:2,device:3"]


def derived(net: str, name: str, mesh: str) -> Derived:
    ops, where = NETS[net](), Mesh.parse(mesh)
    return derive(ops, by_name(name, ops, where.size, mesh=where), outputs=[ops[-1].name])


ALL = list(itertools.product(NETS, BUILDERS, MESHES))


@pytest.mark.parametrize(("net", "name", "mesh"), ALL)
def test_moves_lead_from_what_there_is_to_what_is_needed(net: str, name: str, mesh: str) -> None:
    found = derived(net, name, mesh)
    for placed in found.ops:
        for number, source in enumerate(placed.op.inputs):
            given = found.layout_of(source)
            assert PARTIAL not in placed.needs[number]
            assert placed.moves[number] == route(given, placed.needs[number])
            back = route(placed.grads[number], gradient_of(given)) if placed.input_grads[number] else ()
            assert placed.back_moves[number] == back
            if placed.shares[number]:
                earlier = found.placed(placed.shares[number])
                at = earlier.op.inputs.index(source)
                assert (earlier.needs[at], earlier.grads[at]) == (placed.needs[number], placed.grads[number])
    logits = found.outputs[0]
    assert PARTIAL not in logits.need and all(part in (B, WHOLE) for part in logits.need)


@pytest.mark.parametrize(("net", "name", "mesh"), ALL)
def test_weights_lie_with_the_channels_that_they_make(net: str, name: str, mesh: str) -> None:
    found = derived(net, name, mesh)
    where = found.placement.mesh
    for placed, rank in itertools.product(found.ops, range(where.size)):
        for parameter in placed.parameters:
            if placed.op.kind == "PartialConv2d":
                continue
            part = parameter.extents(where, rank)
            made = extents(placed.op.output_shape, placed.output, where, rank)[1]
            assert part[0] == made, f"{placed.op.name}.{parameter.name} on rank {rank}"
            if len(part) > 1:
                assert part[1] == extents(placed.op.input_shapes[0], placed.needs[0], where, rank)[1]


def sum_group(parameter: Parameter, mesh: Mesh, rank: int) -> list[int]:
    """The ranks whose gradients of a parameter are added to this one's."""
    fixed = [axis for axis in range(len(mesh.axes)) if axis not in parameter.sum_axes]
    places = [[mesh.coordinates(other)[axis] for axis in fixed] for other in range(mesh.size)]
    return [other for other in range(mesh.size) if places[other] == places[rank]]


@pytest.mark.parametrize(("net", "name", "mesh"), ALL)
def test_every_sample_and_place_counts_once_in_a_sum(net: str, name: str, mesh: str) -> None:
    """A weight's gradient is a sum over samples and places; those of the group must be all, each once."""
    found = derived(net, name, mesh)
    where = found.placement.mesh
    for placed, rank in itertools.product(found.ops, range(where.size)):
        shape = placed.op.output_shape
        for parameter in placed.parameters:
            seen = np.zeros((shape[0], *shape[2:]), dtype=int)
            for member in sum_group(parameter, where, rank):
                box = extents(shape, placed.output, where, member)
                seen[tuple(slice(*span) for span in (box[0], *box[2:]))] += 1
                assert parameter.extents(where, member) == parameter.extents(where, rank)
            assert (seen == 1).all(), f"{placed.op.name}.{parameter.name} on rank {rank}"


# --- by hand ------------------------------------------------------------------------------------------------


def moves_of(found: Derived) -> dict[str, tuple[str, str]]:
    return {row.name: (row.moves, row.back_moves) for row in found.describe() if row.moves or row.back_moves}


def test_hybrid_of_alexnet_is_krizhevskys() -> None:
    ops = alexnet(256)
    found = derive(ops, by_name("hybrid", ops, 4), outputs=["classifier.7"])
    assert moves_of(found) == {
        "classifier.2": ("gather batch over hybrid", "sum over hybrid, each its batch"),
        "classifier.5": ("gather channel over hybrid", "sum over hybrid, each its channel"),
        "classifier.7": ("gather channel over hybrid", "sum over hybrid, each its channel"),
        "loss of classifier.7": ("swap channel for batch over hybrid", "swap batch for channel over hybrid"),
    }
    rows = {row.name: row for row in found.describe(rank=3)}
    assert rows["features.3"].local_shape == (64, 192, 27, 27) and rows["features.3"].ways == ("batch",)
    assert rows["classifier.3"].local_shape == (256, 1024) and rows["classifier.3"].ways == ("out",)
    sums = {placed.op.name: {p.name: p.sum_axes for p in placed.parameters} for placed in found.ops}
    assert sums["features.0"] == {"weight": (0,), "bias": (0,)} and sums["classifier.2"] == {"weight": (), "bias": ()}


def test_data_parallelism_moves_nothing_between_layers() -> None:
    for net in NETS:
        assert {
            name: row for name, row in moves_of(derived(net, "data", "x:3")).items() if "statistics" not in row[0]
        } == {}


def test_out_then_in_needs_one_sum_and_no_gather() -> None:
    """The pair of Megatron-LM: the first layer's neurons are the second's inputs."""
    net = Net((6, 8))
    net.linear("second", net.same("relu", net.linear("first", INPUT, 12)), 8)
    found = derive(
        net.ops, Placement(Mesh.parse("m:2"), ("whole",), {"first": ("out",), "second": ("in",)}), outputs=["second"]
    )
    assert moves_of(found) == {"loss of second": ("sum over m", "")}
    assert found.placed("second").own_bias_axes == (0,)
    assert found.placed("second").parameters[1].sum_axes == (0,)


def test_addends_are_summed_into_what_the_next_layer_needs() -> None:
    net = Net((6, 8, 9, 9))
    net.conv("second", net.same("relu", net.conv("first", INPUT, 12, 3)), 8, 3)
    for way, words in (("batch", "sum over m, each its batch"), ("rows", "sum over m, each its height"),
                       ("in", "sum over m, each its channel"), ("out", "sum over m")):  # fmt: skip
        found = derive(
            net.ops, Placement(Mesh.parse("m:2"), ("whole",), {"first": ("in",), "second": (way,)}), outputs=["second"]
        )
        assert moves_of(found)["relu"][0] == words
        assert found.placed("second").moves == ((),)


def test_flattened_maps_stay_together() -> None:
    found = derive(chain(), by_name("model", chain(), 2), outputs=["fc2"])
    assert found.placed("flatten").output == (Split("channel", 4 * 3),)


def test_inputs_are_cut_as_the_flattened_maps_are() -> None:
    net = Net((7, 3, 6, 5))
    net.linear("fc", net.flatten("flatten", net.conv("conv", INPUT, 5, 3)), 4)
    placement = Placement(Mesh.parse("m:2"), ("whole",), {"conv": ("out",), "fc": ("in",)})
    found = derive(net.ops, placement, outputs=["fc"])
    assert found.placed("fc").moves == ((),)
    weight = found.placed("fc").parameters[0]
    assert [weight.extents(placement.mesh, rank) for rank in range(2)] == [((0, 4), (0, 36)), ((0, 4), (36, 60))]


def test_branches_share_a_move() -> None:
    """Three readers of one tensor that is cut by channels: gathered once, its gradient summed once."""
    ops = inception()
    found = derive(ops, by_name("model", ops, 2), outputs=["fc"])
    assert [found.placed(name).shares for name in ("one", "reduce", "pool")] == [("",), ("one",), ("",)]
    assert [step.kind for step in found.placed("reduce").moves[0]] == ["gather"]
    assert found.placed("cat").needs == ((WHOLE,),) * 3


def test_tiles_have_a_fringe_and_swap_for_channels_at_the_end() -> None:
    ops = residual()
    found = derive(ops, by_name("tiles", ops, 2), outputs=["fc"])
    halo = found.placed("b2.conv1").halos[0]
    assert (halo.kernel, halo.stride, halo.padding, halo.pad) == (3, 2, 1, "zero")
    assert found.placed("b1.bn1").sync_axes == (0,)
    assert [step.kind for step in found.placed("pool").moves[0]] == ["swap"]
    assert found.placed("pool").output == (C,)
    lowest = derive(chain(), by_name("tiles", chain(), 2), outputs=["fc2"]).placed("pool1").halos[0]
    assert lowest.pad == "lowest" and lowest.stride == 2


def test_windows_within_their_tile_fetch_nothing() -> None:
    """LeNet-5's 2 x 2 sums on 24 rows: cut between windows at 2 tiles, through one at 5."""
    ops = lenet5()
    for tiles, words in ((2, ""), (5, "fringe of height over tiles")):
        found = derive(ops, by_name("tiles", ops, tiles), outputs=["output"])
        assert moves_of(found).get("s2", ("", ""))[0] == words


def test_lenet5s_wired_layer_is_replicated() -> None:
    ops = lenet5()
    found = derive(ops, by_name("model", ops, 2), outputs=["output"])
    assert found.placed("c3").ways == ("replicate",) and found.placed("c3").parameters[0].sum_axes == ()
    assert found.placed("s2").ways == ("out",) and found.placed("s4").ways == ("replicate",)


def test_groups_stay_with_their_channels() -> None:
    net = Net((4, 12, 5, 5))
    net.conv("grouped", INPUT, 18, 3, groups=6)
    found = derive(net.ops, Placement(Mesh.parse("m:4"), ("whole",), {"grouped": ("out",)}), outputs=["grouped"])
    placed, mesh = found.placed("grouped"), found.placement.mesh
    for rank in range(4):
        channels = extents(placed.op.input_shapes[0], placed.needs[0], mesh, rank)[1]
        outputs = placed.parameters[0].extents(mesh, rank)[0]
        assert [bound * 18 // 12 for bound in channels] == list(outputs) and channels[0] % 2 == 0


def test_no_gradient_goes_where_none_is_wanted() -> None:
    net = Net((4, 3, 8, 8))
    first = net.same("scaled", INPUT)
    second = net.same("stopped", net.conv("one", first, 4, 3), "stopgradient")
    net.conv("two", net.same("relu", second), 4, 3)
    found = derive(net.ops, Placement(Mesh.parse("m:2"), ("rows",)), outputs=["two"])
    assert [found.placed(name).input_grads for name in ("scaled", "one", "stopped", "relu", "two")] == [
        (False,), (False,), (True,), (False,), (False,),
    ]  # fmt: skip


def test_a_loss_of_the_networks_own_is_cut_as_the_input() -> None:
    net = Net((4, 3, 8, 8))
    net.conv("map", INPUT, 4, 3)
    placement = Placement(Mesh.parse("node:2,row:2"), ("batch", "rows"))
    assert derive(net.ops, placement, outputs=["map"], own_loss=True).outputs[0].need == (B, H)
    assert derive(net.ops, placement, outputs=["map"]).outputs[0].need == (B, WHOLE)


def test_untied_weights_lie_with_their_places() -> None:
    net = Net((4, 3, 9, 9))
    shape = (7, 7, 5, 3 * 3 * 3)
    net.add(
        "local",
        "LocallyConnected2d",
        (INPUT,),
        (4, 5, 7, 7),
        parameters=(("weight", shape),),
        attributes=window(3, 1, 0),
    )
    found = derive(net.ops, Placement(Mesh.parse("node:2,r:2,c:3"), ("batch", "rows", "columns")), outputs=["local"])
    placed = found.placed("local")
    parameter, mesh = placed.parameters[0], found.placement.mesh
    assert parameter.sum_axes == (0,)
    for rank in range(mesh.size):
        places = extents(placed.op.output_shape, placed.output, mesh, rank)[2:]
        assert parameter.extents(mesh, rank)[:2] == places


# --- all ranks in one process -------------------------------------------------------------------------------


def two_paths() -> tuple[Op, ...]:
    """linear - relu - linear, added to what it came from, joined with it, and a linear layer."""
    net = Net((5, 6))
    relu = net.same("relu", net.linear("fc1", INPUT, 7))
    total = net.add("add", "add", (net.linear("fc2", relu, 7), relu), (5, 7))
    net.linear("fc3", net.add("cat", "cat", (total, relu), (5, 14), attributes=(("dim", 1),)), 4)
    return tuple(net.ops)


def random_placement(seed: int) -> Placement:
    draw = random.Random(seed)
    mesh = Mesh.parse(draw.choice(["a:2", "a:3", "a:2,b:2", "a:3,b:2", "a:2,b:2,c:2"]))
    names = ["fc1", "fc2", "fc3", draw.choice(["relu", "add", "cat"])]
    layers = {}
    for name in names:
        ways = ("batch", "out", "in", "replicate") if name.startswith("fc") else ("batch", "replicate")
        layers[name] = tuple(draw.choice(ways) for _ in mesh.axes)
    chosen = dict(item for item in layers.items() if draw.random() < 0.8)
    return Placement(mesh, tuple(draw.choice(["batch", "whole"]) for _ in mesh.axes), chosen)


class Simulation:
    """One step of a placed network on blocks of numbers; every rank does what it would do with its own alone."""

    def __init__(self, found: Derived, whole: dict[str, Block]) -> None:
        self.found, self.mesh, self.whole = found, found.placement.mesh, whole
        self.values: dict[str, Blocks] = {INPUT: self._cut(whole[INPUT], found.input)}
        self.read: dict[str, list[Blocks]] = {}
        self.weight_grads: dict[str, Blocks] = {}

    def _cut(self, tensor: Block, layout: Layout) -> Blocks:
        return [cut(tensor, layout, self.mesh, rank) for rank in range(self.mesh.size)]

    def forward(self) -> None:
        for placed in self.found.ops:
            self.read[placed.op.name] = [
                run_steps(self.values[name], shape, self.found.layout_of(name), placed.moves[number], self.mesh)
                for number, (name, shape) in enumerate(zip(placed.op.inputs, placed.op.input_shapes, strict=True))
            ]
            self.values[placed.op.name] = [self._compute(placed, rank) for rank in range(self.mesh.size)]

    def _weight(self, placed: Placed, number: int, rank: int) -> Block:
        parameter = placed.parameters[number]
        part = tuple(slice(*span) for span in parameter.extents(self.mesh, rank))
        return self.whole[f"{placed.op.name}.{parameter.name}"][part]

    def _compute(self, placed: Placed, rank: int) -> Block:
        inputs = [blocks[rank] for blocks in self.read[placed.op.name]]
        if placed.op.kind == "linear":
            first = all(self.mesh.coordinates(rank)[axis] == 0 for axis in placed.own_bias_axes)
            return inputs[0] @ self._weight(placed, 0, rank).T + first * self._weight(placed, 1, rank)
        if placed.op.kind == "relu":
            return np.maximum(inputs[0], 0)
        return inputs[0] + inputs[1] if placed.op.kind == "add" else np.concatenate(inputs, 1)

    def backward(self, loss_grad: Block) -> None:
        end = self.found.outputs[0]
        shape = self.found.placed(end.name).op.output_shape
        grads = {end.name: run_steps(self._cut(loss_grad, end.need), shape, end.need, end.back_moves, self.mesh)}
        for placed in reversed(self.found.ops):
            own = grads.pop(placed.op.name)
            parts = [self._derive(placed, rank, own[rank]) for rank in range(self.mesh.size)]
            for number, name in enumerate(placed.op.inputs):
                if placed.input_grads[number]:
                    shape, layout = placed.op.input_shapes[number], placed.grads[number]
                    blocks = run_steps(
                        [part[number] for part in parts], shape, layout, placed.back_moves[number], self.mesh
                    )
                    grads[name] = [a + b for a, b in zip(grads[name], blocks, strict=True)] if name in grads else blocks

    def _derive(self, placed: Placed, rank: int, grad: Block) -> list[Block]:
        inputs = [blocks[rank] for blocks in self.read[placed.op.name]]
        if placed.op.kind == "linear":
            first = all(self.mesh.coordinates(rank)[axis] == 0 for axis in placed.own_bias_axes)
            self.weight_grads.setdefault(f"{placed.op.name}.weight", []).append(grad.T @ inputs[0])
            self.weight_grads.setdefault(f"{placed.op.name}.bias", []).append(first * grad.sum(0))
            return [grad @ self._weight(placed, 0, rank)]
        if placed.op.kind == "relu":
            return [grad * (inputs[0] > 0)]
        return [grad, grad] if placed.op.kind == "add" else np.split(grad, [inputs[0].shape[1]], 1)

    def summed(self, placed: Placed, parameter: Parameter, rank: int) -> Block:
        blocks = self.weight_grads[f"{placed.op.name}.{parameter.name}"]
        total: Block = np.sum([blocks[member] for member in sum_group(parameter, self.mesh, rank)], axis=0)
        return total


def simulated(placement: Placement) -> Simulation:
    ops = two_paths()
    draw = np.random.default_rng(0)
    whole = {f"{op.name}.{name}": draw.normal(size=shape) for op in ops for name, shape in op.parameters}
    simulation = Simulation(derive(ops, placement, outputs=["fc3"]), whole | {INPUT: draw.normal(size=(5, 6))})
    simulation.forward()
    simulation.backward(draw.normal(size=(5, 4)))
    return simulation


@pytest.fixture(scope="module")
def alone() -> Simulation:
    return simulated(Placement(Mesh.parse("a:1"), ("batch",)))


@pytest.mark.parametrize("chunk", range(8))
def test_all_ranks_together_compute_what_one_computes(alone: Simulation, chunk: int) -> None:
    """Outputs and gradients of weights, for random ways on random meshes; 1e-9 is some 10^6 roundings of sums of 20."""
    for seed in range(40 * chunk, 40 * chunk + 40):
        here = simulated(random_placement(seed))
        end = here.found.outputs[0]
        logits = run_steps(here.values["fc3"], (5, 4), here.found.layout_of("fc3"), end.moves, here.mesh)
        for rank in range(here.mesh.size):
            np.testing.assert_allclose(logits[rank], cut(alone.values["fc3"][0], end.need, here.mesh, rank), atol=1e-9)
            for placed in here.found.ops:
                for parameter in placed.parameters:
                    part = tuple(slice(*span) for span in parameter.extents(here.mesh, rank))
                    expected = alone.weight_grads[f"{placed.op.name}.{parameter.name}"][0][part]
                    found = here.summed(placed, parameter, rank)
                    message = f"seed {seed}, {placed.op.name}.{parameter.name}, rank {rank}"
                    np.testing.assert_allclose(found, expected, atol=1e-9, err_msg=message)
    assert math.prod(alone.weight_grads["fc1.weight"][0].shape) == 42
