"""Gupta et al.'s experiment: ways and recipes, runs of one epoch, rows and verdicts, the cost of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from windlass.bench.precision import (
    PAPER_NETWORKS,
    Experiment,
    Point,
    Run,
    RunResult,
    Way,
    results_to_json,
    rows_of,
    verdict,
)
from windlass.bench.precision_cost import QPYTORCH, CostCase, bench_cost, cost_cases, make_step, num_steps
from windlass.bench.precision_nets import build_paper_network
from windlass.bench.precision_run import check_data, train_run
from windlass.bench.precisionplot import draw_precision
from windlass.errors import ConfigError
from windlass.plan.number import Fixed, fixed
from windlass.plan.recipe import ROLES, parse_recipe

DIGITS = Experiment(data="digits", networks=("dnn",), fls=(14, 8), num_seeds=1, epochs=1)
FLAT = Experiment(data="synthetic:1x16x16:4:120", networks=("cnn",), fls=(8,), num_seeds=1, epochs=1)


def small(epochs: int = 1, network: str = "dnn", way: Way | None = None, seed: int = 0) -> Run:
    return Run(network=network, way=way or Way(), seed=seed, epochs=epochs)


def result(
    error: float, *, seed: int = 0, way: Way | None = None, still: tuple[str, ...] = (), loss: float = 1.0
) -> RunResult:
    share = None if way is None else 0.5
    points = tuple(
        Point(epoch=epoch, test_error=found, train_loss=loss, zeroed=share, moved=share, still=still, num_parameters=6)
        for epoch, found in ((1, 90.0), (2, error))
    )
    return RunResult(run=small(2, way=way, seed=seed), points=points, num_classes=10, seconds=1.0)


def test_ways_are_float32_and_16_bits_with_every_fl_and_rounding() -> None:
    experiment = Experiment(data="digits", fls=(14, 8), num_seeds=2)
    ways = experiment.ways()
    assert [str(way) for way in ways] == [
        "float32", "stochastic, FL 14", "stochastic, FL 8", "nearest, FL 14", "nearest, FL 8",
    ]  # fmt: skip
    runs = experiment.runs()
    assert len(set(map(str, runs))) == len(runs) == 2 * 2 * 5 and [run.seed for run in runs] == [0] * 10 + [1] * 10
    assert {run.epochs for run in runs if run.network == "cnn"} == {PAPER_NETWORKS["cnn"].epochs}
    own = Experiment(data="digits", fls=(8,)).runs()
    for name, network in PAPER_NETWORKS.items():
        assert sum(run.network == name for run in own) == 3 * network.num_seeds


@pytest.mark.parametrize("network", PAPER_NETWORKS)
@pytest.mark.parametrize("fl", [14, 10, 8])
def test_recipes_have_16_bits_in_every_role_and_outputs_have_room(network: str, fl: int) -> None:
    recipe = Way(fl, "nearest").recipe(network)
    assert parse_recipe(str(recipe)) == recipe and recipe.rounding == "nearest"
    numbers = {role: getattr(recipe, role) for role in ROLES}
    assert all(isinstance(number, Fixed) and number.wl == 16 for number in numbers.values())
    assert {numbers[role] for role in ("weights", "errors", "gradients", "updates")} == {fixed(16, fl)}
    assert numbers["activations"] == fixed(16, 10 if network == "cnn" else min(fl, 10))
    assert Way().recipe(network).is_plain


@pytest.mark.parametrize(("network", "size", "parameters"), [("dnn", 28, 1_796_010), ("cnn", 28, 37_610)])
def test_networks_are_the_papers(network: str, size: int, parameters: int) -> None:
    deviation = PAPER_NETWORKS[network].weight_deviation

    def build(seed: int) -> nn.Module:
        return build_paper_network(
            network, in_channels=1, image_size=size, num_classes=10, deviation=deviation,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    one, again, other = build(0), build(0), build(1)
    assert sum(parameter.numel() for parameter in one.parameters()) == parameters
    assert one(torch.zeros(2, 1, size, size)).shape == (2, 10)
    for name, weight in one.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
        if weight.dim() == 1:
            assert not weight.any()
        else:
            assert not torch.equal(weight, other.get_parameter(name))
            # A deviation estimated from n numbers is off by 1/sqrt(2n) of it; conv1 has 200: six of these are 0.3.
            assert float(weight.detach().std()) == pytest.approx(deviation, rel=0.3)


def test_a_run_learns_is_repeatable_and_counts_its_updates() -> None:
    way = Way(14)
    run = train_run(small(2, way=way), DIGITS)
    again = train_run(small(2, way=way), DIGITS)
    assert run.points == again.points and [point.epoch for point in run.points] == [1, 2]
    first, second = run.points
    assert second.train_loss < first.train_loss < 2.31  # ln 10 is 2.303
    assert first.zeroed is not None and first.moved is not None and 0 < first.zeroed < 1 and 0 < first.moved < 1
    assert not first.still and first.num_parameters == 6
    plain = train_run(small(way=Way()), DIGITS)
    assert plain.points[0].zeroed is None and plain.points[0].train_loss == pytest.approx(first.train_loss, abs=0.01)


def test_nearest_stands_still_where_stochastic_moves() -> None:
    """Updates of the hidden layers are far below half a step of 2^-8."""
    nearest = train_run(small(way=Way(8, "nearest")), DIGITS).points[-1]
    stochastic = train_run(small(way=Way(8)), DIGITS).points[-1]
    assert {"fc1.weight", "fc2.weight"} <= set(nearest.still) and not stochastic.still
    assert nearest.moved is not None and stochastic.moved is not None and nearest.moved < stochastic.moved / 10


def test_the_convolutional_network_trains() -> None:
    seen: list[Point] = []
    run = train_run(small(network="cnn", way=Way(12)), FLAT, on_point=seen.append)
    assert tuple(seen) == run.points and run.points[0].num_parameters == 8
    assert 0 <= run.points[0].test_error <= 100


def test_rows_compare_with_float32_of_the_same_seeds() -> None:
    way = Way(12, "nearest")
    results = [
        result(2.0, seed=1, way=way), result(3.0), result(1.0, seed=1), result(4.0, way=way, still=("fc1.weight",)),
        result(9.0, seed=2),
    ]  # fmt: skip
    plain, rounded = rows_of(results)
    assert (plain.way, plain.seeds, plain.low, plain.high, plain.verdict) == ("float32", (0, 1, 2), 1.0, 9.0, "")
    assert (rounded.way, rounded.seeds, rounded.test_error) == ("nearest, FL 12", (0, 1), 3.0)
    assert rounded.standard_error == 0.0 and plain.standard_error is None  # both seeds differ by 1
    assert rounded.difference == 1.0  # (4 - 3 + 2 - 1) / 2; seed 2 has no partner
    assert rounded.still == 1 and rounded.stalled == () and rounded.verdict == "worse by 1.00 points"
    assert rounded.zeroed == 0.5 and plain.zeroed is None
    (alone,) = rows_of([result(2.0, way=way)])
    assert alone.difference is alone.standard_error is None and alone.verdict == ""
    scattered = rows_of([result(2.0), result(2.0, seed=1), result(3.0, way=way), result(5.0, seed=1, way=way)])[1]
    assert scattered.difference == 2.0 and scattered.standard_error == pytest.approx(1.0)  # sqrt(2) / sqrt(2)


def test_runs_that_learn_nothing_have_stalled() -> None:
    """Guessing among ten classes costs ln 10 = 2.303."""
    way = Way(8, "nearest")
    results = [result(3.0), result(88.0, way=way, loss=2.302), result(3.0, seed=1), result(3.5, seed=1, way=way)]
    assert [row.verdict for row in rows_of(results)] == ["", "stalls with 1 of 2 seeds"]
    assert [row.verdict for row in rows_of(results[:2])] == ["", "stalls"] and rows_of(results[:2])[1].stalled == (0,)
    assert not result(88.0, loss=2.1).has_stalled


@pytest.mark.parametrize(
    ("difference", "num_stalled", "words"),
    [
        (0.3, 2, "within 0.3 points"),
        (0.31, 0, "worse by 0.31 points"),
        (0.31, 2, "stalls"),
        (-0.5, 0, "better by 0.50 points"),
        (None, 0, ""),
    ],
)
def test_verdicts(difference: float | None, num_stalled: int, words: str) -> None:
    assert verdict(difference, num_stalled=num_stalled, num_seeds=2) == words


def test_results_are_written_with_recipes_and_every_epoch() -> None:
    found = json.loads(results_to_json([result(3.0), result(3.5, way=Way(14))], DIGITS, {"cpu": "x"}))
    assert found["recipes"]["dnn"]["stochastic, FL 14"] == "fixed16"
    assert [point["test_error"] for point in found["runs"][1]["points"]] == [90.0, 3.5]
    assert found["runs"][0]["rounding"] is None and found["runs"][1]["fl"] == 14
    assert found["rows"][1]["difference"] == 0.5 and found["experiment"]["data"] == "digits"


def test_curves_are_drawn(tmp_path: Path) -> None:
    results = [
        result(3.0),
        result(3.5, way=Way(14)),
        result(2.5, seed=1, way=Way(14)),
        result(88.0, way=Way(8, "nearest")),
    ]
    draw_precision(results, tmp_path / "curves.png", title="here")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": ("cn",)}, "unknown network of the paper 'cn'; did you mean 'cnn'"),
        ({"fls": (16,)}, "FL of 16 bits is 1 to 15 here, got 16"),
        ({"roundings": ("up",)}, "unknown rounding 'up'"),
        ({"epochs": 0}, "epochs: needs at least 1, got 0"),
        ({"num_seeds": 0}, "seeds: needs at least 1, got 0"),
    ],
)
def test_experiments_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Experiment(data="digits", **changes)


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(ConfigError, match="--data digits: cnn needs images of side 16 at least, got 8"):
        check_data(Experiment(data="digits"))
    with pytest.raises(ConfigError, match="needs square images of one size, got 8x12"):
        check_data(Experiment(data="synthetic:1x8x12:2:10"))


def test_cases_of_cost() -> None:
    cases = cost_cases(["lenet5", "resnet18", "vgg16"], batch=None, layout="contiguous")
    assert [(case.network, case.size, case.batch) for case in cases] == [
        ("lenet5", 32, 64), ("lenet5", 32, 256), ("resnet18", 32, 64), ("resnet18", 224, 8), ("vgg16", 224, 8),
    ]  # fmt: skip
    assert [case.batch for case in cost_cases(["lenet5"], batch=3, layout="contiguous")] == [3]
    assert str(cases[2]) == "resnet18, 64×3×32×32"


def test_costs_are_rows_beside_float32() -> None:
    case = CostCase(network="lenet5", batch=2, size=32)
    steps: list[str] = []
    rows, notes = bench_cost([case], "fixed16", turns=4, on_turn=steps.append)
    found = {row.by: row for row in rows}
    assert list(found)[:2] == ["float32", "fixed16"] and (QPYTORCH in found) != bool(notes)
    assert found["float32"].times_float32 == 1.0 and found["fixed16"].turns == 4
    for row in rows:
        assert row.last_loss != row.first_loss and row.low_s <= row.seconds <= row.high_s
        assert row.first_loss == pytest.approx(found["float32"].first_loss, abs=0.05)
    if QPYTORCH in found:
        assert found[QPYTORCH].turns == 2  # turns 0 and 3
        assert len(steps) == num_steps([case], 4) == 2 * 6 + 1 + 2


def test_layouts_and_recipes_of_steps_train_alike() -> None:
    losses = []
    for layout in ("contiguous", "channels_last"):
        step = make_step(CostCase(network="resnet18", batch=2, size=8, layout=layout), recipe="fixed16")
        losses.append([step() for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], abs=0.1)
