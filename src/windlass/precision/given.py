"""What a layer is given: tensors, and which of them it writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from windlass.precision.kept import version_of


class Given:
    """What a layer was given.

    Attributes:
        tensors: which it did not write.
        written: which it did.
    """

    __slots__ = ("_versions", "tensors", "written")

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.written: list[Tensor] = []
        self._versions = [version_of(x) for x in tensors]

    def see_writes(self) -> None:
        """Tells apart what was written; of an inference tensor nobody knows."""
        kept = []
        for x, version in zip(self.tensors, self._versions, strict=True):
            if version_of(x) != version:
                self.written.append(x)
            elif not x.is_inference():
                kept.append(x)
        self.tensors = kept

    def shares(self, output: Tensor) -> bool:
        """Whether writing into the output would write into an input."""
        storage = output.untyped_storage()._cdata
        return any(x.untyped_storage()._cdata == storage for x in self.tensors)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values, and in the lists, tuples and mappings among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
        elif isinstance(value, dict):
            found += tensors_in(value.values())
    return found
