"""Sums over parts of a mesh: along which axes of it a gradient must be added up differs from parameter to parameter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import TYPE_CHECKING, Any, cast

from numpy.typing import NDArray

from windlass.engine.allreduce import Allreduce, StartSum
from windlass.engine.world import MpiWorld, Request, World
from windlass.plan.mesh import Mesh

if TYPE_CHECKING:
    from mpi4py import MPI

Axes = tuple[int, ...]
"""Numbers of the axes of a mesh, ascending: the key of a sum over all workers that differ along these alone."""


class KeyedSums:
    """An allreduce for every set of axes over which something is summed.

    Args:
        world: the ranks of the mesh; making this object is collective.
        mesh: how they stand.
        keys: the sets of axes, the same on all ranks; the empty one needs no sum and is left out.
        make: makes the allreduce of some ranks.
    """

    def __init__(self, world: MpiWorld, mesh: Mesh, keys: Collection[Axes], make: Callable[[World], Allreduce]) -> None:
        self._sums: dict[Axes, Allreduce] = {}
        for key in sorted({key for key in keys if key}):
            line = cast("MPI.Intracomm", world.comm.Split(color=_line(mesh, world.rank, key), key=world.rank))
            self._sums[key] = make(MpiWorld(line))

    @property
    def start_sums(self) -> dict[Hashable, StartSum]:
        """What starts the sum of each key."""
        return {key: allreduce.start for key, allreduce in self._sums.items()}

    def start(self, send: NDArray[Any], receive: NDArray[Any]) -> Request:
        """There is no sum without a key.

        Raises:
            KeyError: always.
        """
        raise KeyError("a sum over parts of a mesh needs the axes over which it goes")

    def new_bytes(self) -> tuple[int, int]:
        """Bytes that this rank has sent since the last call, as counted and as the schedules say."""
        rows = [allreduce.new_bytes() for allreduce in self._sums.values()]
        return sum(sent for sent, _ in rows), sum(planned for _, planned in rows)

    def describe(self) -> str:
        """What was used for which sizes, in words."""
        return "; ".join(allreduce.describe() for allreduce in self._sums.values()) or "nothing was summed"

    def close(self) -> None:
        """Frees what MPI holds; collective."""
        for allreduce in self._sums.values():
            allreduce.close()


def _line(mesh: Mesh, rank: int, axes: Axes) -> int:
    """The lowest rank of those that differ from this one along `axes` alone."""
    places = [0 if axis in axes else place for axis, place in enumerate(mesh.coordinates(rank))]
    return mesh.rank(tuple(places))
