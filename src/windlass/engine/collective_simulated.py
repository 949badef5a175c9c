"""Runs a schedule in virtual time: the bits of the definition, and the seconds of a network that need not exist.

Who adds what to what, in which order, is part of the schedule, not of the network: a simulated cluster returns the same
bits as one process or real ranks, whatever its links.  What the links decide is when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from windlass.engine.collective_local import Result, run_local
from windlass.plan.collective import Schedule
from windlass.plan.linkcost import Profile
from windlass.plan.topology import Topology
from windlass.simulation.collective_time import schedule_time_ns


def run_simulated(
    schedule: Schedule, buffers: Sequence[npt.NDArray[Any]], *, profile: Profile, topology: Topology | None = None,
    op: str = "sum", dtype: str | None = None,
) -> Result:  # fmt: skip
    """Runs a schedule on one buffer per rank, on ranks and links as described.

    Args:
        schedule: of any collective.
        buffers: 1-D, all of one length, one per rank; of an alltoall the blocks from each to each.
        profile: what messages and additions cost.
        topology: hosts and shared links; None: every pair of ranks has its own link.
        op: sum, mean, max, min or prod.
        dtype: what the numbers are; default: as NumPy says.

    Returns:
        The values, the messages, and the seconds from the common begin to the end of the last rank.

    Raises:
        ConfigError: buffers that do not fit, an unknown op or dtype, or a topology of another number of ranks.
        CheckError: the schedule cannot be run to its end.
    """
    result = run_local(schedule, buffers, op=op, dtype=dtype)
    one_rank = buffers[0].nbytes // schedule.size if schedule.collective == "alltoall" else buffers[0].nbytes
    return replace(result, seconds=schedule_time_ns(schedule, one_rank, profile, topology) * 1e-9)
