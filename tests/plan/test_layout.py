"""Layouts and the steps between them, run on blocks of numbers on all ranks of a mesh."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from layout_blocks import cut, run_step

from windlass.plan.layout import (
    DIMS,
    PARTIAL,
    WHOLE,
    Layout,
    Part,
    Split,
    Step,
    after,
    bounds,
    bytes_of_steps,
    extents,
    gradient_of,
    local_shape,
    message_shapes,
    route,
)
from windlass.plan.mesh import Mesh

LENGTHS = list(itertools.product((0, 1, 5, 12, 13), (1, 2, 3, 5), (1, 2, 4)))


@pytest.mark.parametrize(("length", "parts", "unit"), LENGTHS)
def test_bounds_cut_evenly_between_units(length: int, parts: int, unit: int) -> None:
    cuts = bounds(length, parts, unit)
    assert cuts[0] == 0 and cuts[-1] == length and len(cuts) == parts + 1
    assert all(cut % unit == 0 or cut == length for cut in cuts)
    units = [-(-(stop - start) // unit) for start, stop in itertools.pairwise(cuts)]
    assert max(units) - min(units) <= 1 and units == sorted(units, reverse=True)


def test_two_axes_cut_one_dim_the_outer_first() -> None:
    mesh = Mesh.parse("a:2,b:2")
    parts = [extents((7,), (Split("batch"), Split("batch")), mesh, rank)[0] for rank in range(4)]
    assert parts == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert local_shape((7, 5), (Split("batch"), Split("channel")), mesh, 3) == (3, 2)


# --- every way from layout to layout ------------------------------------------------------------------------

PARTS: tuple[Part, ...] = (
    WHOLE, PARTIAL, Split("batch"), Split("channel"), Split("channel", 3), Split("height"), Split("width"),
)  # fmt: skip
MESHES = ["a:1", "a:2", "a:3", "a:4", "a:2,b:2", "a:3,b:2", "a:2,b:1,c:3", "a:2,b:2,c:2", "a:2,b:1,c:2,d:2"]


def random_case(seed: int) -> tuple[Mesh, tuple[int, ...], Layout, Layout]:
    draw = random.Random(seed)
    mesh = Mesh.parse(draw.choice(MESHES))
    num_dims = draw.choice((2, 4, 4))
    shape = tuple(draw.choice((1, 2, 3, 5, 6, 7)) for _ in range(num_dims))
    possible = [part for part in PARTS if not isinstance(part, Split) or DIMS[part.dim] < num_dims]
    source = tuple(draw.choice(possible) for _ in mesh.axes)
    target = tuple(draw.choice([part for part in possible if part != PARTIAL]) for _ in mesh.axes)
    return mesh, shape, source, target


@pytest.mark.parametrize("chunk", range(10))
def test_every_rank_ends_with_its_slice(chunk: int) -> None:
    for seed in range(100 * chunk, 100 * chunk + 100):
        mesh, shape, source, target = random_case(seed)
        whole = np.arange(math.prod(shape), dtype=float).reshape(shape)
        blocks = [cut(whole, source, mesh, rank) for rank in range(mesh.size)]
        at = source
        for step in route(source, target):
            assert at[step.axis] == step.source
            blocks = run_step(blocks, shape, at, step, mesh)
            at = after(at, step)
        assert at == target
        for rank, block in enumerate(blocks):
            np.testing.assert_allclose(block, cut(whole, target, mesh, rank), atol=1e-9, err_msg=f"seed {seed}")


def test_a_step_over_a_nested_cut_would_be_seen() -> None:
    """The mutant: joining the outer of two cuts of one dim at once leaves rows in the wrong place."""
    mesh, shape = Mesh.parse("a:2,b:2"), (5, 1)
    source: Layout = (Split("batch"), Split("batch"))
    whole = np.arange(5.0).reshape(shape)
    blocks = [cut(whole, source, mesh, rank) for rank in range(4)]
    wrong = Step("gather", 0, Split("batch"), WHOLE)
    with pytest.raises(AssertionError):
        later = run_step(blocks, shape, source, wrong, mesh)
        for rank, block in enumerate(later):
            np.testing.assert_allclose(block, cut(whole, (WHOLE, Split("batch")), mesh, rank))


@pytest.mark.parametrize("seed", range(60))
def test_bytes_are_those_of_the_messages_to_others(seed: int) -> None:
    mesh, shape, source, target = random_case(seed)
    steps = route(source, target)
    counts = [bytes_of_steps(shape, source, steps, mesh, rank, itemsize=8) for rank in range(mesh.size)]
    assert sum(sent for sent, _ in counts) == sum(received for _, received in counts)
    expected, at = 0, source
    for step in steps:
        for rank in range(mesh.size):
            send, receive = message_shapes(shape, at, step, mesh, rank)
            rounds = (send, receive) if step.kind == "reduce" else (send,)
            expected += sum(
                8 * math.prod(piece)
                for pieces in rounds
                for member, piece in zip(mesh.group(rank, step.axis), pieces, strict=True)
                if member != rank
            )
        at = after(at, step)
    assert sum(sent for sent, _ in counts) == expected


# --- what the steps are -------------------------------------------------------------------------------------

B, C, H = Split("batch"), Split("channel"), Split("height")
ROUTES: list[tuple[Layout, Layout, list[str]]] = [
    ((B,), (B,), []),
    ((B,), (WHOLE,), ["gather"]),
    ((WHOLE,), (C,), ["slice"]),
    ((H,), (C,), ["swap"]),
    ((Split("channel", 4),), (C,), ["swap"]),
    ((PARTIAL,), (WHOLE,), ["reduce"]),
    ((PARTIAL,), (B,), ["scatter"]),
    ((B, PARTIAL), (B, WHOLE), ["reduce"]),
    ((B, WHOLE), (WHOLE, C), ["slice", "gather"]),  # the slice first: there is less to gather then
    ((B, B), (WHOLE, WHOLE), ["gather", "gather"]),
    ((B, B), (WHOLE, B), ["gather", "gather", "slice"]),
    ((B, B), (B, C), ["swap"]),
    ((B, C), (C, C), ["gather", "swap", "slice"]),
    ((PARTIAL, B), (WHOLE, B), ["reduce"]),
]


@pytest.mark.parametrize(("source", "target", "kinds"), ROUTES)
def test_routes_are_the_cheapest(source: Layout, target: Layout, kinds: list[str]) -> None:
    assert [step.kind for step in route(source, target)] == kinds


def test_gradients_of_addends_are_whole() -> None:
    assert gradient_of((PARTIAL, B, WHOLE)) == (WHOLE, B, WHOLE)
