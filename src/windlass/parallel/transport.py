"""How workers on a mesh hand tensors to each other: one exchange among the members of an axis.

Every movement of a placement is an exchange: each member of a group (the workers that differ along one axis of the
mesh alone) has a tensor for each member, and gets one from each.  A worker's own tensor stays where it is; the
others go through one flat buffer each way, so that any backend of ``torch.distributed`` serves that has
``all_to_all_single``: windlass, gloo, nccl.

What is handed over is counted in bytes by tag and phase, from the sizes of the buffers themselves.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed
from torch import Tensor

from windlass.errors import ConfigError
from windlass.plan.layout import reduce_pieces
from windlass.plan.mesh import Mesh

dist: Any = torch.distributed  # its annotations allow None everywhere

Shape: TypeAlias = tuple[int, ...]
Tag: TypeAlias = tuple[str, str]
"""What a message is counted for: an op's name, and ``forward``, ``backward``, ``gradient`` or ``state``."""

UNTAGGED: Tag = ("", "")


@dataclass(slots=True)
class Traffic:
    """Bytes that one worker has handed over and got."""

    sent: int = 0
    received: int = 0


class Exchange:
    """An exchange under way."""

    def __init__(self, transport: BufferTransport, work: Any, pieces: list[Tensor], sent: Tensor) -> None:
        self._transport, self._work, self._pieces = transport, work, pieces
        self._sent: Tensor | None = sent  # the backend reads it until the end

    def wait(self) -> list[Tensor]:
        """What each member sent, in the group's order; the worker's own entry is what it gave."""
        if self._work is not None:
            begin = time.perf_counter()
            self._work.wait()
            self._transport.waited_s += time.perf_counter() - begin
        self._work = self._sent = None
        return self._pieces


class Transport(Protocol):
    """Exchanges of one worker.

    Attributes:
        mesh, rank: where it stands.
        counters: bytes by tag.
    """

    mesh: Mesh
    rank: int
    counters: dict[Tag, Traffic]

    @property
    def counted(self) -> dict[Tag, tuple[int, int]]:
        """Bytes sent and received, by tag."""
        ...

    def start_exchange(
        self, axis: int, send: Sequence[Tensor], shapes: Sequence[Shape], *, tag: Tag | None = None
    ) -> Exchange:
        """Begin to send ``send[m]`` to member m of the axis and to receive a tensor of ``shapes[m]`` from it."""
        ...

    def exchange(
        self, axis: int, send: Sequence[Tensor], shapes: Sequence[Shape], *, tag: Tag | None = None
    ) -> list[Tensor]:
        """The same, waited for."""
        ...

    def counting(self, name: str, phase: str) -> contextlib.AbstractContextManager[None]:
        """What is exchanged within and names no tag is counted under this one."""
        ...


class BufferTransport:
    """The buffers and the counting, for transports that differ in how a buffer gets to the others.

    Attributes:
        waited_s: seconds spent in `Exchange.wait`, since `reset`.
    """

    def __init__(self, mesh: Mesh, rank: int) -> None:
        self.mesh, self.rank = mesh, rank
        self.counters: dict[Tag, Traffic] = {}
        self.waited_s = 0.0
        self.places = mesh.coordinates(rank)
        self._tag = UNTAGGED

    @property
    def counted(self) -> dict[Tag, tuple[int, int]]:
        """Bytes sent and received, by tag."""
        return {tag: (traffic.sent, traffic.received) for tag, traffic in self.counters.items()}

    def reset(self) -> None:
        """Count from zero."""
        self.counters.clear()
        self.waited_s = 0.0

    @contextlib.contextmanager
    def counting(self, name: str, phase: str) -> Iterator[None]:
        """See `Transport`."""
        before, self._tag = self._tag, (name, phase)
        try:
            yield
        finally:
            self._tag = before

    def start_exchange(
        self, axis: int, send: Sequence[Tensor], shapes: Sequence[Shape], *, tag: Tag | None = None
    ) -> Exchange:
        """See `Transport`."""
        place = self.places[axis]
        own = send[place]
        if self.mesh.extent(axis) == 1:
            return Exchange(self, None, [own], own)
        outgoing = [0 if member == place else piece.numel() for member, piece in enumerate(send)]
        incoming = [0 if member == place else _numel(shape) for member, shape in enumerate(shapes)]
        parts = [piece.reshape(-1) for member, piece in enumerate(send) if outgoing[member]]
        sent = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts) if parts else own.new_empty(0)
        received = own.new_empty(sum(incoming))
        self._count(self._tag if tag is None else tag, sent, received)
        work = self._post(axis, received, sent, incoming, outgoing)
        pieces = [
            own if member == place else flat.view(shape)
            for member, (flat, shape) in enumerate(zip(torch.split(received, incoming), shapes, strict=True))
        ]
        return Exchange(self, work, pieces, sent)

    def exchange(
        self, axis: int, send: Sequence[Tensor], shapes: Sequence[Shape], *, tag: Tag | None = None
    ) -> list[Tensor]:
        """See `Transport`."""
        return self.start_exchange(axis, send, shapes, tag=tag).wait()

    def _count(self, tag: Tag, sent: Tensor, received: Tensor) -> None:
        traffic = self.counters.setdefault(tag, Traffic())
        traffic.sent += sent.numel() * sent.element_size()
        traffic.received += received.numel() * received.element_size()

    def _post(self, axis: int, received: Tensor, sent: Tensor, incoming: list[int], outgoing: list[int]) -> Any:
        raise NotImplementedError


class TorchTransport(BufferTransport):
    """Over ``torch.distributed``, one process group for each line of workers along an axis.

    Args:
        mesh: the workers.
        group: the process group whose ranks are the mesh's; None takes the default group.

    Raises:
        ConfigError: the group has another size than the mesh.

    All ranks of the default group must make it, and in the same order with other groups.
    """

    def __init__(self, mesh: Mesh, group: Any = None) -> None:
        whole = group if group is not None else dist.group.WORLD
        ranks = dist.get_process_group_ranks(whole)
        if len(ranks) != mesh.size:
            raise ConfigError(f"the mesh {mesh} has {mesh.size} workers, the process group {len(ranks)}")
        super().__init__(mesh, dist.get_rank(whole))
        self._groups: dict[int, Any] = {}
        for axis, extent in enumerate(mesh.shape):
            if extent == mesh.size:
                self._groups[axis] = whole
            elif extent > 1:
                self._groups[axis] = self._line(axis, ranks, dist.get_backend(whole))

    def _line(self, axis: int, ranks: list[int], backend: str) -> Any:
        """This worker's group along the axis; the other lines' groups are made beside it, as PyTorch wants."""
        mine = None
        for members in sorted({self.mesh.group(rank, axis) for rank in range(self.mesh.size)}):
            made = dist.new_group([ranks[member] for member in members], backend=backend)
            if self.rank in members:
                mine = made
        return mine

    def _post(self, axis: int, received: Tensor, sent: Tensor, incoming: list[int], outgoing: list[int]) -> Any:
        return dist.all_to_all_single(received, sent, incoming, outgoing, group=self._groups[axis], async_op=True)


class NullTransport(BufferTransport):
    """Sends nothing: what would come is empty memory of the right shape.

    It takes the same buffers and counts the same bytes, also of tensors without elements (FakeTensorMode), so
    that one worker's memory and traffic can be known without the others.
    """

    def _post(self, axis: int, received: Tensor, sent: Tensor, incoming: list[int], outgoing: list[int]) -> Any:
        return None


def total(addends: Sequence[Tensor]) -> Tensor:
    """The sum in the group's order, whatever the backend: the same bits everywhere."""
    result = addends[0].clone() if len(addends) == 1 else addends[0] + addends[1]
    for addend in addends[2:]:
        result += addend
    return result


def reduce(transport: Transport, tensor: Tensor, axis: int, *, tag: Tag) -> Tensor:
    """The sum of all members' tensors, on each of them: even flat pieces are added where they belong, then gathered."""
    extent = transport.mesh.extent(axis)
    if extent == 1:
        return tensor
    place = transport.mesh.coordinates(transport.rank)[axis]
    cuts = reduce_pieces(tensor.numel(), extent)
    sizes = [stop - start for start, stop in itertools.pairwise(cuts)]
    flat = tensor.reshape(-1)
    own = total(transport.exchange(axis, torch.split(flat, sizes), [(sizes[place],)] * extent, tag=tag))
    sums = transport.exchange(axis, [own] * extent, [(size,) for size in sizes], tag=tag)
    return torch.cat(sums).view(tensor.shape)


def _numel(shape: Shape) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
