"""Drawings of graphs: the layout's laws and the formats."""

from itertools import pairwise
from pathlib import Path

import pytest

from windlass.errors import ConfigError
from windlass.networks import NETWORKS, build_network
from windlass.networks.capture import capture
from windlass.plan.graph import Graph
from windlass.report.dag import SUFFIXES, draw_graph, layout


def graph_of(name: str) -> Graph:
    entry = NETWORKS[name]
    side = 79 if name == "googlenet" else entry.default_size
    module = build_network(name, num_classes=10, in_channels=entry.in_channels, image_size=side)
    return capture(module, (2, entry.in_channels, side, side), name=name, num_classes=10)


@pytest.mark.parametrize("name", ["lenet5", "resnet18", "googlenet"])
def test_boxes_do_not_overlap_and_edges_go_down_one_rank(name: str) -> None:
    graph = graph_of(name)
    ranks = layout(graph)
    boxes = [slot.layer.name for rank in ranks for slot in rank if slot.layer is not None]
    assert sorted(boxes) == sorted(["input", *(layer.name for layer in graph.layers)])
    for rank in ranks:
        for left, right in pairwise(rank):
            assert left.x + left.half_width <= right.x - right.half_width + 1e-9
        for slot in rank:
            assert all(target.rank == slot.rank + 1 for target in slot.below)
            if slot.layer is not None and slot.layer.name != "input":
                assert len(slot.above) == len(slot.layer.inputs)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"lenet5{suffix}"
    draw_graph(graph_of("lenet5"), path)
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)
    if suffix == ".svg":
        assert path.stat().st_size > 10_000


def test_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"drawn as .png, .svg, .pdf, got '.gif'"):
        draw_graph(graph_of("lenet5"), tmp_path / "lenet5.gif")
