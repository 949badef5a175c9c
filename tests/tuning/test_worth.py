"""When a run is long enough to measure for."""

import torch

from windlass.networks import NETWORKS, build_network
from windlass.networks.capture import capture
from windlass.plan.graph import Graph
from windlass.tuning.worth import decide_tuning, saved_s


def graph_of(network: str, *, batch: int, size: int) -> Graph:
    entry = NETWORKS[network]
    with torch.random.fork_rng(devices=[]):
        module = build_network(network, num_classes=10, in_channels=entry.in_channels, image_size=size)
    return capture(module, (batch, entry.in_channels, size, size), name=network, num_classes=10)


def test_lenet_never_waits_for_a_measurement() -> None:
    graph = graph_of("lenet5", batch=32, size=32)
    assert saved_s(graph, steps=10**9, threads=1, accuracy="standard") == 0.0
    assert decide_tuning(graph, steps=10**9, threads=1, accuracy="standard")[0] == "off"


def test_a_long_run_of_a_residual_network_does_and_a_short_one_does_not() -> None:
    graph = graph_of("resnet18", batch=16, size=64)
    assert decide_tuning(graph, steps=10, threads=2, accuracy="standard")[0] == "off"
    tune, reason = decide_tuning(graph, steps=100_000, threads=2, accuracy="standard")
    assert tune == "measure" and "will save" in reason


def test_seconds_saved_grow_with_steps_and_fall_with_threads() -> None:
    graph = graph_of("resnet18", batch=16, size=64)
    one = saved_s(graph, steps=100, threads=1, accuracy="standard")
    assert one > 0
    assert saved_s(graph, steps=200, threads=1, accuracy="standard") == 2 * one
    assert saved_s(graph, steps=100, threads=2, accuracy="standard") == one / 2
    assert saved_s(graph, steps=100, threads=1, accuracy="exact") == 0.0
