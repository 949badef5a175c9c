"""What PyTorch's functions do to numbers, as a forward pass under a recipe must know it."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from windlass.precision.exact import EXACT_FUNCTIONS, FILLING, METADATA, POOLING, READS_NUMBERS, ZEROS

OF_MODULE = {
    "iadd": "add",
    "radd": "add",
    "isub": "sub",
    "rsub": "sub",
    "imul": "mul",
    "rmul": "mul",
    "itruediv": "div",
}
"""Functions that are spelled otherwise where a layer is named after one."""


class Kind(NamedTuple):
    """What a function does to numbers.

    Attributes:
        name: how it is called.
        reads: whether it reads its tensors' numbers.
        is_layer: whether its results are new numbers.
        is_exact: whether its results are numbers among its inputs.
        fills: whether it may put a number there that is in no format.
        zeros: whether its results are zeros.
        writes: whether it writes its first argument.
        pooled: the last so many dimensions of its input are what its indices point into.
    """

    name: str
    reads: bool
    is_layer: bool
    is_exact: bool
    fills: bool
    zeros: bool
    writes: bool
    pooled: int


@cache
def kind_of(func: Any) -> Kind:
    """What a function, as a torch-function mode is given it, does."""
    name = getattr(func, "__name__", "")
    is_attribute = name in ("__get__", "__set__", "__delete__")
    if is_attribute:
        name = getattr(func.__self__, "__name__", "")
    reads = name in READS_NUMBERS if is_attribute else name not in METADATA
    is_exact, zeros = name in EXACT_FUNCTIONS, name in ZEROS
    kind = name.strip("_")
    return Kind(
        name=OF_MODULE.get(kind, kind),
        reads=reads,
        is_layer=reads and not is_attribute and not is_exact and not zeros,
        is_exact=is_exact,
        fills=name in FILLING,
        zeros=zeros,
        writes=_writes(name) if not is_attribute else (func.__name__, name) == ("__set__", "data"),
        pooled=POOLING.get(name, 0),
    )


def _writes(name: str) -> bool:
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    return name.endswith("_") and name not in METADATA
