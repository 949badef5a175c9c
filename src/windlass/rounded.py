"""Synchronous SGD under a recipe: the trainer of runs whose numbers are kept in 16 bits.

The network and the optimizer are under `windlass.precision`; this is what a run adds to it: where it stands (random
bits depend on step and sample, not on the worker), the workers' gradients, the late switch, counters to metrics.

Gradients take one of three ways.  One worker keeps codes as the backward pass makes them.  Several workers add up
float32 gradients, and the sum is rounded once, so that any number of workers trains alike; or, with
``exchange=16bit``, each worker's part is rounded, travels in 16 bits, and is added in 32 (`engine.narrow`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from windlass.data.serving import Batch
from windlass.engine.gradients import FlatGroup, GradientAverager, LoneGroup
from windlass.engine.narrow import NarrowSums
from windlass.engine.world import MpiWorld, crosses_hosts
from windlass.loop import Trainer
from windlass.plan.recipe import Recipe, parse_recipe
from windlass.precision.keeper import CodeKeeper
from windlass.precision.lowered import Lowered
from windlass.precision.stored import hidden
from windlass.prepare import allreduce_for
from windlass.report.precision_words import new_stalls


class OwnGradients:
    """One worker's gradients, which its network keeps as codes: nothing is summed.  Stands for `GradientAverager`."""

    groups: tuple[()] = ()
    num_buckets = 0

    def begin(self) -> None:
        """A step begins."""

    def finish_backward(self) -> bool:
        """Codes are finite."""
        return True

    def under_way_s(self) -> float:
        """Nothing is."""
        return 0.0

    def wait(self) -> None:
        """Nothing to wait for."""


class RoundedTrainer(Trainer):
    """Trains one prepared run on one rank under its plan's recipe; see `Trainer`."""

    lowered: Lowered

    @property
    def groups(self) -> list[FlatGroup]:
        """Every parameter by itself."""
        return self._groups

    def _build(self) -> None:
        plan = self.prepared.plan
        self.recipe: Recipe = parse_recipe(str(plan.value("number_format")))
        self.module = self.prepared.module.to(memory_format=self._layout)  # type: ignore[call-overload]
        self._keeps_codes = self._is_alone() and int(plan.value("accumulate")) == 1
        self._keeper: CodeKeeper | None = None
        if self._keeps_codes:
            self.allreduce = allreduce_for(self.world, plan)
            self.averager = OwnGradients()  # type: ignore[assignment]
        else:
            self._sum_gradients()
        self._groups: list[FlatGroup] = [LoneGroup(name, p) for name, p in self._trainable()]
        self._sample = self._nan_before = 0
        self._last_counters: dict[str, Any] = {}

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _sum_gradients(self) -> None:
        """Makes what sums the workers' gradients."""
        plan, world = self.prepared.plan, self.world
        if self.recipe.exchange == "16bit" and isinstance(world, MpiWorld) and world.size > 1:
            self._keeper = CodeKeeper(self.recipe, rank=world.rank)
            self.allreduce = NarrowSums(world, self.recipe.gradients)  # type: ignore[assignment]
        else:
            self.allreduce = allreduce_for(world, plan)
        self.averager = GradientAverager(
            self.module,
            start_sum=self.allreduce.start,
            alone=self._is_alone(),
            bucket_bytes=int(plan.value("bucket_bytes")),
            overlap=bool(plan.value("overlap")),
            background=crosses_hosts(world),
            keeper=self._keeper,
        )

    def _restore(self) -> None:
        """The state in float32, and then under the recipe."""
        checkpoint = self.prepared.checkpoint
        epoch = 0 if checkpoint is None else int(checkpoint.manifest["progress"]["epoch"])
        super()._restore()
        self.lowered = Lowered(
            self.module,
            self.optimizer,
            self.recipe,
            seed=self.config.seed,
            store_gradients=self._keeps_codes,
            share=epoch / self.config.epochs,
        )
        self.lowered.defer_gradients = not self._keeps_codes
        for group in self.averager.groups:
            group.parameter.data = hidden(group.parameter)
            group.parameter.grad = None
        if self._keeper is not None:
            self._keeper.use(self.lowered)

    def _train_epoch(self) -> None:
        self.lowered.share = self.progress.epoch / self.config.epochs
        super()._train_epoch()

    def _forward_backward(self, batch: Batch) -> tuple[float, float]:
        self._sample = self.prepared.train.own_span(batch.global_count)[0]
        self.lowered.sites.tell(step=self.progress.step, batch=batch.global_count)
        self._nan_before = self._num_nan()
        return super()._forward_backward(batch)

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, float]:
        self.lowered.sites.tell(first_sample=self._sample)
        self._sample += len(batch.labels)
        return super()._forward(batch)

    def _finish_backward(self) -> bool:
        return super()._finish_backward() and self._num_nan() == self._nan_before

    def _num_nan(self) -> int:
        return sum(counters.not_a_number for counters in self.lowered.counters.values())

    def _step_optimizer(self) -> None:
        """Hands the sums over to the network's parameters, and updates."""
        by_name = {entry.name: entry for entry in self.lowered.stored}
        for group in self.averager.groups:
            for name, gradient in group.split(group.gradient):
                entry = by_name[name]
                if self._keeper is not None:
                    entry.gradient = gradient
                else:
                    self.lowered.round_gradient(entry, gradient)
                    entry.parameter.grad = gradient
        self.optimizer.step()
        for entry in self.lowered.stored:
            entry.parameter.grad = None

    def _finish_epoch(self) -> None:
        self._write_counters()
        super()._finish_epoch()

    def _stop_here(self) -> None:
        self._write_counters()
        super()._stop_here()

    def _write_counters(self) -> None:
        """What rounding did since the last time, as a row of metrics; says what no longer moves."""
        progress, rows = self.progress, self.lowered.rows()
        self.lowered.reset_counters()
        if self.world.rank != 0 or not rows:
            return
        row = {
            "kind": "precision",
            "step": progress.step,
            "epoch": progress.epoch,
            "recipe": str(self.recipe),
            "rows": rows,
        }
        self._write_row(row)
        rows_so_far = [self._last_counters, row] if self._last_counters else [row]
        for message in new_stalls(rows_so_far):
            self._emit({"kind": "warning", "message": message})
        self._last_counters = row
