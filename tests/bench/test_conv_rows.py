"""The convolution benchmark's cases, means, tables and pictures, from rows that are told."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from windlass.bench.conv import (
    FFT_CONV,
    TORCH_LAST,
    TORCH_NCHW,
    ConvRow,
    geometric_means,
    kernel_cases,
    network_cases,
    num_turns,
    quartiles,
    rows_to_json,
)
from windlass.bench.convplot import STYLES, check_plot_path, draw_kernels, draw_network
from windlass.cli.convtable import details, summary
from windlass.errors import ConfigError
from windlass.plan.convolution import CONV_ALGORITHMS, DIRECTIONS

TORCH = ConvRow(
    case="a", shape="1x1x8x8 -> 1, 3x3", direction="forward", kernel=3, by=TORCH_LAST, turns=3, seconds=0.004,
    low_s=0.003, high_s=0.005, gflops=100.0, share=0.2, error=2e-7, is_auto=False, speedup=1.0, speedup_low=1.0,
    speedup_high=1.0,
)  # fmt: skip


def ours(by: str, speedup: float, *, auto: bool = False, **changes: object) -> ConvRow:
    row = replace(TORCH, by=by, seconds=0.004 / speedup, speedup=speedup, speedup_low=speedup / 2,
                  speedup_high=2 * speedup, is_auto=auto, gflops=100 * speedup)  # fmt: skip
    return replace(row, **changes)  # type: ignore[arg-type]


ROWS = [
    TORCH, ours("winograd-4x4", 4.0, auto=True), ours("direct", 0.5, error=math.nan), ours(TORCH_NCHW, 0.8),
    replace(TORCH, case="b"), ours("winograd-4x4", 9.0, auto=True, case="b"), ours(FFT_CONV, 0.1, case="b"),
    replace(TORCH, case="b", direction="weight", is_auto=True),
]  # fmt: skip


def test_means_are_geometric_and_of_those_that_do_all() -> None:
    assert geometric_means(ROWS) == pytest.approx(
        {
            ("forward", TORCH_LAST): 1.0,
            ("forward", "winograd-4x4"): 6.0,  # √(4 · 9)
            ("forward", "auto"): 6.0,
            ("weight", TORCH_LAST): 1.0,
            ("weight", "auto"): 1.0,
        }
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [([2.0], (2.0, 2.0, 2.0)), ([1.0, 3.0], (1.5, 2.0, 2.5)), ([4.0, 1.0, 3.0, 2.0, 5.0], (2.0, 3.0, 4.0))],
)
def test_quartiles(values: list[float], expected: tuple[float, float, float]) -> None:
    assert quartiles(values) == pytest.approx(expected)


def test_filters_keep_the_image_s_size() -> None:
    cases = kernel_cases([3, 4, 31], channels=8, size=40, batch=2, depthwise=False)
    assert list(cases) == ["3x3", "4x4", "31x31"]
    for case in cases.values():
        assert (case.shape.out_height, case.shape.out_width) == (40, 40)
        assert case.layout == case.weight_layout == "channels_last"
    (depthwise,) = kernel_cases([7], channels=8, size=40, batch=2, depthwise=True).values()
    assert depthwise.shape.is_depthwise and depthwise.shape.groups == 8


def test_a_network_s_equal_layers_are_one_case() -> None:
    cases = network_cases("vgg16", batch=2, size=32)
    assert list(cases)[:3] == ["features.0", "features.2", "features.5"]
    assert "features.12 (×2)" in cases and "features.24 (×3)" in cases
    assert sum(int(name.partition("×")[2].strip(")") or 1) for name in cases) == 13
    assert num_turns(cases, DIRECTIONS) == 3 * len(cases) - 1, "the first layer's input has no gradient"
    assert num_turns(cases, ["weight"]) == len(cases)


def test_the_summary_has_a_line_per_case_and_direction_and_the_means() -> None:
    lines = list(summary(ROWS))
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[2].startswith(
        "| a | 1x1x8x8 -> 1, 3x3 | forward | 4 | 5 | – | 1 winograd-4x4 | winograd-4x4 | 1 (3–5) |"
    )
    assert lines[2].endswith("| 400 | 20% | 2.0e-07 | 4.00 (2.00–8.00) |")
    assert "| weight | 4 | – | – | – | PyTorch's |" in lines[4]
    assert lines[6].startswith("forward: auto 6.00 times as fast as PyTorch (geometric mean; winograd-4x4 6.00, ")


def test_the_details_have_a_line_for_everything() -> None:
    lines = list(details(ROWS))
    assert len(lines) == 2 + len(ROWS) + 1 + 2
    assert "| winograd-4x4 (auto) |" in lines[3] and "| direct |" in lines[4] and "| – |" in lines[4]


def test_json_has_no_numbers_that_are_none() -> None:
    found = json.loads(rows_to_json(ROWS, {"cpu": "x"}, notes=["n"]), parse_constant=lambda name: pytest.fail(name))
    assert found["rows"][2]["error"] is None and found["rows"][0]["error"] == 2e-7
    assert found["notes"] == ["n"] and len(found["geometric_means"]) == 5


def every_row() -> list[ConvRow]:
    rows = []
    for kernel in (3, 7, 31):
        for direction in DIRECTIONS:
            for number, by in enumerate((TORCH_LAST, TORCH_NCHW, FFT_CONV, *CONV_ALGORITHMS)):
                if by != "torch":
                    speed: float = 1 + number * kernel / 10
                    rows.append(ours(by, speed, auto=by == "fft-16", case=f"{kernel}x{kernel}", kernel=kernel,
                                     direction=direction))  # fmt: skip
    return rows


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_pictures_are_drawn(tmp_path: Path, suffix: str) -> None:
    kernels, network = tmp_path / f"kernels{suffix}", tmp_path / f"network{suffix}"
    draw_kernels(every_row(), kernels, title="t", peak_flops=5e11)
    draw_network(every_row(), network, title="t")
    assert kernels.stat().st_size > 5000 and network.stat().st_size > 5000
    if suffix == ".svg":
        assert kernels.read_text().count("<!-- fft-64 -->") == 1, "one legend for all panels"
        assert "gradient of the weights" in kernels.read_text()


def test_all_have_a_style_and_no_two_the_same() -> None:
    names = [TORCH_LAST, TORCH_NCHW, FFT_CONV, *(name for name in CONV_ALGORITHMS if name != "torch")]
    assert set(names) == set(STYLES)
    looks = {(s["color"], s["marker"], s.get("linestyle", "-")) for s in STYLES.values()}
    assert len(looks) == len(STYLES)


def test_a_picture_that_cannot_be_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    check_plot_path(tmp_path / "x.png")
    for path, part in ((tmp_path / "x.gif", "ends in"), (tmp_path / "no" / "x.png", "no folder")):
        with pytest.raises(ConfigError, match=part):
            check_plot_path(path)
