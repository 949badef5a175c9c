"""The digest and the sums of a graph."""

from dataclasses import replace
from typing import Any

import pytest

from windlass.plan.graph import INPUT, Graph, Layer


def layer(name: str, kind: str, *inputs: str, shape: tuple[int, ...], parameters: int = 0, scale: int = 1) -> Layer:
    return Layer(
        name=name, kind=kind, inputs=inputs, output_shape=shape, num_parameters=parameters,
        forward_macs=10 * scale, backward_macs=20 * scale, kept_bytes=100 * scale, weight_bytes=200 * scale,
        output_grad_bytes=300 * scale, weight_grad_bytes=400 * scale,
    )  # fmt: skip


def graph(batch: int = 4) -> Graph:
    return Graph(
        network="small",
        input_shape=(batch, 1, 8, 8),
        layers=(
            layer("c1", "conv2d", INPUT, shape=(batch, 4, 8, 8), parameters=40),
            layer("r1", "relu", "c1", shape=(batch, 4, 8, 8), scale=2),
            layer("add", "add", "c1", "r1", shape=(batch, 4, 8, 8), scale=4),
        ),
        input_bytes=batch * 264,
        peak_bytes=1000 * batch,
        peak_at="r1",
    )


def test_sums_run_over_all_layers() -> None:
    assert (graph().num_parameters, graph().forward_macs, graph().backward_macs) == (40, 70, 140)
    assert graph().memories() == {"D": 700, "W": 1400, "∇D": 2100, "∇W": 2800}


def test_the_digest_does_not_see_the_batch_or_the_sizes_in_memory() -> None:
    assert graph(4).digest() == graph(64).digest()
    wide = replace(graph(), layers=tuple(replace(one, kept_bytes=7, forward_macs=7) for one in graph().layers))
    assert wide.digest() == graph().digest()
    assert replace(graph(), peak_bytes=1).digest() == graph().digest()


CHANGES: list[dict[str, Any]] = [
    {"name": "c2"},
    {"kind": "linear"},
    {"inputs": ("r1",)},
    {"inputs": (INPUT, INPUT)},
    {"output_shape": (4, 4, 8, 4)},
    {"num_parameters": 41},
]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_sees_every_part_of_the_structure(change: dict[str, Any], number: int) -> None:
    layers = list(graph().layers)
    layers[number] = replace(layers[number], **change)
    assert layers[number] != graph().layers[number]
    assert replace(graph(), layers=tuple(layers)).digest() != graph().digest()


def test_the_digest_sees_order_and_missing_layers() -> None:
    first, second, third = graph().layers
    digests = {
        replace(graph(), layers=layers).digest()
        for layers in [(first, second, third), (first, third, second), (first, second), ()]
    }
    assert len(digests) == 4
    assert all(digest.startswith("sha256:") and len(digest) == 7 + 16 for digest in digests)
