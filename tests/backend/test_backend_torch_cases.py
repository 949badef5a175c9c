"""A selection of PyTorch's own cases for process groups; docs/backend.md has the counts of all."""

import json

import pytest
from ranks_of_mpi import must_run

pytestmark = pytest.mark.mpi


def test_pytorchs_own_cases_pass() -> None:
    pytest.importorskip("expecttest")
    lines = [json.loads(line) for line in must_run("torch_cases", 2).splitlines() if line.startswith("{")]
    assert [line for line in lines[:-1] if line["outcome"] != "ok"] == []
    assert lines[-1] == {"ok": len(lines) - 1, "skip": 0, "fail": 0}
    assert len(lines) > 15
