"""How ranks sum their gradients, by the plan's levers ``allreduce`` and ``fixed_order``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from windlass.engine.collectives import Chooser, Collectives
from windlass.engine.world import MpiWorld, Request, World, losses_named
from windlass.errors import ConfigError
from windlass.plan.pick import LIBRARY, ORDERED, Pick, Picks

if TYPE_CHECKING:
    from mpi4py import MPI

FAULT_VARIABLE = "OMPI_MCA_mpi_ft_enable"
"""Set by Open MPI's ``mpiexec --with-ft ulfm``."""

StartSum = Callable[[NDArray[Any], NDArray[Any]], Request]


def look_for_losses(comm: MPI.Intracomm) -> None:
    """Raises `RankLost` where a rank of a fault tolerant MPI has died or the communicator was revoked.

    Shared memory does not tell; a probe does, as any operation with an unknown partner.
    """
    with losses_named("an allreduce"):
        comm.Iprobe()


@dataclass
class Traffic:
    """What sums have moved: by size of buffer, how often, by which algorithm, and this rank's bytes.

    Attributes:
        rows: (bytes of the buffer, algorithm) -> how often.
        predicted_bytes: what the schedules say that this rank sends.
    """

    rows: dict[tuple[int, str], int] = field(default_factory=dict)
    predicted_bytes: int = 0


class Allreduce:
    """Sums over a world's ranks by the plan's choice.

    Args:
        world: the ranks; making this object is collective.
        lever: the value of ``allreduce``, as `Picks.parse` reads it.
        fixed_order: whether sums are made in the order of ranks.
        choose: what ``auto`` means, by size; None: `Collectives.default_choice`.
        timeout_s: longest wait for other ranks; 0: for ever.

    Raises:
        ConfigError: an algorithm that these ranks cannot run.
    """

    def __init__(
        self, world: World, lever: str, *, fixed_order: bool = False, choose: Chooser | None = None,
        timeout_s: float = 0.0,
    ) -> None:  # fmt: skip
        self._world, self._picks = world, Picks.parse(lever)
        self._collectives: Collectives | None = None
        self.traffic = Traffic()
        self._known: dict[tuple[int, Pick], int] = {}
        self._told = (0, 0)
        refused = [pick.algorithm for _, pick in self._picks.rows if fixed_order and pick.algorithm not in ORDERED]
        if refused:
            raise ConfigError(
                f"allreduce {lever}: {refused[0]} does not add in the order of ranks, which fixed_order asks for; "
                f"choose from: auto, {', '.join(ORDERED)}"
            )
        if isinstance(world, MpiWorld) and world.size > 1:
            check = look_for_losses if FAULT_VARIABLE in os.environ else None
            self._collectives = Collectives(
                world.comm, choose=choose, fixed_order=fixed_order, timeout_s=timeout_s, check=check
            )

    @property
    def counted_bytes(self) -> int:
        """What this rank has sent, or written into shared memory, as counted while it did; not by the library."""
        return self._collectives.bytes_sent if self._collectives is not None else 0

    def new_bytes(self) -> tuple[int, int]:
        """Bytes that this rank has sent since the last call, as counted and as the schedules say."""
        before, self._told = self._told, (self.counted_bytes, self.traffic.predicted_bytes)
        return self._told[0] - before[0], self._told[1] - before[1]

    def start(self, send: NDArray[Any], receive: NDArray[Any]) -> Request:
        """Starts summing `send` over all ranks into `receive`."""
        collectives = self._collectives
        if collectives is None:
            return self._world.start_sum(send, receive)
        pick = self._picks.of(send.nbytes) or collectives.choose(send.nbytes)
        self._count(pick, send, collectives)
        return collectives.start_allreduce(send, receive, dtype=str(send.dtype), pick=pick)

    def describe(self) -> str:
        """What was used for which sizes, in words."""
        found = sorted(self.traffic.rows.items())
        return ", ".join(f"{count} of {size} bytes by {name}" for (size, name), count in found) or "nothing was summed"

    def close(self) -> None:
        """Frees what MPI holds; collective."""
        if self._collectives is not None:
            self._collectives.close()
            self._collectives = None

    def _count(self, pick: Pick, send: NDArray[Any], collectives: Collectives) -> None:
        key = (send.nbytes, str(pick))
        self.traffic.rows[key] = self.traffic.rows.get(key, 0) + 1
        if pick.algorithm != LIBRARY:
            self.traffic.predicted_bytes += self._predicted(pick, send, collectives)

    def _predicted(self, pick: Pick, send: NDArray[Any], collectives: Collectives) -> int:
        known = self._known.get((send.nbytes, pick))
        if known is None:
            known = pick.bytes_sent(collectives.rank, send.nbytes, send.itemsize, collectives.size, collectives.hosts)
            self._known[(send.nbytes, pick)] = known
        return known
