"""How kernels are compiled: the one place for Numba's flags, the cache of compiled code, and the host's registers.

Compiled code is kept on disk and loaded by the next process.  Numba stamps it with the time of the file in
which a function stands; kernels here are assembled from several files, so they are stamped with a digest of all
of them: a change in any makes all stale.

Nothing is contracted or reordered by the compiler (no fastmath): what is fused is written as fused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding
import numba

_config: Any = numba.config

DISABLED = bool(_config.DISABLE_JIT)
"""Whether kernels run as plain Python (NUMBA_DISABLE_JIT=1), with every intrinsic as its NumPy twin."""

LANES = 16
"""Numbers in a block of channels: one AVX-512 register, two of AVX2, four of NEON or SSE."""

Function = TypeVar("Function", bound=Callable[..., Any])


@cache
def stamp(folder: Path) -> str:
    """Digest of everything that the compiled kernels of this folder are made of.

    That is its files, those of the folders above it down from this file's, and what these import of `windlass.plan`.
    """
    here = Path(__file__).parent
    folders = [here, *(inner for inner in (folder, *folder.parents) if here in inner.parents)]
    files = {path for some in folders for path in some.glob("*.py")}
    waiting = list(files)
    while waiting:
        named = re.findall(r"^\s*from windlass\.plan\.(\w+) import", waiting.pop().read_text(), flags=re.MULTILINE)
        plans = {here.parent / "plan" / f"{name}.py" for name in named} - files
        files |= plans
        waiting += plans
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def kernel(function: Function, *, key: tuple[int, ...] = ()) -> Function:
    """Compiles `function` without the interpreter lock and keeps the code on disk.

    Errors that Python would raise (a division by zero) do not exist inside: wrappers check arguments.

    Args:
        function: the kernel.
        key: the constants of which a function made by another function is made.  They become part of its name:
            by their names alone are functions from the cache told apart when they are linked.
    """
    if DISABLED:
        return function
    suffix = "".join(f"_{part}" for part in key)
    function.__name__ += suffix
    function.__qualname__ += suffix
    compiled: Any = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)(function)
    # Numba has no public way to say on what cached code depends, and would not know a closure over kernels again
    # in another process.  Where these attributes are gone, its own ways remain: right, but compiled more often.
    kept: Any = getattr(compiled, "_cache", None)
    files: Any = getattr(kept, "_cache_file", None)
    if all(hasattr(files, name) for name in ("_source_stamp", "_index_path", "_data_name_pattern")):
        files._source_stamp = stamp(Path(function.__code__.co_filename).parent)
        # Files of their own for every stamp: an old index may name classes that are gone, and not even load.
        files._index_path = files._index_path.removesuffix(".nbi") + f".{files._source_stamp[:12]}.nbi"
        files._data_name_pattern = f"{files._source_stamp[:12]}." + files._data_name_pattern
        kept._index_key = lambda signature, codegen: (signature, codegen.magic_tuple(), key)
    return compiled  # type: ignore[no-any-return]


def _features() -> frozenset[str]:
    """Features of the processor that Numba compiles for."""
    if _config.CPU_FEATURES:
        given = _config.CPU_FEATURES.split(",")
        return frozenset(name[1:] for name in given if name.startswith("+"))
    if _config.CPU_NAME in (None, "host"):
        return frozenset(name for name, has in llvmlite.binding.get_host_cpu_features().items() if has)
    known = {"avx512": ("x86-64-v4", "avx512", "znver4", "znver5"), "avx2": ("x86-64-v3", "haswell", "znver")}
    name = _config.CPU_NAME
    if any(part in name for part in known["avx512"]):
        return frozenset({"avx512f", "avx2", "fma"})
    return frozenset({"avx2", "fma"}) if any(part in name for part in known["avx2"]) else frozenset()


FEATURES = _features()


def _tile() -> tuple[int, int]:
    """Rows, and blocks of `LANES` columns, of the accumulators that fit the host's registers."""
    if "avx512f" in FEATURES:
        return 14, 2  # 28 of 32 registers; two hold B, A is broadcast from memory
    if "avx2" in FEATURES or "neon" in FEATURES:
        return 6, 1  # 12 of 16 registers, or 24 of 32
    return 2, 1  # 8 of 16 registers of four


TILE_ROWS, TILE_BLOCKS = _tile()
TILE_COLUMNS = TILE_BLOCKS * LANES
