"""The chooser's table and sums."""

from windlass.plan.convolution import ConvShape
from windlass.tuning.report import ConvolutionPlan
from windlass.tuning.results import ConvCase, DirectionTuning, LayerTuning, Settings

CASE = ConvCase(shape=ConvShape(batch=1, in_channels=2, height=8, width=8, out_channels=3, kernel=(3, 3)))

CHANGED = LayerTuning(
    name="a.b",
    cases=(CASE, CASE),
    directions=(
        DirectionTuning(direction="forward", algorithm="direct", reason="r1",
                        predicted={"torch": 3e-3, "direct": 2e-3, "im2col": 9.0},
                        measured={"torch": 4e-3, "direct": 1e-3}),
        DirectionTuning(direction="weight", reason="r2", predicted={"torch": 0.25}),
    ),
    activation="relu",
)  # fmt: skip
ALONE = LayerTuning(name="c", reason="it is special")


def test_seconds_are_the_best_known_of_each_direction() -> None:
    assert CHANGED.seconds() == 1e-3 + 0.25
    assert CHANGED.seconds(torch=True) == 4e-3 + 0.25
    assert ALONE.seconds() == ALONE.seconds(torch=True) == 0.0
    assert str(CHANGED.choice) == "direct/torch/torch" and str(ALONE.choice) == "torch"


def test_reasons_are_told_once_where_they_agree() -> None:
    assert CHANGED.summary == "forward: r1; weight: r2"
    assert ALONE.summary == "it is special"
    same = LayerTuning(name="x", cases=(CASE,), directions=(
        DirectionTuning(direction="forward", reason="r"), DirectionTuning(direction="weight", reason="r"),
    ))  # fmt: skip
    assert same.summary == "r"


def test_the_table_has_a_line_per_direction_with_times_beside_pytorch_s() -> None:
    lines = str(ConvolutionPlan(layers=(CHANGED, ALONE), advice=("do this",))).splitlines()
    assert len({len(line.rstrip()) for line in lines[:2]}) <= 2
    assert lines[2].split("  ")[0] == "a.b"
    assert "2 times 1x2x8x8 -> 3, 3x3" in lines[2]
    assert lines[2].split()[-7:] == ["relu", "1", "2", "4", "3", "4.00", "r1"]
    assert lines[3].split() == ["weight", "torch", "250", "250", "1.00", "r2"]
    assert lines[4].split() == ["c", "torch", "it", "is", "special"]
    assert lines[5] == (
        "1 of 2 convolutions by another algorithm than PyTorch's: "
        "251.0 ms a step where PyTorch's take 254.0 ms, measured"
    )
    assert lines[6] == "do this"


def test_nothing_changed_is_said_so() -> None:
    plan = ConvolutionPlan(layers=(ALONE,), settings=Settings(tune="model"))
    assert plan.summary() == "0 of 1 convolutions by another algorithm than PyTorch's"
    assert plan.to_mapping()["peak_flops"] is None
    assert str(ConvolutionPlan(layers=())).splitlines()[0].startswith("layer")
