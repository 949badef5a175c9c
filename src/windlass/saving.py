"""When a run's checkpoints are due, what is written into them, and which are kept."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from windlass.config import better_when_lower
from windlass.engine.gradients import FlatGroup
from windlass.engine.world import World
from windlass.errors import DataError
from windlass.prepare import Prepared
from windlass.progress import Progress
from windlass.runs.checkpoint import Checkpoint, list_checkpoints, rotate, write_checkpoint
from windlass.state import (
    Tensors,
    load_optimizer,
    load_rank,
    mean_buffers,
    seed_rank,
    tensors_of_rank,
)


class Saver:
    """The checkpoints of one run.

    Args:
        prepared: the run.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._folder = Path(prepared.job.folder) / "checkpoints"
        self._saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after so many steps; only rank 0's clock counts."""
        rules = self._prepared.job.config.checkpoint
        if self._prepared.world.rank != 0 or self._prepared.job.dry_run:
            return False
        steps_due = rules.every_steps and step % rules.every_steps == 0
        minutes_due = rules.every_minutes and time.monotonic() - self._saved > 60 * rules.every_minutes
        return bool(steps_due or minutes_due)

    def saved(self) -> None:
        """A checkpoint stands: the minutes count anew."""
        self._saved = time.monotonic()

    def last(self) -> str:
        """The newest checkpoint, in words."""
        kept = list_checkpoints(self._folder)
        return f"last good checkpoint: {kept[-1]}" if kept else "there is no checkpoint yet"

    def write(
        self, progress: Progress, *, weights: Tensors, state: Tensors, metrics: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Writes a checkpoint, on one rank; its row of metrics.

        Raises:
            WriteError: it cannot be written.
        """
        config = self._prepared.job.config
        rules = config.checkpoint
        manifest = {
            "step": progress.step,
            "progress": dict(progress.__dict__),
            "world_size": self._prepared.world.size,
            "network": config.network,
            "data": config.data.source,
            "batch": config.batch,
            "seed": config.seed,
            "metrics": dict(metrics),
        }
        path = write_checkpoint(self._folder, weights=weights, state=state, manifest=manifest)
        best = rotate(
            self._folder,
            keep_last=rules.keep_last,
            keep_best=rules.keep_best,
            metric=rules.monitor,
            lower=better_when_lower(rules.monitor),
        )
        return {"kind": "checkpoint", "step": progress.step, "name": path.name, "best": best == path}


def restore(
    checkpoint: Checkpoint,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: list[FlatGroup],
    *,
    world: World,
    seed: int,
) -> Progress:
    """Puts a rank of data parallelism back to where a checkpoint was written, and says where that is.

    Written by another number of ranks, running statistics are their mean and random states begin anew.

    Raises:
        DataError: it does not fit the network.
    """
    load_weights(module, checkpoint.weights, str(checkpoint.path))
    load_optimizer(optimizer, groups, checkpoint.state)
    progress = Progress(**checkpoint.manifest["progress"])
    num_ranks = int(checkpoint.manifest["world_size"])
    with torch.no_grad():
        if num_ranks == world.size:
            load_rank(module, tensors_of_rank(checkpoint.state, world.rank))
        else:
            mean_buffers(module, checkpoint.state, num_ranks)
            seed_rank(seed, step=progress.step, rank=world.rank)
    return progress


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor], where: str) -> None:
    """Puts a checkpoint's weights into the network.

    Raises:
        DataError: they do not fit it.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split())
        raise DataError(f"checkpoint {where} does not fit the network: {first}") from None
