"""Runs the steps of layouts on blocks of numbers, all ranks of a mesh in one process: what they mean."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from windlass.plan.layout import (
    PARTIAL,
    Layout,
    Step,
    after,
    extents,
    local_shape,
    message_boxes,
    message_shapes,
    reduce_pieces,
)
from windlass.plan.mesh import Mesh

Block = np.ndarray[Any, np.dtype[np.float64]]
Blocks = list[Block]


def run_steps(blocks: Blocks, shape: tuple[int, ...], layout: Layout, steps: tuple[Step, ...], mesh: Mesh) -> Blocks:
    """All steps, one after the other."""
    for step in steps:
        assert layout[step.axis] == step.source
        blocks = run_step(blocks, shape, layout, step, mesh)
        layout = after(layout, step)
    return blocks


def cut(whole: Block, layout: Layout, mesh: Mesh, rank: int) -> Block:
    """What a rank holds of `whole`; addends differ from rank to rank and sum to it."""
    slices = tuple(slice(start, stop) for start, stop in extents(whole.shape, layout, mesh, rank))
    block = whole[slices].copy()
    for axis, part in enumerate(layout):
        if part == PARTIAL:
            place, extent = mesh.coordinates(rank)[axis], mesh.extent(axis)
            block = block + 1000 * (axis + 1) * (place - (extent - 1) / 2) if extent > 1 else block
            block = block / extent
    return block


def run_step(blocks: Blocks, shape: tuple[int, ...], layout: Layout, step: Step, mesh: Mesh) -> Blocks:
    """The step on all ranks, by the messages that it says; both ends must agree on every shape."""
    axis_group = [mesh.group(rank, step.axis) for rank in range(mesh.size)]
    shapes = [message_shapes(shape, layout, step, mesh, rank) for rank in range(mesh.size)]
    for rank, group in enumerate(axis_group):
        for place, member in enumerate(group):
            here = mesh.coordinates(rank)[step.axis]
            assert shapes[rank][0][place] == shapes[member][1][here], "the ends of a message disagree"
    if step.kind == "reduce":
        return [
            reduced(blocks, group, shapes, mesh.coordinates(rank)[step.axis]) for rank, group in enumerate(axis_group)
        ]
    boxes = [message_boxes(shape, layout, step, mesh, rank) for rank in range(mesh.size)]
    later = []
    for rank, group in enumerate(axis_group):
        here = mesh.coordinates(rank)[step.axis]
        block = np.full(local_shape(shape, after(layout, step), mesh, rank), 0.0 if step.kind == "scatter" else np.nan)
        for place, member in enumerate(group):
            piece = blocks[member][box_slices(boxes[member][0][here])]
            target = box_slices(boxes[rank][1][place])
            assert piece.shape == block[target].shape == shapes[rank][1][place]
            block[target] = block[target] + piece if step.kind == "scatter" else piece
            if step.kind == "slice" and member != rank:
                assert piece.size == 0
        later.append(block)
    return later


def reduced(blocks: Blocks, group: tuple[int, ...], shapes: Sequence[Sequence[object]], place: int) -> Block:
    """A scatter of flat pieces and a gather of their sums."""
    cuts = reduce_pieces(blocks[group[0]].size, len(group))
    sums = [
        np.sum([blocks[member].ravel()[start:stop] for member in group], axis=0)
        for start, stop in itertools.pairwise(cuts)
    ]
    assert tuple((piece.size,) for piece in sums) == shapes[group[place]][0]
    return np.concatenate(sums).reshape(blocks[group[0]].shape)


def box_slices(box: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
