"""The chooser by hand: what is measured, what wins, what is remembered, and why."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from windlass.errors import ConfigError
from windlass.plan.convolution import DIRECTIONS, ConvChoice, ConvShape, Direction
from windlass.tuning.cache import TimesCache
from windlass.tuning.convolution import (
    BEHIND,
    DETOUR_S,
    HOPELESS,
    MARGIN,
    MEASURED,
    MODEL_MARGIN,
    Tuner,
    decide,
    real_measure,
)
from windlass.tuning.cost import Machine, predicted_s
from windlass.tuning.results import MIB, ConvCase, DirectionTuning, Settings
from windlass.tuning.timing import Effort

MACHINE = Machine(peak_flops=5e11, bytes_per_s=4e10, threads=2)


def case(**changes: Any) -> ConvCase:
    sizes: dict[str, Any] = {
        "batch": 8, "in_channels": 64, "height": 56, "width": 56, "out_channels": 64, "kernel": (3, 3),
        "padding": (1, 1, 1, 1),
    }  # fmt: skip
    shape = ConvShape(**(sizes | {key: value for key, value in changes.items() if key in ConvShape.__annotations__}))
    rest = {key: value for key, value in changes.items() if key not in ConvShape.__annotations__}
    return ConvCase(shape=shape, layout="channels_last", weight_layout="channels_last", **rest)


@dataclass
class Stage:
    """A tuner whose measurements are told."""

    times: dict[str, float] = field(default_factory=dict)
    workspace: dict[str, int] = field(default_factory=dict)
    folder: Path | None = None
    asked: list[tuple[str, Direction, tuple[str, ...]]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, asked: ConvCase, direction: Direction, names: Sequence[str]) -> dict[str, float]:
        self.asked.append((asked.key, direction, tuple(names)))
        return {name: self.times.get(f"{name}/{direction}", self.times.get(name, 1.0)) for name in names}

    def tuner(self, **settings: Any) -> Tuner:
        return Tuner(
            settings=Settings(**settings),
            machine=MACHINE,
            cache=TimesCache({}, warn=lambda message: None, folder=self.folder),
            measure=self.measure,
            workspace=lambda name, direction, case: self.workspace.get(name, 0),
            on_event=self.events.append,
        )


def test_the_fastest_measured_wins_in_each_direction() -> None:
    stage = Stage({"torch": 0.010, "winograd-4x4": 0.004, "winograd-2x2/weight": 0.003, "winograd-2x2": 0.006})
    tuning = stage.tuner().tune("c", [case()])
    assert tuning.choice == ConvChoice("winograd-4x4", "winograd-4x4", "winograd-2x2")
    assert tuning.directions[0].reason == "2.50 times as fast as PyTorch's"
    assert tuning.seconds() == pytest.approx(0.011) and tuning.seconds(torch=True) == pytest.approx(0.030)
    assert [direction for _, direction, _ in stage.asked] == list(DIRECTIONS)
    for _, _, names in stage.asked:
        assert names[0] == "torch" and len(names) <= 1 + MEASURED


@pytest.mark.parametrize(("share", "chosen"), [(1 / MARGIN + 1e-6, "torch"), (1 / MARGIN - 1e-6, "winograd-4x4")])
def test_pytorch_wins_ties(share: float, chosen: str) -> None:
    stage = Stage({"torch": 1.0, "winograd-4x4": share, "winograd-2x2": 2.0, "direct": 2.0, "im2col": 2.0})
    tuning = stage.tuner().tune("c", [case()])
    assert str(tuning.choice) == chosen
    if chosen == "torch":
        assert tuning.directions[0].reason == "PyTorch's wins the tie: winograd-4x4 takes 0.97 times its time"


def test_pytorch_s_slowest_kernels_are_not_waited_for() -> None:
    """oneDNN's gradient of weights in channels_last, from side 15 on, can take a minute for what takes 10 ms."""
    wide = case(kernel=(31, 31), padding=(15, 15, 15, 15), directions=("weight",))
    stage = Stage({"fft-64": 0.010})
    row = stage.tuner().tune("c", [wide]).directions[0]
    assert row.algorithm == "fft-64" and "torch" not in row.measured
    assert all("torch" not in names for _, _, names in stage.asked)
    assert row.seconds["torch"] == row.predicted["torch"] > 40 * row.seconds["fft-64"]
    assert "was not measured" in row.reason
    # Where Windlass's own is far slower than predicted, PyTorch's is measured after all.
    stage = Stage({"fft-64": row.predicted["torch"], "torch": 0.5 * row.predicted["torch"]})
    row = stage.tuner().tune("c", [wide]).directions[0]
    assert row.algorithm == "torch" and row.measured["torch"] == 0.5 * row.predicted["torch"]


def test_pytorch_is_measured_however_good_the_others_look() -> None:
    row = DirectionTuning(direction="forward")
    for seconds, winner in [
        ({"torch": 1.0, "direct": 1.0}, "torch"),
        ({"torch": 2.0, "direct": 1.0, "im2col": 0.5}, "im2col"),
        ({"torch": 1.0, "direct": 3.0}, "torch"),
    ]:
        assert decide(row, seconds, margin=MARGIN).algorithm == winner
    assert "direct takes 3.00 times its time" in decide(row, {"torch": 1.0, "direct": 3.0}, margin=MARGIN).reason


def test_predicted_losers_are_not_measured() -> None:
    for each in (case(), case(kernel=(15, 15), padding=(7, 7, 7, 7)), case(groups=64), case(in_channels=3)):
        stage = Stage()
        stage.tuner().tune("c", [each])
        for _, direction, names in stage.asked:
            price = {name: predicted_s(name, direction, each.shape, machine=MACHINE) for name in ("torch", *names)}
            assert all(price[name] <= HOPELESS * price["torch"] for name in names)
            ours = [price[name] for name in names if name != "torch"]
            assert ours == sorted(ours) and ours[-1] <= BEHIND * ours[0]


def test_where_all_others_are_predicted_losers_nothing_is_measured() -> None:
    stage = Stage()
    tuning = stage.tuner().tune("c", [case(batch=1, in_channels=4, out_channels=4, height=4, width=4)])
    assert stage.asked == [] and tuning.choice == ConvChoice()
    assert "is predicted to take" in tuning.directions[0].reason


def test_the_model_alone_measures_nothing_and_wants_more() -> None:
    stage = Stage()
    tuning = stage.tuner(tune="model").tune("c", [case()])
    assert stage.asked == [] and tuning.choice.forward.startswith("winograd")
    for row in tuning.directions:
        assert row.measured == {} and row.seconds == row.predicted
        assert row.predicted[row.algorithm] * MODEL_MARGIN < row.predicted["torch"]


@pytest.mark.parametrize(("settings", "why"), [({"tune": "off"}, "off"), ({"accuracy": "exact"}, "exact")])
def test_off_and_exact_leave_pytorch_s_own(settings: dict[str, Any], why: str) -> None:
    stage = Stage({"torch": 10.0})
    tuning = stage.tuner(**settings).tune("c", [case()])
    assert tuning.choice == ConvChoice() and stage.asked == []
    assert why in tuning.summary


@pytest.mark.parametrize(
    ("accuracy", "algorithms"),
    [
        ("strict", {"torch", "direct", "im2col", "winograd-2x2"}),
        ("standard", {"torch", "direct", "im2col", "winograd-2x2", "winograd-4x4"}),
        ("fast", {"torch", "direct", "im2col", "winograd-2x2", "winograd-4x4", "winograd-6x6"}),
    ],
)
def test_accuracy_decides_who_takes_part(accuracy: str, algorithms: set[str]) -> None:
    tuning = Stage().tuner(accuracy=accuracy).tune("c", [case()])
    assert {name for row in tuning.directions for name in row.predicted} == algorithms


def test_the_workspace_is_limited_per_thread() -> None:
    needed = 64 * MIB * MACHINE.threads
    for num_bytes, takes_part in ((needed, True), (needed + 1, False)):
        stage = Stage({"torch": 1.0, "winograd-4x4": 0.1}, workspace={"winograd-4x4": num_bytes})
        tuning = stage.tuner().tune("c", [case()])
        row = tuning.directions[0]
        assert ("winograd-4x4" in row.predicted) is (row.algorithm == "winograd-4x4") is takes_part
        assert ("winograd-4x4 needs 64 MiB of workspace a thread, 64 allowed" in row.reason) is not takes_part
    everything = dict.fromkeys(("direct", "im2col", "winograd-2x2", "winograd-4x4"), 6 * MIB)
    row = Stage(workspace=everything).tuner(workspace_mb=2).tune("c", [case()]).directions[0]
    assert row.algorithm == "torch"
    assert "winograd-4x4 needs 3 MiB of workspace a thread, 2 allowed" in row.reason
    assert Stage(workspace=everything).tuner(workspace_mb=3).tune("c", [case()]).directions[0].measured


def test_an_algorithm_that_fails_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from windlass.kernels import convolve

    def fail(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("no such\n instruction")

    monkeypatch.setattr(convolve, "forward", fail)
    events: list[dict[str, Any]] = []
    effort = Effort(min_rounds=1, max_rounds=1)
    measure = real_measure(threads=1, effort=effort, on_event=events.append)
    small = case(batch=1, in_channels=2, out_channels=2, height=8, width=8)
    assert set(measure(small, "forward", ["torch", "direct", "winograd-2x2"])) == {"torch"}
    assert [event["message"] for event in events] == [
        f"{name} fails on {small.shape}, forward: RuntimeError: no such instruction"
        for name in ("direct", "winograd-2x2")
    ]
    stage = Stage({"torch": 1.0})
    tuner = stage.tuner()
    tuner.measure = lambda case, direction, names: {"torch": 1.0}
    tuning = tuner.tune("c", [case(), case(batch=4)])
    assert tuning.choice == ConvChoice() and tuning.directions[0].reason == "every other algorithm failed"


def test_directions_that_are_not_needed_are_not_asked_for() -> None:
    stage = Stage({"torch": 1.0, "winograd-4x4": 0.1})
    tuning = stage.tuner().tune("c", [case(directions=("forward", "weight"))])
    assert [direction for _, direction, _ in stage.asked] == ["forward", "weight"]
    assert tuning.choice == ConvChoice("winograd-4x4", "torch", "winograd-4x4")


def test_calls_of_one_layer_add_up_each_as_often_as_it_comes() -> None:
    small, large = case(), case(height=112, width=112)
    stage = Stage({"torch": 1.0, "winograd-4x4": 0.25})
    tuning = stage.tuner().tune("c", [small, large, small])
    assert tuning.directions[0].measured["torch"] == 3.0
    assert tuning.directions[0].measured["winograd-4x4"] == 0.75
    assert len(stage.asked) == 2 * len(DIRECTIONS), "equal calls are measured once"


def test_a_layer_of_two_shapes_takes_what_can_do_both() -> None:
    # An FFT's tile must be wider than the filter; both calls are of one module, so the filter is the same.
    stage = Stage({"torch": 1.0}, workspace={})
    first = case(kernel=(5, 5), padding=(2, 2, 2, 2))
    tuner = stage.tuner()
    tuner.workspace = lambda name, direction, asked: 1 << 40 if name == "fft-16" and asked.shape.height == 112 else 0
    tuning = tuner.tune("c", [first, case(kernel=(5, 5), padding=(2, 2, 2, 2), height=112)])
    assert "fft-16" not in tuning.directions[0].predicted and "fft-32" in tuning.directions[0].predicted


def test_what_is_won_must_pay_for_the_detour_of_the_rest() -> None:
    base = {"torch": 1e-3, "winograd-2x2": 9e-3, "direct": 9e-3, "im2col": 9e-3}
    for gain, chosen in ((1.9 * DETOUR_S, "torch"), (2.1 * DETOUR_S, "torch/torch/winograd-4x4")):
        times = base | {"winograd-4x4": 9e-3, "winograd-4x4/weight": 1e-3 - gain}
        tuning = Stage(times).tuner().tune("c", [case(bias=False)])
        assert str(tuning.choice) == chosen
    # All directions changed: nothing goes a detour.
    assert str(Stage(base | {"winograd-4x4": 9.6e-4}).tuner().tune("c", [case()]).choice) == "winograd-4x4"
    assert "too little in all" in Stage(
        base | {"winograd-4x4": 9e-3, "winograd-4x4/weight": 9.6e-4}
    ).tuner().tune("c", [case()]).directions[2].reason  # fmt: skip


def test_known_times_are_not_measured_again_unless_a_rival_is_new(tmp_path: Path) -> None:
    stage = Stage({"torch": 1.0, "winograd-4x4": 0.5}, folder=tmp_path)
    first = stage.tuner().tune_all({"c": [case()], "same": [case()]})
    assert len(stage.asked) == len(DIRECTIONS)
    stage.asked.clear()
    assert stage.tuner().tune_all({"c": [case()], "same": [case()]}) == first
    assert stage.asked == []
    stage.tuner(accuracy="fast").tune_all({"c": [case()]})
    assert all("winograd-6x6" in names and "torch" in names for _, _, names in stage.asked)
    assert len(stage.asked) == len(DIRECTIONS)
    for other in (case(batch=4), case(bias=False), replace(case(), layout="contiguous"), case(directions=("forward",))):
        stage.asked.clear()
        stage.tuner().tune_all({"c": [other]})
        assert stage.asked, "these are other calls"


def test_progress_is_told_for_what_is_measured_only() -> None:
    stage = Stage()
    tuner = stage.tuner()
    tuner.tune_all({"a": [case()], "b": [case(batch=4)], "c": [case()]})
    assert [(event["layer"], event["done"], event["total"]) for event in stage.events] == [
        ("a", 0, 3), ("a", 0, 3), ("a", 0, 3), ("b", 1, 3), ("b", 1, 3), ("b", 1, 3),
    ]  # fmt: skip
    assert {event["kind"] for event in stage.events} == {"tuning"}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"tune": "mesure"},
            "tune: unknown way to tune 'mesure'; did you mean 'measure'? There are: auto, measure, model",
        ),
        ({"accuracy": "stric"}, "accuracy: unknown accuracy 'stric'; did you mean 'strict'"),
        ({"workspace_mb": -1}, "workspace_mb: needs a number of at least 0, got -1"),
    ],
)
def test_unknown_wishes_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(**settings)
    assert str(caught.value).startswith(line)


def test_keys_tell_apart_what_times_depend_on() -> None:
    cases = [
        case(), case(batch=4), case(in_channels=32), case(out_channels=32), case(height=28), case(width=28),
        case(kernel=(5, 5)), case(stride=(2, 2)), case(padding=(1, 1, 0, 0)), case(dilation=(2, 2)), case(groups=2),
        case(bias=False), case(directions=("forward",)), replace(case(), layout="contiguous"),
        replace(case(), weight_layout="contiguous"),
    ]  # fmt: skip
    assert len({each.key for each in cases}) == len(cases)
    assert case(directions=("forward", "weight")).key == case().key
