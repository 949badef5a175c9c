"""A barrier that names who is missing."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist


def barrier(group: dist.ProcessGroup | None = None, timeout_s: float | None = None) -> None:
    """Returns when every rank of the group has come.

    Args:
        group: None for the default group.
        timeout_s: None for the group's own timeout.

    Raises:
        LostPeerError: after `timeout_s`; it names the ranks that have not come, and the group is of no further use.
    """
    options = dist.distributed_c10d.BarrierOptions()
    options.asyncOp = False
    if timeout_s is not None:
        options.timeout = timedelta(seconds=timeout_s)
    chosen: Any = group or dist.group.WORLD
    chosen.barrier(options).wait()
