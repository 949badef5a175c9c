"""Whether the gradient that autograd hands to a hook is nobody else's, so that it may be written in place.

Autograd's own sums of gradients ask the same: one reference to the tensor, one to its storage.  A hook in Python sees
more, the same number every time: they are counted, when this is imported, for a gradient that nobody else can have.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_Counts = tuple[int, int, int]


def is_alone(gradient: Tensor) -> bool:
    """Whether nobody has this gradient but the caller, a hook of a tensor that calls this itself.

    False where that cannot be told.
    """
    return _ALONE is not None and type(gradient) is Tensor and _counts(gradient) == _ALONE


def _counts(gradient: Tensor) -> _Counts:
    """References to the object, to the tensor and to its storage."""
    storage: Any = gradient.untyped_storage()
    count: Any = torch._C._storage_Use_Count
    return sys.getrefcount(gradient), gradient._use_count(), count(storage._cdata)  # type: ignore[attr-defined]


class _Probe:
    """Stands where a hook stands that asks."""

    def __init__(self) -> None:
        self.found: _Counts | None = None

    def hook(self, gradient: Tensor) -> None:
        """Counts as `is_alone` does."""
        self._ask(gradient)

    def _ask(self, gradient: Tensor) -> None:
        self.found = _counts(gradient)


def _measured() -> _Counts | None:
    """The counts of a gradient that nobody else has; None: they cannot be told."""
    if not (hasattr(torch._C, "_storage_Use_Count") and hasattr(Tensor, "_use_count")):
        return None
    probe = _Probe()
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(2, requires_grad=True, device="cpu") * 1
        x.register_hook(probe.hook)  # type: ignore[no-untyped-call]
        (x * 2 * x).sum().backward()  # type: ignore[no-untyped-call]
    return probe.found


_ALONE = _measured()
