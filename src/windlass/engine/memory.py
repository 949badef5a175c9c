"""Keeps freed memory in the process, so that large tensors are not faulted in anew in every step.

A training step frees and takes the same tensors again and again.  The C library gives blocks of megabytes back
to the system and asks for them anew; each page is then zeroed and mapped at its first touch, which costs more
than many a layer.  Two settings of the process change that:

* glibc's thresholds (mallopt): freed blocks stay on the heap, whatever their size;
* huge pages: PyTorch's allocator asks for pages of 2 MB where the system allows it (the variable
  THP_MEM_ALLOC_ENABLE, read at the process's first tensor): a five-hundredth of the faults.

The price: the process keeps its peak of memory until it ends.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import MutableMapping

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEEP_BYTES = 2**31 - 1
MAP_BYTES = 1 << 30
"""Blocks from this size on are still mapped and given back: mallopt takes no larger number."""

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def keep_freed_memory() -> bool:
    """Tells the C library to keep freed blocks; whether it could.

    Only glibc has the settings; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MAP_BYTES) and mallopt(M_TRIM_THRESHOLD, KEEP_BYTES))


def ask_for_huge_pages(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has PyTorch ask for huge pages, unless the user has said something; before the first tensor is made."""
    environment.setdefault(HUGE_PAGES, "1")
