"""Bytes of tensors alive, followed through a simulated step.

`LiveBytes` is told of every tensor that an operation returns; it learns of the end of its storage from a weak
reference.  Run under fake tensors, whose storages are as large as real ones would be and hold nothing, it
gives the running total that the real allocator would see.

What an operation takes and gives back before it returns is invisible there.  Of that only oneDNN's
convolutions matter on a CPU (their blocked copies are as large as the maps themselves); `passing_bytes`
models them.  Left out: scratch space of a few kilobytes, the interpreter and the libraries.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

CHANNEL_BLOCK = 16
"""Channels of oneDNN's blocked layouts with AVX-512 (8 with AVX2), to which it rounds channels up."""


class LiveBytes:
    """A running total of bytes in storages alive, its peak, and what was going on at the peak."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self.peak_at = ""
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, tensor: Tensor, *, during: str) -> None:
        """Count the storage of `tensor` until it dies, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages:
            return
        num_bytes = storage.nbytes()

        def forget(_: object) -> None:
            del self._storages[key]
            self.now -= num_bytes

        self._storages[key] = weakref.ref(storage, forget)
        self.now += num_bytes
        self.touch(self.now, during=during)

    def touch(self, num_bytes: int, *, during: str) -> None:
        """Say that for a moment `num_bytes` were alive in all."""
        if num_bytes > self.peak:
            self.peak = num_bytes
            self.peak_at = during


def passing_bytes(operation: str, args: Sequence[object], out: object) -> int:
    """Most bytes beyond those alive before that an operation on the CPU holds at once while it runs.

    Zero means: nothing but its results.  oneDNN convolves blocked copies (maps and weights with channels in
    blocks); inputs of few channels and maps in channels_last are read as they are.  In order of events, read
    off the allocator with PyTorch 2.13, primes being blocked copies:

    * forward: x', w', y' together; then x' and w' go and y comes beside y';
    * gradient of the input: gy', w', gx' together; then gx beside gx', where there are strides twice;
    * gradient of the weights, gx held meanwhile: gy', x', gw' together; then gw beside gw'.

    With channels_last:

    * forward: y, w' together;
    * gradient of the input: gx, w' together;
    * gradient of the weights, gx held meanwhile: gw' and two of gw.

    What lies in memory otherwise than the convolution works is copied first, for as long as it takes.
    """
    if operation == "convolution":
        x, weight, stride, transposed = args[0], args[1], args[3], args[6]
        y = out
        wanted = (False, False)
    elif operation == "convolution_backward":
        y, x, weight, stride, transposed = args[0], args[1], args[2], args[4], args[7]
        mask = args[10]
        wanted = (bool(mask[0]), bool(mask[1])) if isinstance(mask, list | tuple) else (True, True)
    else:
        return 0
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and isinstance(y, Tensor)):
        return 0
    if transposed or not _by_onednn(x):
        return 0
    forward = operation == "convolution"
    given = (x, weight) if forward else (x, weight, y)
    if _channels_last(x) or _channels_last(weight):
        passing = _passing_channels_last(x, weight, y, wanted=wanted, forward=forward)
        return passing + _copied(given, torch.channels_last)
    passing = _passing_blocked(x, weight, y, stride, wanted=wanted, forward=forward)
    return passing + _copied(given, torch.contiguous_format)


def _passing_blocked(
    x: Tensor, weight: Tensor, y: Tensor, stride: object, *, wanted: tuple[bool, bool], forward: bool
) -> int:
    x_blocked, w_blocked = _map_bytes(x), _filter_bytes(weight)
    y_blocked = _rounded_map(y)
    if forward:
        return max(x_blocked + w_blocked + y_blocked, y_blocked + _bytes(y))
    peak = held = 0
    if wanted[0]:
        held = _bytes(x)
        gx_blocked = _rounded_map(x)
        copies = 2 if isinstance(stride, list | tuple) and max(stride) > 1 else 1
        peak = max(y_blocked + w_blocked + gx_blocked, gx_blocked + copies * held)
    if wanted[1]:
        peak = max(peak, held + y_blocked + x_blocked + w_blocked, held + w_blocked + _bytes(weight))
    return peak


def _passing_channels_last(x: Tensor, weight: Tensor, y: Tensor, *, wanted: tuple[bool, bool], forward: bool) -> int:
    w_blocked = _filter_bytes(weight)
    if forward:
        return _bytes(y) + w_blocked
    held = _bytes(x) if wanted[0] else 0
    return held + w_blocked + (2 * _bytes(weight) if wanted[1] else 0)


def _copied(tensors: Sequence[Tensor], layout: torch.memory_format) -> int:
    return sum(_bytes(x) for x in tensors if x.dim() == 4 and not x.is_contiguous(memory_format=layout))


def _by_onednn(x_NCHW: Tensor) -> bool:
    plain = x_NCHW.device.type == "cpu" and x_NCHW.dtype in (torch.float32, torch.bfloat16)
    return plain and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _channels_last(x: Tensor) -> bool:
    """Whether PyTorch takes these maps or filters for channels_last, by their strides."""
    return x.dim() == 4 and suggest_memory_format(x) == torch.channels_last


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _rounded(channels: int) -> int:
    return math.ceil(channels / CHANNEL_BLOCK) * CHANNEL_BLOCK


def _map_bytes(x_NCHW: Tensor) -> int:
    """Bytes of the blocked copy of maps that are read; those of less than half a block are not copied."""
    return 0 if x_NCHW.shape[1] < CHANNEL_BLOCK // 2 else _rounded_map(x_NCHW)


def _rounded_map(x_NCHW: Tensor) -> int:
    channels = max(1, x_NCHW.shape[1])
    return _bytes(x_NCHW) // channels * _rounded(channels)


def _filter_bytes(w_KCRS: Tensor) -> int:
    filters = max(1, w_KCRS.shape[0])
    return _bytes(w_KCRS) // filters * _rounded(filters)
