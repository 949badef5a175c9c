from __future__ import annotations

import re
from pathlib import Path

import pytest
from precision_rows import Row, entry, epochs, precision_row, still
from sample_runs import config_of, end_row, good_run, plan_of, training_rows, write_run

from windlass.report.blocks import Section, Table, Words
from windlass.report.curves import Chart
from windlass.report.page import write_report
from windlass.report.precision import numbers
from windlass.report.run import load_run
from windlass.report.sections import sections

STEPS = 10
LAYERS = ("c1", "c3")


def usual(*, saturated: int = 3, zeroed: int = 600) -> list[Row]:
    """All roles of two layers, with a rounding error of a quarter of a step."""
    made = []
    for layer in LAYERS:
        for role in ("updates", "weights", "activations", "errors", "gradients"):
            name = layer if role in ("activations", "errors") else f"{layer}.weight"
            more = {"zeroed": zeroed, "moved": 900 - zeroed} if role == "updates" else {}
            step = {"activations": 2**-10, "errors": 2**-20}.get(role, 2**-14)
            made.append(entry(role, name, saturated=saturated, error_sum=250 * step, **more))
    return made


def run_with(folder: Path, precision: list[Row], *, num_epochs: int = 3, workers: int = 2) -> Path:
    """A run with a precision row after the row of its epoch."""
    rows: list[Row] = []
    for row in training_rows(num_epochs=num_epochs, steps_per_epoch=STEPS):
        rows.append(row)
        if row["kind"] == "epoch":
            rows += [made for made in precision if made["epoch"] == row["epoch"]]
    return write_run(folder, [*rows, end_row(rows)], config=config_of(workers=workers), plan=plan_of(workers=workers))


def section_of(folder: Path) -> Section:
    made = numbers(load_run(folder))
    assert made is not None
    return made


def words_of(folder: Path) -> dict[str, str]:
    block = section_of(folder).blocks[0]
    assert isinstance(block, Words)
    return {remark.word: f"{remark.tone}: {remark.text}" for remark in block.remarks}


def charts_of(folder: Path) -> dict[str, Chart]:
    return {block.title: block for block in section_of(folder).blocks if isinstance(block, Chart)}


def table_of(folder: Path) -> Table:
    (table,) = (block for block in section_of(folder).blocks if isinstance(block, Table))
    return table


def line(chart: Chart, label: str) -> tuple[list[float], list[float]]:
    (shape,) = (shape for shape in chart.shapes if shape.label == label)
    return list(shape.x), list(shape.y)


def test_a_run_without_such_rows_looks_as_before(tmp_path: Path) -> None:
    folder = good_run(tmp_path / "run", num_epochs=2)
    assert numbers(load_run(folder)) is None
    assert "numbers" not in [made.key for made in sections(load_run(folder))]
    text = write_report([folder], tmp_path / "report.html").read_text()
    assert 'class="words' not in text
    assert "#numbers" not in text


def test_rows_in_which_nothing_was_rounded_make_no_section(tmp_path: Path) -> None:
    empty = [precision_row(0), precision_row(1, entry("weights", "c1.weight", elements=0)), precision_row(2, rows="x")]
    assert numbers(load_run(run_with(tmp_path / "run", empty))) is None


def test_words_come_first_then_charts_then_the_table(tmp_path: Path) -> None:
    blocks = section_of(run_with(tmp_path / "run", epochs([usual()] * 3))).blocks
    assert [block.kind for block in blocks] == ["words", *["chart"] * 4, "table"]


def test_a_healthy_run_says_so_in_one_remark(tmp_path: Path) -> None:
    words = words_of(run_with(tmp_path / "run", epochs([usual(saturated=9, zeroed=450)] * 3)))
    assert words == {
        "recipe": "plain: fixed16: weights <2,14>, activations <6,10>, errors <-4,20>, gradients <2,14>, updates "
        "<2,14>, stochastic rounding. Errors are those of the mean loss, for which error_scale shifts <2,14>. "
        "Counted on rank 0 alone.",
        "fine": "good: No weight has stalled, and no tensor had more than 1% of its numbers out of range. In epoch 3, "
        "50.00% of the updates rounded to zero, and at most 0.90% of a tensor’s numbers, the weights of c1.weight, was "
        "out of range.",
    }


def test_one_worker_counts_everything(tmp_path: Path) -> None:
    words = words_of(run_with(tmp_path / "run", epochs([usual(saturated=0)] * 3), workers=1))
    assert "rank 0" not in words["recipe"]
    assert words["fine"].endswith("and nothing was out of range.")


def test_stalls_and_saturation_are_said_and_then_nothing_is_fine(tmp_path: Path) -> None:
    lost = [usual(), [*usual(), still("fc.bias")], [*usual(saturated=50), still("fc.bias"), entry("updates", "x.bias")]]
    words = words_of(run_with(tmp_path / "run", epochs(lost, recipe="fixed16,rounding=nearest")))
    assert list(words) == ["recipe", "stalled", "out of range"]
    assert words["stalled"].startswith(
        "bad: All 2,000 updates of fc.bias rounded to zero from epoch 2 to 3: it no longer"
    )
    assert words["out of range"].startswith("fair: Out of range in epoch 3: 5.00%")
    back = words_of(run_with(tmp_path / "back", epochs([[still("a.bias")], [entry("updates", "a.bias")]])))
    assert list(back) == ["recipe", "had stalled"]


def test_charts_hold_the_shares_of_every_epoch(tmp_path: Path) -> None:
    counts = [(3, 450), (30, 600), (6, 900)]
    charts = charts_of(run_with(tmp_path / "run", epochs([usual(saturated=s, zeroed=z) for s, z in counts])))
    assert line(charts["Updates rounded to zero"], "all parameters") == ([1, 2, 3], [0.5, 600 / 900, 1.0])
    for role in ("weights", "activations", "errors", "gradients", "updates"):
        assert line(charts["Numbers out of range"], role) == ([1, 2, 3], [0.003, 0.03, 0.006])
        assert line(charts["Mean rounding error"], role) == ([1, 2, 3], [0.25] * 3)
    assert line(charts["Other numbers rounded to zero"], "gradients")[1] == [0.1] * 3
    assert "updates" not in charts["Other numbers rounded to zero"].summary()


def test_the_parameter_that_loses_most_is_named(tmp_path: Path) -> None:
    entries = [[entry("updates", "a.weight", zeroed=10), entry("updates", "b.weight", zeroed=90 * i)] for i in range(3)]
    chart = charts_of(run_with(tmp_path / "run", epochs(entries)))["Updates rounded to zero"]
    assert line(chart, "b.weight, most at the end")[1] == [0.0, 90 / 990, 180 / 1080]
    assert len([shape for shape in chart.shapes if shape.style == "faint"]) == 2


def test_little_out_of_range_looks_little(tmp_path: Path) -> None:
    charts = charts_of(run_with(tmp_path / "run", epochs([usual(saturated=1)] * 3)))
    assert charts["Numbers out of range"].y.high == pytest.approx(0.01)


def test_a_run_that_stopped_inside_an_epoch_has_its_point_there(tmp_path: Path) -> None:
    made = [*epochs([usual()] * 2), precision_row(2, *usual(), step=2 * STEPS + STEPS // 2)]
    x, _ = line(charts_of(run_with(tmp_path / "run", made))["Mean rounding error"], "weights")
    assert x == [1, 2, 2.5]


def test_floating_point_has_a_chart_of_its_own(tmp_path: Path) -> None:
    entries = [entry("weights", "c1.weight", format="bfloat16", error_sum=2.0), entry("errors", "c1", format="float32")]
    folder = run_with(tmp_path / "run", epochs([entries] * 3, recipe="bfloat16"))
    charts = charts_of(folder)
    assert "Mean rounding error" not in charts
    assert line(charts["Mean rounding error in floating point"], "weights")[1] == [0.002] * 3
    assert [s.label for s in charts["Mean rounding error in floating point"].shapes if s.label] == ["weights"]
    assert table_of(folder).rows[0][6].text == "–"


def test_the_table_has_every_role_and_layer_of_the_last_row(tmp_path: Path) -> None:
    table = table_of(run_with(tmp_path / "run", epochs([usual(), usual(saturated=1000, zeroed=9), usual(zeroed=300)])))
    assert table.title == "Layers in epoch 3"
    assert [column.title for column in table.columns][:3] == ["layer", "role", "format"]
    texts = [[cell.text for cell in row] for row in table.rows]
    assert len(texts) == 10
    assert texts[0] == ["c1.weight", "weights", "<2,14>", "1,000", "0.30%", "10.00%", "0.2500", "1.53e-05", "–"]
    assert texts[-1] == ["c3.weight", "updates", "<2,14>", "1,000", "0.30%", "33.33%", "0.2500", "1.53e-05", "600"]


def test_a_layer_missing_in_the_last_row_stays_in_the_table(tmp_path: Path) -> None:
    made = [*epochs([usual()] * 2), precision_row(2, entry("activations", "c1", elements=7))]
    rows = table_of(run_with(tmp_path / "run", made)).rows
    assert len(rows) == 10
    assert [row[3].text for row in rows if row[0].text == "c1" and row[1].text == "activations"] == ["7"]


def test_a_resumed_run_forgets_what_came_after(tmp_path: Path) -> None:
    first, again = epochs([usual(zeroed=450)] * 3), epochs([usual(zeroed=0)] * 3)
    steps = training_rows(num_epochs=3, steps_per_epoch=STEPS)
    resume = {"kind": "resume", "step": 15, "workers": 2}
    folder = write_run(tmp_path / "run", [*steps, *first, resume, *steps[STEPS + 6 :], *again[1:]])
    assert list(load_run(folder).precisions) == [first[0], *again[1:]]
    chart = charts_of(folder)["Updates rounded to zero"]
    assert line(chart, "all parameters")[1] == [0.5, 0.0, 0.0]
    assert [mark.text for mark in chart.marks] == ["resumed"]


def test_the_page_has_the_section_and_escapes_names(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    made = epochs([[*usual(), still(evil), entry("activations", evil, saturated=99)]] * 3, recipe=evil)
    folder = run_with(tmp_path / "run", made)
    text = write_report([folder], tmp_path / "report.html").read_text()
    assert '<a href="#numbers">Numbers</a>' in text
    assert "stalled</span>" in text
    assert "alert(1)<" not in text
    paths = re.findall(r' d="([^"]*)"', text)
    assert paths
    assert not any("nan" in d or "inf" in d for d in paths)
    pair = write_report([folder, good_run(tmp_path / "other", num_epochs=1)], tmp_path / "pair.html").read_text()
    assert 'id="run1-numbers"' in pair
    assert 'id="run2-numbers"' not in pair


@pytest.mark.parametrize(
    "more",
    [{"epoch": None}, {"step": None}, {"recipe": None}, {"epoch": "x", "step": "y", "recipe": 3}],
)
def test_a_row_that_lacks_something_still_makes_a_page(tmp_path: Path, more: Row) -> None:
    folder = write_run(tmp_path / "run", [precision_row(0, *usual(), still("z.bias")) | more])
    write_report([folder], tmp_path / "report.html")
    assert "stalled" in words_of(folder)


def test_a_deep_network_has_a_folded_table_and_no_bundle_of_lines(tmp_path: Path) -> None:
    entries = [entry("updates", f"l{i}.weight") for i in range(41)]
    folder = run_with(tmp_path / "run", epochs([entries] * 3))
    assert table_of(folder).is_folded
    assert not any(s.style == "faint" for s in charts_of(folder)["Updates rounded to zero"].shapes)
