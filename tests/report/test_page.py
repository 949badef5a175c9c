from __future__ import annotations

import json
import math
import os
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_runs import (
    Row,
    config_of,
    deep_graph,
    end_row,
    good_run,
    lenet_graph,
    plan_of,
    training_rows,
    write_run,
)

from windlass.errors import ConfigError, DataError, WriteError
from windlass.report.page import write_report

VOID = {"meta", "link", "br", "img", "hr", "input", "path"}


class Page(HTMLParser):
    """A page's tags, tables and tiles; refuses tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.tiles: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._words: list[str] = []
        self._tile = ""
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "dt", "dd"):
            self._words = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self._words.append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        words = "".join(self._words).replace("\N{NO-BREAK SPACE}", " ")
        if tag in ("td", "th"):
            self.rows[-1].append(words)
        if tag == "dt":
            self._tile = words
        if tag == "dd":
            self.tiles.setdefault(self._tile, []).append(words)

    def row(self, name: str) -> list[str]:
        """The first table row whose heading is `name`."""
        return next(row for row in self.rows if row and row[0] == name)


def page_of(*folders: Path) -> Page:
    out = folders[0].parent / "report.html"
    assert write_report(folders, out) == out
    return Page(out.read_text(encoding="utf-8"))


def steps_of(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "step"]


@pytest.fixture
def rows() -> list[Row]:
    made = training_rows(seed=5, num_epochs=4, steps_per_epoch=20)
    return [*made, end_row(made)]


def test_a_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = page_of(good_run(tmp_path / "one"), good_run(tmp_path / "two", seed=2))
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "srcset", "xlink:href", "onclick", "onload"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"https?://|//[a-z]|@import|url\(", re.sub(r"^\s*//.*$", "", page.text, flags=re.M))
    assert "default-src 'none'" in page.text


def test_links_lead_to_sections_of_the_page(tmp_path: Path) -> None:
    for folders in ([good_run(tmp_path / "one")], [tmp_path / "one", good_run(tmp_path / "two", seed=2)]):
        page = page_of(*folders)
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        targets = {(attributes["href"] or "")[1:] for _, attributes in page.tags if "href" in attributes}
        targets |= {
            value or "" for _, attributes in page.tags for key, value in attributes.items() if key == "aria-labelledby"
        }
        assert len(ids) == len(set(ids))
        assert targets <= set(ids)


def test_the_tiles_hold_the_key_figures(tmp_path: Path, rows: list[Row]) -> None:
    tiles = page_of(write_run(tmp_path / "run", rows)).tiles
    steps, tests = steps_of(rows), [row for row in rows if row["kind"] == "epoch"]
    best = max(tests, key=lambda row: float(row["test_accuracy"]))
    speed = statistics.median(row["images"] / row["seconds"] for row in steps)
    share = sum(row["data_s"] for row in steps) / sum(row["seconds"] for row in steps)
    assert tiles["Best test accuracy"][0] == f"{100 * best['test_accuracy']:.2f}%"
    assert tiles["Best test accuracy"][1] == f"after {best['epoch'] + 1} of 4 epochs"
    assert float(tiles["Final training loss"][0]) == pytest.approx(tests[-1]["train_loss"], rel=1e-3)
    assert tiles["Images per second"][0] == f"{speed / 1000:.1f} k"
    assert tiles["Total time"] == [f"{1000 * rows[-1]['seconds']:.0f} ms", "80 steps, 4 epochs"]
    assert tiles["Waiting for data"][0] == f"{100 * share:.2f}%"
    assert tiles["Parameters"][0] == "61.7 k"  # 61,706 in LeNet-5
    assert tiles["MACs per image"][0] == "417 k"  # 117,600 + 240,000 + 48,000 + 10,080 + 840
    assert tiles["Peak memory, predicted"] == ["5.57 MiB", "at features.1 (backward)"]


def test_the_parts_of_a_step_are_means_medians_and_shares(tmp_path: Path, rows: list[Row]) -> None:
    page = page_of(write_run(tmp_path / "run", rows))
    steps = steps_of(rows)
    whole = sum(row["seconds"] for row in steps)
    names = ("data", "forward", "backward", "communication", "update", "other")
    for name in names:
        values = [row[f"{name}_s"] for row in steps]
        expected = [
            f"{1000 * sum(values) / len(values):.3f} ms",
            f"{1000 * statistics.median(values):.3f} ms",
            f"{100 * sum(values) / whole:.2f}%",
        ]
        assert page.row("waiting for data" if name == "data" else name)[1:] == expected
    assert page.row("whole step")[1] == f"{1000 * whole / len(steps):.3f} ms"


def test_the_network_is_there_layer_by_layer_with_totals(tmp_path: Path, rows: list[Row]) -> None:
    page = page_of(write_run(tmp_path / "run", rows))
    graph = lenet_graph()
    for layer in graph.layers:
        row = page.row(layer.name)
        assert row[1] == layer.kind
        assert row[3] == ", ".join(layer.inputs)
        assert row[4] == " × ".join(map(str, layer.output_shape))
    assert page.row("features.3")[2] == "im2col"
    assert page.row("features.3")[5] == "2,416"
    titles = {attributes.get("title") for tag, attributes in page.tags if tag == "td"}
    assert f"{graph.forward_macs:,}" in titles
    for num_bytes in graph.memories().values():
        assert f"{num_bytes:,}" in titles


def test_plan_configuration_and_machine_are_printed(tmp_path: Path, rows: list[Row]) -> None:
    page = page_of(write_run(tmp_path / "run", rows))
    assert page.row("allreduce") == ["allreduce", "ring", "two workers on one host"]
    assert page.row("optimizer.momentum")[1] == "0.9"
    assert page.row("memory_bytes")[1] == "16.0 GiB"
    assert page.row("host")[1] == "node-17"
    assert "<span>lenet5</span><span>digits</span><span>2 workers</span><span>batch 64</span>" in page.text


def test_a_long_network_is_folded(tmp_path: Path, rows: list[Row]) -> None:
    short = page_of(write_run(tmp_path / "short", rows))
    long = page_of(write_run(tmp_path / "long", rows, graph=deep_graph()))
    assert "details" not in {tag for tag, _ in short.tags}
    assert "details" in {tag for tag, _ in long.tags}


def test_every_chart_says_what_it_shows(tmp_path: Path, rows: list[Row]) -> None:
    page = page_of(write_run(tmp_path / "run", rows))
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) == 5
    for attributes in charts:
        assert attributes["role"] == "img"
        assert "against step" in (attributes["aria-label"] or "")
    numbers = re.findall(r' d="([^"]*)"', page.text)
    assert numbers
    assert not any("nan" in d or "inf" in d or "None" in d for d in numbers)


def test_text_cannot_become_markup(tmp_path: Path, rows: list[Row]) -> None:
    evil = "<script>alert(1)</script>\"'&"
    plan = plan_of() | {"levers": {evil: {"value": evil, "reason": evil}}, "network": evil}
    rows[-1] |= {"message": evil, "status": evil}
    rows.insert(0, {"kind": "checkpoint", "step": 0, "name": evil, "best": True})
    graph = deep_graph(1)
    object.__setattr__(graph.layers[0], "name", evil)
    object.__setattr__(graph, "peak_at", evil)
    folder = write_run(tmp_path / "<script>", rows, config=config_of(data=evil), plan=plan, graph=graph)
    (folder / "machine.json").write_text(json.dumps({evil: evil}))
    for page in (page_of(folder), page_of(folder, write_run(tmp_path / "<b>", rows))):
        assert [tag for tag, _ in page.tags].count("script") == 1
        assert "b" not in {tag for tag, attributes in page.tags if attributes}
        assert "alert(1)<" not in page.text
        assert evil in page.row(evil)[0]


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = good_run(tmp_path / "run")
    assert page_of(folder).text == page_of(folder).text


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    made = training_rows(num_epochs=40, steps_per_epoch=500)
    page = page_of(write_run(tmp_path / "run", [*made, end_row(made)], graph=deep_graph()))
    assert len(page.text.encode()) < 500_000


def test_a_failed_run_tells_why(tmp_path: Path, rows: list[Row]) -> None:
    broken = steps_of(rows)[:30]
    broken[-1]["loss"] = math.nan
    end = {
        "kind": "end",
        "status": "failed",
        "step": 30,
        "seconds": 1.0,
        "message": "NaN in layer features.3",
    }
    page = page_of(write_run(tmp_path / "run", [*broken, end], tail='{"kind":'))
    assert "failed" in page.text
    assert "NaN in layer features.3" in page.text
    assert "not finite from step 30." in page.text
    assert "half-written" in page.text


def test_a_resumption_is_marked(tmp_path: Path, rows: list[Row]) -> None:
    resumed = [*rows[:44], {"kind": "resume", "step": 40, "workers": 2}, *rows[44:]]
    page = page_of(write_run(tmp_path / "run", resumed))
    assert page.row("resumed") == ["resumed", "40", "", "with 2 workers"]
    assert page.text.count('class="mark"') == 4  # one in each chart of section Learning


def with_graph_only(folder: Path) -> None:
    (folder / "plan.yaml").unlink()
    (folder / "machine.json").unlink()


@pytest.mark.parametrize(
    "kept",
    [
        [],
        [{"kind": "step", "step": 1}],
        [{"kind": "step", "step": 1, "seconds": 0.0, "images": 64, "data_s": 0.0}],
        [{"kind": "epoch", "epoch": 0, "step": 3, "test_accuracy": None}],
        [{"kind": "epoch"}, {"kind": "checkpoint"}, {"kind": "end"}],
        [{"kind": "epoch", "epoch": 0, "step": 3, "test_accuracy": 1.0, "test_loss": 0.0}],
        [{"kind": "end", "status": "stopped", "seconds": None, "message": None}],
    ],
)
def test_a_run_with_little_in_it_makes_a_page(tmp_path: Path, kept: list[Row]) -> None:
    bare = write_run(tmp_path / "bare", kept, config={}, plan={"levers": {"a": 1}, "layers": 3})
    (bare / "graph.json").unlink()
    poor = write_run(tmp_path / "poor", kept)
    with_graph_only(poor)
    page_of(bare)
    page_of(poor)
    page_of(bare, poor, good_run(tmp_path / "good", num_epochs=1))


def test_a_comparison_marks_the_best_and_lists_only_what_differs(tmp_path: Path) -> None:
    first, second = training_rows(seed=1), training_rows(seed=2, workers=1, speed=2.0)
    one = write_run(tmp_path / "one", [*first, end_row(first)])
    changed = config_of(workers=1, optimizer=config_of()["optimizer"] | {"lr": 0.1})
    changed["extra"] = "yes"
    two = write_run(tmp_path / "two", [*second, end_row(second)], config=changed, plan=plan_of(workers=1))
    page = page_of(one, two)
    head = page.text[: page.text.index('id="runs"')]
    compared = Page(head[head.index('<section id="differences"') :].split("</section>")[0] + "</section>")
    names = [row[0] for row in compared.rows if row[0] != "name"]
    assert names == ["optimizer.lr", "workers", "extra", "workers"]  # the last is the plan's
    assert compared.row("optimizer.lr")[1:] == ["0.05", "0.1"]
    assert compared.row("extra")[1:] == ["–", "yes"]
    speeds = [statistics.median(r["images"] / r["seconds"] for r in steps_of(made)) for made in (first, second)]
    expected = [f"{speeds[0] / 1000:.1f} k", f"★best: {speeds[1] / 1000:.1f} k"]
    assert page.row("Images per second")[1:] == expected
    assert page.row("Parameters")[1:] == ["61.7 k", "61.7 k"]
    assert [tag for tag, attributes in page.tags if attributes.get("class") == "run"] == ["details"] * 2


def test_time_to_the_accuracy_that_all_reached(tmp_path: Path) -> None:
    made = [training_rows(seed=1), training_rows(seed=2, speed=1.5)]
    folders = [write_run(tmp_path / f"run{i}", [*rows, end_row(rows)]) for i, rows in enumerate(made)]
    tests = [[row for row in rows if row["kind"] == "epoch"] for rows in made]
    target = min(max(row["test_accuracy"] for row in each) for each in tests)
    row = next(row for row in page_of(*folders).rows if row and row[0].startswith("Time in steps to"))
    assert f"{100 * target:.2f}%" in row[0]
    for text, rows, each in zip(row[1:], made, tests, strict=True):
        step = next(test["step"] for test in each if test["test_accuracy"] >= target)
        seconds = sum(r["seconds"] for r in steps_of(rows) if r["step"] <= step)
        number, unit = text.removeprefix("★best: ").split(" ")
        assert float(number) * {"ms": 1e-3, "s": 1.0}[unit] == pytest.approx(seconds, rel=5e-3)


def test_a_step_that_was_recorded_stands_for_those_since_the_last(tmp_path: Path, rows: list[Row]) -> None:
    kept = [row for row in rows[:-1] if row["kind"] != "step" or row["step"] % 10 == 0]
    page = page_of(write_run(tmp_path / "run", kept))
    seconds = 10 * sum(row["seconds"] for row in steps_of(kept))
    assert page.tiles["Total time"] == [f"{1000 * seconds:.0f} ms", "80 steps, 4 epochs"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    page = page_of(good_run(tmp_path / "a" / "run"), good_run(tmp_path / "b" / "run", seed=2))
    assert str(tmp_path / "a" / "run") in page.text
    assert str(tmp_path / "b" / "run") in page.text


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = good_run(tmp_path / "run", num_epochs=1)
    with pytest.raises(WriteError, match=r"cannot write .*report\.html"):
        write_report([folder], tmp_path / "nowhere" / "report.html")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "report.html"
    out.write_text("the page before")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(WriteError, match="No space left on device"):
        write_report([folder], out)
    assert out.read_text() == "the page before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


def test_a_report_about_nothing_or_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_report([], tmp_path / "report.html")
    with pytest.raises(DataError, match=r"config\.yaml"):
        write_report([tmp_path], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
