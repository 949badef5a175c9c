"""Activations that wait for the backward pass, in 16 bits.

What autograd saves is packed by storage, once, whoever saves it: the input of a convolution and the result of the
ReLU before it are one tensor and one copy.  A tensor whose numbers are all of one format (`Known`) is packed exactly;
what a layer keeps of its insides is packed as float16 (bfloat16 where activations are bfloat16), to nearest.  Packing
waits until the layer is done: an output that the layer saves itself, as tanh does, is saved as it was rounded.  Indices
of pooling become 16 or 32 bits of the 64.  Weights are not packed: their codes are there anyway.  Left as they are:
the network's input, its buffers, which are held elsewhere, and tensors of one dimension (a channel's statistics).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from windlass.plan.number import BFLOAT16, FLOAT16, FLOAT32, NumberFormat
from windlass.precision.quantize import DTYPES
from windlass.precision.rounder import Rounder, widen
from windlass.precision.stored import Stored

SMALL_PLANE = 1 << 16
"""Pixels that indices of 16 bits can tell apart."""
LEAST = 64
"""A smaller tensor is left as it is."""


class Packed:
    """A storage of float32 numbers in 16 bits.

    Attributes:
        codes: its numbers; None: not yet, or they have changed since they were saved.
        number: their format.
    """

    __slots__ = ("__weakref__", "codes", "number")

    def __init__(self) -> None:
        self.codes: Tensor | None = None
        self.number: NumberFormat = FLOAT32

    def wide(self, shape: torch.Size) -> Tensor:
        """The storage again, in float32 and this shape."""
        codes = self.codes
        if codes is None:
            raise RuntimeError("a tensor that the backward pass needs was changed in place after it was saved")
        return widen(codes if codes.shape == shape else codes.view(shape), self.number, torch.empty(shape))

    def line(self) -> Tensor:
        """The storage again, as one line."""
        return self.wide(torch.Size(() if self.codes is None else (self.codes.numel(),)))


class View(NamedTuple):
    """A tensor that lies in a packed storage."""

    of: Packed
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def wide(self) -> Tensor:
        """The tensor again."""
        return self.of.line().as_strided(self.shape, self.stride, self.offset)


class Line(NamedTuple):
    """A contiguous tensor that is a packed storage."""

    of: Packed
    shape: torch.Size

    def wide(self) -> Tensor:
        """The tensor again."""
        return self.of.wide(self.shape)


class WeightView(NamedTuple):
    """A tensor that lies in a weight's numbers."""

    of: Stored
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    version: int

    def wide(self) -> Tensor:
        """The tensor again."""
        if self.of.version != self.version:
            raise RuntimeError(f"{self.of.name} was changed between the forward and the backward pass")
        return self.of.wide().as_strided(self.shape, self.stride, self.offset)


class Indices(NamedTuple):
    """Indices of pooling, in fewer bits."""

    codes: Tensor


class Known(weakref.ref[torch.UntypedStorage]):
    """What is known of a storage, to which it is a weak reference.

    Attributes:
        number: the format of all its numbers; None: any.
        version: of the tensor when that was so.
        stays: whether it is held elsewhere, and not packed.
        weight: the parameter whose widened numbers these are.
        packed: the copy, as long as somebody has it.
        key: of the storage among all.
    """

    __slots__ = ("key", "number", "packed", "stays", "version", "weight")
    number: NumberFormat | None
    version: int
    stays: bool
    weight: Stored | None
    packed: Callable[[], Packed | None]
    key: int


class Kept:
    """Saved-tensors hooks of one network's forward pass.

    Args:
        activations: their format; where it is float32, weights alone are packed.

    Attributes:
        inside: the format of what has none of its own.
        plane: pixels of the maps that are being pooled; 0: nothing is.
        on_keep: is told of every tensor that is saved, weights apart, and what is kept of it.
    """

    def __init__(self, activations: NumberFormat) -> None:
        self.inside = BFLOAT16 if activations == BFLOAT16 else FLOAT16
        self.plane = 0
        self.on_keep: Callable[[Tensor, Tensor], None] | None = None
        self._packs = activations != FLOAT32
        self._known: dict[int, Known] = {}
        self._waiting: list[tuple[Tensor, int, Packed]] = []

    def know(
        self, x: Tensor, number: NumberFormat | None = None, *, stays: bool = False, weight: Stored | None = None
    ) -> None:
        """From now on something is known of the storage of `x`."""
        storage, version = x.untyped_storage(), version_of(x)
        key = storage._cdata
        before = self._known.get(key)
        if before is not None and before.version == version and before.weight is weight:
            before.number, before.stays = number, stays
            return
        known = self._known[key] = Known(storage, self._forget)
        known.key, known.number, known.version, known.stays = key, number, version, stays
        known.weight, known.packed = weight, _nothing

    def _forget(self, known: weakref.ref[torch.UntypedStorage]) -> None:
        """A storage is no more."""
        assert isinstance(known, Known)
        if self._known.get(known.key) is known:
            del self._known[known.key]

    def number_of(self, x: Tensor) -> NumberFormat | None:
        """The format of all numbers of the storage of `x`, if that is known."""
        known = self._known.get(x.untyped_storage()._cdata)
        return known.number if known is not None and known.version == version_of(x) else None

    def pack(self, x: Tensor) -> Any:
        """What autograd keeps instead of a tensor."""
        if x.dtype == torch.int64 and self.plane and self._packs:
            return self._indices(x)
        if x.dtype != torch.float32 or x.layout != torch.strided:
            return self._as_it_is(x)
        storage = x.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is not None and known.weight is not None:
            of = known.weight
            return WeightView(of, x.shape, x.stride(), int(x.storage_offset()), of.version)
        if not self._packs or (known is not None and known.stays) or x.dim() < 2 or x.numel() < LEAST:
            return self._as_it_is(x)
        packed = self._packed(x, known)
        if x.is_contiguous() and storage.nbytes() == 4 * x.numel():
            return Line(packed, x.shape)
        return View(packed, x.shape, x.stride(), int(x.storage_offset()))

    def unpack(self, kept: Any) -> Tensor:
        """The tensor again."""
        if isinstance(kept, Tensor):
            return kept
        if isinstance(kept, Indices):
            indices = kept.codes.to(torch.int64)
            return indices.bitwise_and_(SMALL_PLANE - 1) if kept.codes.dtype == torch.int16 else indices
        wide: Tensor = kept.wide()
        return wide

    def settle(self) -> None:
        """A layer is done: what it has saved is packed."""
        waiting = self._waiting
        if not waiting:
            return
        self._waiting = []
        for x, version, packed in waiting:
            if version == version_of(x):
                self._fill(x, packed)

    def _as_it_is(self, x: Tensor) -> Tensor:
        if self.on_keep is not None:
            self.on_keep(x, x)
        return x

    def _packed(self, x: Tensor, known: Known | None) -> Packed:
        """What holds the storage of `x` from the end of the layer on."""
        if known is None or known.version != version_of(x):
            self.know(x)
            known = self._known[x.untyped_storage()._cdata]
        found = known.packed()
        if found is None:
            found = Packed()
            known.packed = weakref.ref(found)
            self._waiting.append((x, known.version, found))
        return found

    def _fill(self, x: Tensor, packed: Packed) -> None:
        number = self.number_of(x)
        packed.number = self.inside if number is None or number == FLOAT32 else number
        size = x.untyped_storage().nbytes() // 4
        line = x if x.is_contiguous() and size == x.numel() else x.detach().as_strided((size,), (1,), 0)
        rounds = _packer(packed.number)
        packed.codes = torch.empty(line.shape, dtype=rounds.dtype)
        rounds(line, packed.codes, (0, 0, 0, 0))
        if self.on_keep is not None:
            self.on_keep(x, packed.codes)

    def _indices(self, x: Tensor) -> Indices:
        dtype = torch.int16 if 0 < self.plane <= SMALL_PLANE else torch.int32
        codes = x.detach().to(dtype)
        if self.on_keep is not None:
            self.on_keep(x, codes)
        return Indices(codes)


@cache
def _packer(number: NumberFormat) -> Rounder:
    """What packs numbers of this format."""
    return Rounder(number, "nearest", DTYPES[number.storage], counted=False)


def _nothing() -> None:
    """Stands for a copy that nobody has."""


def version_of(x: Tensor) -> int:
    """How often autograd has seen the tensor written."""
    try:
        return x._version
    except RuntimeError:  # an inference tensor has none
        return 0
