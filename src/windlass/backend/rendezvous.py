"""How the ranks of an MPI job find each other where PyTorch expects environment variables.

``init_process_group`` without arguments reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.  Under ``mpiexec`` and
``srun`` nobody sets them: MPI knows the first two, and the other two are agreed over MPI, as in DeepSpeed's
``mpi_discovery``.  They are set for what else reads them, LOCAL_RANK and LOCAL_WORLD_SIZE too.  The store is a real
shared one, so that groups of other backends work beside ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

from windlass.backend.create import HOW_TO_START
from windlass.engine.world import world_from_environment

Handler = Callable[..., Iterator[tuple[Any, int, int]]]

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_own_address: dict[str, str] = {}
"""What this module has set: a second rendezvous agrees on a new port."""


def serve_mpi() -> None:
    """Extends PyTorch's ``env://`` by MPI's ranks; what the environment says still counts."""
    # torch.distributed.rendezvous is a function; register_rendezvous_handler refuses a name that exists.
    handlers = sys.modules["torch.distributed.rendezvous"]._rendezvous_handlers
    handlers["env"] = partial(_rendezvous, handlers["env"])


def _rendezvous(
    torchs_own: Handler, url: str, timeout: timedelta = timedelta(minutes=30), **kwargs: Any
) -> Iterator[tuple[Any, int, int]]:
    given = {name: os.environ.get(name) for name in _ADDRESS}
    agreed = all(given.values()) and given != _own_address
    if world_from_environment() is None or agreed:
        if world_from_environment() is not None:
            _set_ranks()
        yield from _with_hint(torchs_own(url, timeout=timeout, **kwargs))
        return
    yield _meet(timeout)
    raise RuntimeError("the ranks of an MPI job cannot meet a second time")


def _with_hint(meeting: Iterator[tuple[Any, int, int]]) -> Iterator[tuple[Any, int, int]]:
    try:
        yield from meeting
    except ValueError as error:
        error.add_note(f"Is this a program for several ranks? With MPI, {HOW_TO_START.format(size='N')}.")
        raise


def _set_ranks() -> tuple[int, int]:
    """RANK and its like from the launcher's variables, where they are not set."""
    found = world_from_environment()
    assert found is not None
    rank, size = found
    local_rank = _first("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
    local_size = _first("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    values = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    for name, value in values.items():
        if value is not None:
            os.environ.setdefault(name, value)
    return rank, size


def _first(*names: str) -> str | None:
    return next((os.environ[name] for name in names if name in os.environ), None)


def _meet(timeout: timedelta) -> tuple[Any, int, int]:
    """A store on rank 0 that all ranks know."""
    import socket

    from mpi4py import MPI
    from torch._C._distributed_c10d import TCPStore

    rank, size = _set_ranks()
    comm = MPI.COMM_WORLD
    one_host = len(set(comm.allgather(MPI.Get_processor_name()))) == 1
    store, host, port = None, "localhost" if one_host else socket.gethostname(), 0
    if rank == 0:
        store = TCPStore(host, 0, size, True, timeout, wait_for_workers=False, multi_tenant=True)
        port = store.port
    host, port = comm.bcast((host, port), root=0)
    if store is None:
        store = TCPStore(host, port, size, False, timeout, wait_for_workers=False)
    _own_address.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    os.environ.update(_own_address)
    return store, rank, size
