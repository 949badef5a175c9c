"""A network that learns without labels, trained and reported."""

import json
from pathlib import Path
from typing import Any

import pytest

import windlass
from windlass.errors import ConfigError


def train(out: Path, **options: Any) -> windlass.Result:
    return windlass.train(
        "coates", data="patches:digits:10x10", epochs=2, out=str(out), progress=False,
        network_args={"maps": 4, "layers": 2, "field": 5}, **options,
    )  # fmt: skip


def test_the_loss_falls_and_no_accuracy_is_told(tmp_path: Path) -> None:
    result = train(tmp_path / "run")
    losses = [row["test_loss"] for row in result.trace]
    assert losses[1] < losses[0] < result.trace[0]["train_loss"]
    assert all(row["train_accuracy"] is None and row["test_accuracy"] is None for row in result.trace)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["accuracy"] for row in rows if row["kind"] == "step"} == {None}
    assert any(row["kind"] == "checkpoint" and row["best"] for row in rows)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "test accuracy" not in page.lower()
    assert "test loss" in page.lower()


@pytest.mark.mpi
def test_two_workers_descend_as_one(tmp_path: Path) -> None:
    """Sums in another order: relative differences of single precision, grown over 46 steps of Adam."""
    one, two = (train(tmp_path / f"run{n}", workers=n) for n in (1, 2))
    for a, b in zip(one.trace, two.trace, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-4)


def test_accuracy_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.monitor: test_accuracy means nothing for network coates"):
        train(tmp_path / "run", checkpoint={"monitor": "test_accuracy"})
    assert not (tmp_path / "run").exists()
