"""The plan that Windlass chooses by itself."""

from typing import Any

import pytest

from windlass.check.plan import check_plan
from windlass.plan.graph import INPUT, Graph, Layer
from windlass.plan.levers import LEVERS
from windlass.tuning.choose import CHANNELS_LAST_FROM, choose_plan


def layer(name: str, kind: str, source: str, channels: int, **numbers: int) -> Layer:
    given: dict[str, Any] = {
        "num_parameters": 1, "forward_macs": 100, "backward_macs": 200, "kept_bytes": 1, "weight_bytes": 1,
        "output_grad_bytes": 1, "weight_grad_bytes": 1, **numbers,
    }  # fmt: skip
    return Layer(name=name, kind=kind, inputs=(source,), output_shape=(4, channels, 8, 8), **given)


def graph(channels: int = 8, *, first_macs: int = 100, second_macs: int = 100, gradient_bytes: int = 1) -> Graph:
    return Graph(
        network="small",
        input_shape=(4, 3, 8, 8),
        layers=(
            layer("c1", "conv2d", INPUT, channels, forward_macs=first_macs),
            layer("relu", "relu", "c1", channels),
            layer("c2", "conv2d", "relu", 16, forward_macs=second_macs, weight_grad_bytes=gradient_bytes),
            layer("fc", "linear", "c2", 10, forward_macs=10**9),
        ),
        input_bytes=1,
        peak_bytes=1,
        peak_at="c1",
    )


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("gradient_bytes", [1, 1 << 30])
@pytest.mark.parametrize("channels", [1, 512])
def test_every_lever_is_chosen_possible_and_reasoned(workers: int, gradient_bytes: int, channels: int) -> None:
    found = graph(channels, gradient_bytes=gradient_bytes)
    plan = choose_plan(found, workers=workers, batch=12)
    assert list(plan.levers) == list(LEVERS)
    for name, choice in plan.levers.items():
        assert LEVERS[name].refusal(choice.value) is None
        assert choice.reason.strip() and "\n" not in choice.reason
    check_plan(plan, found)
    assert (plan.network, plan.input_shape, plan.workers, plan.batch) == ("small", (3, 8, 8), workers, 12)


def test_every_convolution_has_its_row_and_nothing_else_has() -> None:
    layers = choose_plan(graph(), workers=1, batch=4).layers
    assert [(layer.name, layer.kind) for layer in layers] == [("c1", "conv2d"), ("c2", "conv2d")]


def test_the_plan_is_of_the_structure_not_of_the_batch() -> None:
    assert choose_plan(graph(), workers=1, batch=4).graph == graph().digest()


def test_sums_overlap_only_when_there_is_more_than_one_rank_and_bucket() -> None:
    bucket = LEVERS["bucket_bytes"].default
    assert isinstance(bucket, int)
    rest = graph(gradient_bytes=0).memories()["∇W"]
    for workers, gradient_bytes, overlap in [
        (1, bucket * 9, False),
        (2, bucket - rest, False),
        (2, bucket - rest + 1, True),
        (9, bucket * 9, True),
    ]:
        plan = choose_plan(graph(gradient_bytes=gradient_bytes), workers=workers, batch=9)
        assert plan.value("overlap") is overlap


@pytest.mark.parametrize(
    ("channels", "first_macs", "second_macs", "layout"),
    [
        (CHANNELS_LAST_FROM, 100, 101, "channels_last"),
        (CHANNELS_LAST_FROM, 100, 100, "contiguous"),  # half of the work gains nothing
        (CHANNELS_LAST_FROM - 1, 1, 1000, "contiguous"),
        (512, 1000, 1, "contiguous"),  # the first convolution reads 3 channels
        (512, 0, 0, "contiguous"),
    ],
)
def test_the_layout_weighs_multiply_adds_by_input_channels(
    channels: int, first_macs: int, second_macs: int, layout: str
) -> None:
    found = graph(channels, first_macs=first_macs, second_macs=second_macs)
    assert choose_plan(found, workers=1, batch=4).value("layout") == layout
