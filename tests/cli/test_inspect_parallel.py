"""``windlass inspect --parallel``: tables, numbers as JSON, pictures and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from windlass.cli import main
from windlass.cli.inspect_parallel import both, divided
from windlass.errors import ConfigError
from windlass.parallel.limits import check_memory
from windlass.plan.mesh import Mesh

SMALL = ["--image-size", "67", "--classes", "10"]


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["inspect", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_tables_of_a_hybrid_alexnet_on_eight_workers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "alexnet", "--parallel", "hybrid", "--workers", "8"]) == 0
    out = capsys.readouterr().out
    assert "worker 0 of 8" in out and "1024×3×224×224" in out
    line = next(line for line in out.splitlines() if "classifier.2 " in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[:4] == ["classifier.2", "linear", "outputs", "1024×512"]
    assert cells[4:] == ["36.0 MiB", "18.0 MiB", "2.00 MiB", "18.0 MiB", "31.5 MiB", "31.5 MiB", ""]
    assert "classifier.2: → gather batch over hybrid   ← sum over hybrid, each its batch" in out
    assert out.count("classifier.2 backward") == 8


def test_what_workers_hold_and_send_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    data, model = (
        inspected(capsys, "alexnet", *SMALL, "--parallel", name, "--workers", "2", "--batch", "8")
        for name in ("data", "model")
    )
    for found in (data, model):
        assert [worker["coordinates"] for worker in found["workers"]] == [[0], [1]]
        for way in ("forward_sent", "backward_received", "gradient_sent"):
            assert sum(row["bytes"][way] for row in found["layers"]) == found["workers"][0]["bytes"][way]
        for memory in ("D", "W", "∇D", "∇W"):
            total = sum(row["memories"][memory] for row in found["layers"])
            assert total == found["workers"][0]["memories"][memory], memory
    weights = [found["workers"][0]["memories"]["W"] for found in (data, model)]
    assert weights[1] == weights[0] / 2
    # On two workers each sends one half of the gradients, and hands the sum of the other half to the other.
    assert data["workers"][0]["bytes"]["gradient_sent"] == data["workers"][0]["memories"]["∇W"]
    assert model["workers"][0]["bytes"]["gradient_sent"] == 0 < model["workers"][0]["bytes"]["forward_sent"]
    # Flat gradients, where others' come too a second time, and momentum; the step's own gradients go into them.
    for found, copies in ((data, 3), (model, 2)):
        worker = found["workers"][0]
        gradients = worker["memories"]["∇W"]
        least = worker["peak_bytes"] + (copies - 1) * gradients
        assert least <= worker["training_bytes"] < least + gradients


def test_the_last_worker_holds_the_smaller_part(capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(
        capsys,
        "lenet5",
        "--parallel",
        "hybrid:c",
        "--workers",
        "3",
        "--batch",
        "7",
        "--rank",
        "2",
        "--image-size",
        "32",
    )
    rows = {row["name"]: row for row in found["layers"]}
    assert found["rank"] == 2 and rows["c1"]["local_shape"][0] == 2
    assert rows["labels"]["bytes"]["forward_received"] == 8 * 5
    assert found["placement"]["handover"]["scheme"] == "c"


def test_a_mesh_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["alexnet", *SMALL, "--batch", "8"]
    named = inspected(capsys, *options, "--parallel", "hybrid", "--mesh", "node:2,device:2")
    path = tmp_path / "p.yaml"
    path.write_text("mesh: node:2,device:2\nlayers:\n  'features.*': [batch, batch]\n  'classifier.*': [batch, out]\n")
    read = inspected(capsys, *options, "--parallel", str(path))
    assert [worker["coordinates"] for worker in named["workers"]] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert read["workers"] == named["workers"] and read["layers"] == named["layers"]


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.svg"
    arguments = ["inspect", "lenet5", "--parallel", "hybrid:b", "--workers", "2", "--plot", str(path)]
    assert main(arguments) == 0
    assert f"drawn: {path}" in capsys.readouterr().out
    assert "scheme b" in path.read_text()


def test_what_does_not_fit_a_worker_is_refused_with_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["inspect", "alexnet", *SMALL, "--batch", "8", "--workers", "2", "--memory-limit", "250MiB"]
    assert main([*options, "--parallel", "data"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("windlass: placement data does not fit 250.0 MiB a worker: worker 0 needs ")
    assert message.count(" MiB") == 3
    assert main([*options, "--parallel", "model"]) == 0


def test_of_many_workers_those_that_need_most_are_named() -> None:
    check_memory([5, 7], 7, placement="data")
    with pytest.raises(ConfigError, match=r"7 B a worker: worker 3 needs 13 B, worker 2 12 B, .*worker 7 8 B, 4 more$"):
        check_memory([10, 11, 12, 13, 9, 8, 9, 8, 1, 1, 1, 1], 7, placement="data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "2"], "--workers: says something about a placement, which --parallel names"),
        (["--memory-limit", "1GiB"], "--memory-limit: says something about a placement"),
        (["--parallel", "dada"], "unknown placement 'dada'; did you mean 'data'?"),
        (["--parallel", "data", "--workers", "-1"], "--workers: needs a number of at least 1, got -1"),
        (["--parallel", "data", "--rank", "2"], "--rank: there are workers 0 to 1, got 2"),
        (["--parallel", "data", "--update", "adm"], "--update: unknown update rule 'adm'"),
        (["--parallel", "data", "--mesh", "node"], "a mesh is written as node:2,device:4, got 'node'"),
        (["--parallel", "data", "--mesh", "node:2,device:2", "--workers", "2"], "has 4 workers"),
        (["--parallel", "data", "--batch", "1"], "batch"),
        (["--parallel", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--parallel", "data", "--memory-limit", "much"], "a size is written like"),
        (["--parallel", "data", "--plot", "p.doc"], "--plot p.doc: needs a name that ends in"),
    ],
)
def test_refusals_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "lenet5", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("windlass: ") and error.count("\n") == 1


def test_a_file_that_is_no_placement_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.yaml"
    for text, message in (
        ("a: [", "is not YAML"),
        ("[1]", "needs a mapping"),
        ("mesh: a:2\nlayers: {c1: [aut]}", "aut"),
    ):
        path.write_text(text)
        assert main(["inspect", "lenet5", "--parallel", str(path)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error and message in error


def test_words() -> None:
    mesh = Mesh.parse("node:2,device:2")
    assert divided(("replicate", "replicate"), mesh) == "nothing" and divided((), mesh) == ""
    assert divided(("replicate", "rows"), mesh) == "rows over device"
    assert both(0, 1024) == "0 B ↑ 1.00 KiB ↓"
