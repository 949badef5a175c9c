"""What a process group can be told beside what PyTorch tells it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """Handed over as ``init_process_group("windlass", pg_options=Options(fixed_order=True))``, or to ``new_group``.

    Attributes:
        fixed_order: contributions are added in the order of the ranks' numbers, whatever the message's size and
            the network, so that a result has the same bits in every run on as many ranks; costs some speed.
    """

    fixed_order: bool = False
