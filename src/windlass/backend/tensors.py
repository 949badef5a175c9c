"""Tensors of any layout as flat memory and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from windlass.errors import ConfigError


def check_dense(tensors: Iterable[torch.Tensor]) -> None:
    """Refuses what is not ordinary host memory."""
    for tensor in tensors:
        if tensor.layout is not torch.strided:
            raise ConfigError(
                f'the backend "windlass" exchanges dense tensors, got layout {tensor.layout}; call to_dense() first'
            )
        if tensor.device.type != "cpu":
            raise ConfigError(
                f'the backend "windlass" exchanges CPU tensors, got one on {tensor.device}: for CUDA tensors '
                'start a group with the backend "nccl"'
            )


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in order, as the tensor's own memory where that is possible, else as a copy."""
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.contiguous().view(-1)


def put_back(tensor: torch.Tensor, elements: torch.Tensor) -> None:
    """Stores what was exchanged in the copy that `flat` had to make."""
    if elements.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(elements.view(tensor.shape))


def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The elements of several tensors, one after the other, in memory of their own."""
    return torch.cat([flat(tensor) for tensor in tensors])


def split(elements: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
    """Stores consecutive elements in the outputs."""
    for output, part in zip(outputs, torch.split(elements, sizes(outputs)), strict=True):
        output.detach().copy_(part.view(output.shape))


def sizes(tensors: Iterable[torch.Tensor]) -> list[int]:
    """How many elements each has."""
    return [tensor.numel() for tensor in tensors]


def same_dtype(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all have one dtype."""
    return len({tensor.dtype for tensor in tensors}) == 1


def row_counts(tensor: torch.Tensor, splits: Sequence[int], parts: int, *, what: str) -> list[int]:
    """Elements of each part of a tensor that is cut along its first dimension, evenly without `splits`."""
    rows = tensor.size(0) if tensor.dim() else 1
    row = tensor.numel() // rows if rows else 0
    if not splits:
        if rows % parts:
            raise ConfigError(f"all_to_all_single: the {what} has {rows} rows, which {parts} ranks cannot share evenly")
        return [rows // parts * row] * parts
    if len(splits) != parts or sum(splits) != rows:
        raise ConfigError(f"all_to_all_single: the {what} needs {parts} splits of {rows} rows in all, got {splits}")
    return [split * row for split in splits]
