"""A rank's batch in pieces that are run one after another, to hold fewer activations at once."""

from __future__ import annotations

from windlass.data.order import shard
from windlass.data.serving import Batch


def micro_batches(batch: Batch, parts: int) -> list[Batch]:
    """A rank's samples in so many parts of about equal size, those that would be empty left out."""
    bounds = [shard(0, len(batch.labels), rank=part, world_size=parts) for part in range(parts)]
    return [
        Batch(batch.images[start:stop], batch.labels[start:stop], batch.global_count, batch.ids[start:stop])
        for start, stop in bounds
        if stop > start
    ]
