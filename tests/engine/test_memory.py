"""Freed memory stays in the process: counted in page faults, which do not depend on the machine's speed.

The tensors are larger than 32 MB: smaller ones glibc comes to keep by itself.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from windlass.engine.memory import HUGE_PAGES, ask_for_huge_pages

COUNT_FAULTS = """
import resource, sys
from windlass.engine.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    kept = [torch.ones(size) for size in (12 << 20, 10 << 20)]
    while kept:
        kept.pop()
for _ in range(3):
    step()
before = faults()
for _ in range(10):
    step()
print(int(kept), faults() - before)
"""


def faults_of_ten_steps(how: str) -> tuple[bool, int]:
    """Page faults of ten steps after three, each taking two tensors of 88 MB in all and freeing them."""
    environment = {**os.environ, HUGE_PAGES: "0"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS, how], env=environment, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "1", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has mallopt")
def test_freed_tensors_are_not_faulted_in_again() -> None:
    _, without = faults_of_ten_steps("leave")
    kept, with_it = faults_of_ten_steps("keep")
    assert kept
    pages = 10 * (88 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert without > pages / 2  # or the measure sees nothing
    assert with_it < without / 4  # glibc loses some to fragments around aligned blocks


def test_the_user_s_word_on_huge_pages_stands() -> None:
    environment = {HUGE_PAGES: "0"}
    ask_for_huge_pages(environment)
    assert environment == {HUGE_PAGES: "0"}
    environment = {}
    ask_for_huge_pages(environment)
    assert environment == {HUGE_PAGES: "1"}
