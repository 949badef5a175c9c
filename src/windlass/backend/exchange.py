"""Every exchange of a process group: tensors over one MPI communicator.

Each function takes contiguous tensors of host memory and returns *steps*: a generator that has posted its
messages when it first yields, yields while it waits, and returns when the result stands.  So that whoever runs
the steps decides how to wait (`progress`), and no call of MPI ever blocks.

A reduction that MPI has no type for, or whose order is fixed, is made here: every rank gets its piece of all
contributions, folds them in the order of the ranks' numbers, and the pieces are gathered.  Each piece is
computed on one rank, so all ranks hold the same bits.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from mpi4py import MPI

from windlass.backend.datatypes import MPI_OPERATIONS, check_operation, fold, message, pieces, reduction

if TYPE_CHECKING:
    from windlass.engine.collectives import Collectives

Steps = Generator[None, None, None]

ENGINE_BYTES = 64 << 10
"""From here on an allreduce goes through `engine.collectives`; 16-bit floats always do."""
PROBE_TURNS = 64
"""Tests between two looks whether a rank has died."""
_ENGINE_OPS = {"sum": "sum", "mean": "mean", "max": "max", "min": "min", "product": "prod"}
_ENGINE_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int32: "int32",
    torch.int16: "int16",
}
SCRATCH_BYTES = 64 << 10
"""From here on Open MPI's allreduce is faster from one buffer to another than in place."""


def wait_for(request: MPI.Request) -> Steps:
    """Yields until the request is complete; raises MPI's error."""
    while not request.Test():
        yield


def wait_for_all(requests: dict[int, MPI.Request], missing: set[int]) -> Steps:
    """Yields until all are complete; `missing` holds, at any time, the ranks that are not."""
    missing.update(requests)
    while missing:
        missing.difference_update([rank for rank in missing if requests[rank].Test()])
        if missing:
            yield


class Exchange:
    """The exchanges of one group; one thread at a time.

    Args:
        comm: a communicator of its own.
        fixed_order: see `options.Options`.

    Attributes:
        missing: of the exchange under way, the ranks it waits for, where this rank can tell.
    """

    def __init__(self, comm: MPI.Comm, *, fixed_order: bool = False) -> None:
        self._comm: Any = comm
        self._fixed_order = fixed_order
        self._collectives: Collectives | None = None
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.missing: set[int] = set()

    # --- reductions -----------------------------------------------------------------------------------------

    def start_allreduce(self, tensor: torch.Tensor, op: str) -> Steps:
        """Reduces a flat tensor over all ranks, in place; `op` is a name of `datatypes.FOLDS` or ``mean``."""
        if self._engine_serves(tensor, op):
            yield from self._engine_allreduce(tensor, op)
            return
        if op == "mean":
            yield from self.start_allreduce(tensor, "sum")
            divide(tensor, self.size)
            return
        op = check_operation(tensor.dtype, op)
        if self.size == 1:
            return
        known = MPI_OPERATIONS.get((tensor.dtype, op))
        if known is None or self._fixed_order:
            yield from self._fold_allreduce(tensor, op)
            return
        mpi_type, operation = known
        if tensor.nbytes < SCRATCH_BYTES:
            yield from wait_for(self._comm.Iallreduce(MPI.IN_PLACE, reduction(tensor, mpi_type), operation))
            return
        send = self._copy(tensor)
        yield from wait_for(self._comm.Iallreduce(reduction(send, mpi_type), reduction(tensor, mpi_type), operation))

    def _engine_serves(self, tensor: torch.Tensor, op: str) -> bool:
        large = tensor.nbytes >= ENGINE_BYTES or tensor.dtype in (torch.float16, torch.bfloat16)
        known = tensor.dtype in _ENGINE_DTYPES and op in _ENGINE_OPS
        return known and large and self.size > 1 and tensor.numel() > 0 and not self._fixed_order

    def _engine_allreduce(self, tensor: torch.Tensor, op: str) -> Steps:
        """Through shared memory within a host, by schedules between hosts."""
        # Numba comes in here, which takes a second.
        from windlass.engine.collectives import Collectives
        from windlass.kernels.collective.combine import STORAGE

        if self._collectives is None:
            yield from self.barrier()  # what comes now waits for all without yielding
            self._collectives = Collectives(self._comm)
        name = _ENGINE_DTYPES[tensor.dtype]
        array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().view(STORAGE[name])
        request = self._collectives.start_allreduce(array, array, dtype=name, op=_ENGINE_OPS[op])
        turns = 0
        while not request.test():
            turns += 1
            if turns % PROBE_TURNS == 0:
                self._comm.Iprobe()  # shared memory does not tell that a rank has died; this raises
            yield

    def close(self) -> None:
        """Frees what MPI holds."""
        if self._collectives is not None:
            self._collectives.close()

    def reduce(self, tensor: torch.Tensor, op: str, root: int) -> Steps:
        """Reduces a flat tensor onto `root`; the other ranks keep theirs."""
        if op == "mean":
            yield from self.reduce(tensor, "sum", root)
            if self.rank == root:
                divide(tensor, self.size)
            return
        op = check_operation(tensor.dtype, op)
        known = MPI_OPERATIONS.get((tensor.dtype, op))
        if known is not None and not self._fixed_order:
            buffer = reduction(tensor, known[0])
            send, receive = (MPI.IN_PLACE, buffer) if self.rank == root else (buffer, None)
            yield from wait_for(self._comm.Ireduce(send, receive, known[1], root))
            return
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == root else []
        yield from self.gather(tensor, parts, root)
        if parts:
            tensor.copy_(fold(parts, op))

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor, counts: list[int], op: str) -> Steps:
        """Reduces a flat tensor; piece r of `counts` elements ends in rank r's `output`."""
        if op == "mean":
            yield from self.reduce_scatter(output, tensor, counts, "sum")
            divide(output, self.size)
            return
        op = check_operation(tensor.dtype, op)
        known = MPI_OPERATIONS.get((tensor.dtype, op))
        if known is None or self._fixed_order:
            yield from self._fold_scatter(output, tensor, counts, op)
            return
        send, receive = reduction(tensor, known[0]), reduction(output, known[0])
        yield from wait_for(self._comm.Ireduce_scatter(send, receive, counts, known[1]))

    def _fold_scatter(self, output: torch.Tensor, tensor: torch.Tensor, counts: list[int], op: str) -> Steps:
        mine = counts[self.rank]
        parts = tensor.new_empty(mine * self.size)
        yield from self.all_to_all(parts, tensor, [mine] * self.size, counts)
        output.copy_(fold(list(parts.view(self.size, mine)), op))

    def _fold_allreduce(self, tensor: torch.Tensor, op: str) -> Steps:
        counts = even_counts(tensor.numel(), self.size)
        piece = tensor.new_empty(counts[self.rank])
        yield from self._fold_scatter(piece, tensor, counts, op)
        yield from self.allgather(tensor, piece, counts)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in memory that is kept for the next time."""
        held = self._scratch.get(tensor.dtype)
        if held is None or held.numel() < tensor.numel():
            held = self._scratch[tensor.dtype] = torch.empty_like(tensor)
        return held[: tensor.numel()].copy_(tensor)

    # --- movements ------------------------------------------------------------------------------------------

    def broadcast(self, tensor: torch.Tensor, root: int) -> Steps:
        """Copies `root`'s tensor to all."""
        yield from wait_for(self._comm.Ibcast(message(tensor), root))

    def allgather(self, output: torch.Tensor, tensor: torch.Tensor, counts: list[int]) -> Steps:
        """Every rank's tensor, of so many elements each, one after the other on every rank."""
        yield from wait_for(self._comm.Iallgatherv(message(tensor), pieces(output, counts)))

    def all_to_all(self, output: torch.Tensor, tensor: torch.Tensor, receive: list[int], send: list[int]) -> Steps:
        """Piece r of `send` elements goes to rank r; what rank r sends becomes piece r of `receive` elements."""
        yield from wait_for(self._comm.Ialltoallv(pieces(tensor, send), pieces(output, receive)))

    def gather(self, tensor: torch.Tensor, outputs: list[torch.Tensor], root: int) -> Steps:
        """Every rank's tensor into `outputs` on `root`, which knows by name who has not sent."""
        if self.rank != root:
            yield from wait_for(self._comm.Isend(message(tensor), root))
            return
        others = [rank for rank in range(self.size) if rank != root]
        requests = {rank: self._comm.Irecv(message(outputs[rank]), rank) for rank in others}
        outputs[root].copy_(tensor)
        self.missing = set()
        yield from wait_for_all(requests, self.missing)

    def scatter(self, output: torch.Tensor, tensors: list[torch.Tensor], root: int) -> Steps:
        """Tensor r of `root`'s list into rank r's `output`."""
        if self.rank != root:
            yield from wait_for(self._comm.Irecv(message(output), root))
            return
        others = [rank for rank in range(self.size) if rank != root]
        requests = {rank: self._comm.Isend(message(tensors[rank]), rank) for rank in others}
        output.copy_(tensors[root])
        self.missing = set()
        yield from wait_for_all(requests, self.missing)

    def barrier(self) -> Steps:
        """Ends when all ranks have come."""
        yield from wait_for(self._comm.Ibarrier())


def send(comm: MPI.Comm, tensor: torch.Tensor, to: int, tag: int) -> Steps:
    """Sends a tensor to one rank."""
    yield from wait_for(comm.Isend(message(tensor), to, tag))


def receive(comm: MPI.Comm, tensor: torch.Tensor, source: int, tag: int, status: MPI.Status) -> Steps:
    """Receives a tensor; a receive that is given up is cancelled, so that nothing is written any more."""
    request = comm.Irecv(message(tensor), source, tag)
    try:
        while not request.Test(status):
            yield
    finally:
        if request != MPI.REQUEST_NULL:
            request.Cancel()
            request.Free()


def divide(tensor: torch.Tensor, divisor: int) -> None:
    """Divides in place; integers towards zero."""
    whole = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
    if tensor.dtype != torch.bool:
        tensor.div_(divisor, rounding_mode="trunc" if whole else None)


def even_counts(num: int, size: int) -> list[int]:
    """So many elements in `size` pieces whose lengths differ by one at most.

    >>> even_counts(7, 3)
    [2, 2, 3]
    """
    ends = [num * (part + 1) // size for part in range(size)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
