"""``windlass inspect --precision``: memories under a recipe beside those in float32."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from windlass.cli import main

MEMORIES = ("D", "W", "∇D", "∇W")


def test_the_table_says_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "lenet5", "--batch", "64", "--precision", "fixed16"]) == 0
    out = capsys.readouterr().out
    assert "fixed16" in out.splitlines()[0]
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") == 7}
    assert set(rows) == {"float32", "fixed16", "of float32"}
    assert rows["of float32"].count("50.0%") == 3  # its connection table is a buffer, in float32
    assert "predicted peak of a step" in out
    for note in ("∇D: errors in their format", "plain SGD"):
        assert note in out


def test_json_has_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "resnet18", "--batch", "2", "--image-size", "32", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["number_format"] == "float32" and "float32" not in plain
    arguments = ["inspect", "resnet18", "--batch", "2", "--image-size", "32", "--json", "--precision"]
    assert main([*arguments, "fixed16,late=0.9:+4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["number_format"] == "fixed16,late=0.9:+4"
    assert found["float32"] == {key: plain[key] for key in ("peak_bytes", "peak_at")} | {
        "memories": plain["totals"]["memories"]
    }
    for name in ("∇D", "∇W"):
        assert 2 * found["totals"]["memories"][name] == found["float32"]["memories"][name]
    assert found["with_late_formats"]["memories"]["W"] > found["totals"]["memories"]["W"]
    assert main([*arguments, "float32"]) == 0
    assert json.loads(capsys.readouterr().out) == plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "nonsense"), "unknown recipe 'nonsense'"),
        (("--precision", "fixed61"), "did you mean 'fixed16'?"),
        (("--precision", "fixed16,weights=<20,20>"), "WL of a fixed-point format is 1 to 24, got 40"),
        (("--precision", "fixed16,c11.weights=<4,12>"), "unknown layer 'c11'; did you mean 'c1'"),
        (("--precision", "fixed16,wieghts=<4,12>"), "did you mean 'weights'"),
        (("--precision", "fixed16", "--parallel", "data"), "--precision: is there for one worker alone"),
    ],
)
def test_what_cannot_be_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["inspect", "lenet5", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and message in captured.err


def test_a_recipe_is_refused_before_pytorch_is_there() -> None:
    code = (
        "import sys; from windlass.cli import main; code = main(['inspect', 'lenet5', '--precision', 'x']);"
        " assert code == 2 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
