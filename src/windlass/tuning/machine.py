"""The machine: its fingerprint, and its peak as measured here."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch

from windlass.tuning.cost import Machine

PEAK_SIDE = 1024
"""Side of the matrices by which the peak is measured; also channels times rows of its 1×1 convolution."""
COPY_FLOATS = 1 << 24
"""Floats that are copied to measure the memory: 64 MiB, more than a cache."""


def fingerprint(*, threads: int) -> dict[str, object]:
    """Everything that measured times depend on, beside the shapes."""
    return {
        "cpu": cpu_name(),
        "flags": _vector_flags(),
        "cores": os.cpu_count() or 1,
        "threads": threads,
        "torch": torch.__version__,
        "numba": version("numba"),
        "kernels": kernels_digest(),
    }


@lru_cache(maxsize=1)
def kernels_digest() -> str:
    """Names the sources of kernels and layers: after a change of theirs, old times say nothing."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("kernels", "layers", "plan"):
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cpu_name() -> str:
    """The processor's name."""
    return _cpu_line("model name") or platform.processor() or platform.machine()


def measure_machine(*, threads: int) -> Machine:
    """Measures peak and bandwidth with `threads` threads: a few hundred milliseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return Machine(peak_flops(threads), _bytes_per_s(), threads)
    finally:
        torch.set_num_threads(before)


def peak_flops(threads: int) -> float:
    """The most float32 operations per second of any dense kernel at hand.

    MKL's matrix product is slow on some processors, oneDNN's convolution on others; the better one counts.
    """
    side = PEAK_SIDE
    a, b = torch.randn(2, side, side, generator=torch.Generator().manual_seed(0))
    image = a.reshape(1, side, 32, side // 32).contiguous(memory_format=torch.channels_last)
    weight = b.reshape(side, side, 1, 1).contiguous(memory_format=torch.channels_last)
    image = image.repeat(4, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    flops = 2.0 * side**3
    return max(
        flops / _best_s(lambda: torch.mm(a, b)),
        4 * flops / _best_s(lambda: torch.nn.functional.conv2d(image, weight)),
        _kernel_peak(threads),
    )


def _kernel_peak(threads: int) -> float:
    """What Windlass's own kernels reach."""
    from windlass.kernels.peak import measured_peak

    return float(measured_peak(threads))


def _bytes_per_s() -> float:
    source, target = torch.ones(COPY_FLOATS), torch.empty(COPY_FLOATS)
    return 2.0 * source.nbytes / _best_s(lambda: target.copy_(source))


def _best_s(action: Callable[[], object]) -> float:
    """The shortest of several runs: a peak is what the machine can, not what its load leaves."""
    action()
    best = float("inf")
    for _ in range(7):
        started = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - started)
    return best


def _cpu_line(name: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _vector_flags() -> list[str]:
    """Vector extensions: one name of a virtual processor may stand for several machines."""
    return [flag for flag in _cpu_line("flags").split() if flag.startswith(("avx", "amx", "fma"))]
