"""A step under a recipe on fake tensors: `windlass.precision`'s own engine, told to an observer.

The engine runs as it does in training; what it rounds has no elements here.  Its parameters are the fake ones, so
whatever it hooks onto the module is taken off again (`Rehearsal.close`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from windlass.networks.recorder import Recorder
from windlass.plan.recipe import Recipe
from windlass.precision.lowered import Lowered
from windlass.precision.quantize import DTYPES


class _Within(nn.Module):
    """A module whose forward pass is anything that is done while other weights are in another's place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, action: Callable[[], object]) -> object:
        return action()


def within(module: nn.Module, weights: dict[str, Tensor], action: Callable[[], object]) -> object:
    """What `action` returns when `weights` are in the place of the module's own."""
    return functional_call(_Within(module), {f"module.{name}": tensor for name, tensor in weights.items()}, (action,))


class Rehearsal:
    """The network with fake weights under a recipe, and plain SGD over them.

    Args:
        module: the network.
        weights: fake parameters and buffers by name.
        recipe: what is rounded how.
        share: the share of the run that is done.
        defer_gradients: gradients stay float32, for one who adds them up elsewhere, and nothing is updated.
    """

    def __init__(
        self, module: nn.Module, weights: dict[str, Tensor], recipe: Recipe, *, share: float, defer_gradients: bool
    ) -> None:
        self.recipe, self.share = recipe, share
        trained = list({id(t): t for t in weights.values() if isinstance(t, nn.Parameter) and t.requires_grad}.values())
        optimizer = torch.optim.SGD(trained, lr=0.1) if trained else None
        made: list[Lowered] = []
        within(
            module, weights,
            lambda: made.append(Lowered(module, optimizer, recipe, store_gradients=not defer_gradients, share=share)),
        )  # fmt: skip
        self.lowered, self._optimizer = made[0], optimizer
        self.lowered.defer_gradients = defer_gradients

    def watch(self, recorder: Recorder) -> None:
        """Tells the recorder what the engine holds, and has the engine tell it what comes."""
        for entry in self.lowered.stored:
            stored = torch.float32 if self.lowered.defer_gradients else DTYPES[entry.gradient_number.storage]
            num_bytes = entry.codes.numel() * stored.itemsize
            recorder.declare(
                entry.parameter, entry.codes, gradient_bytes=num_bytes if entry.parameter.requires_grad else 0
            )
        forward = self.lowered.forward
        forward.on_widen = lambda entry, wide: recorder.stand_for(entry.parameter, wide)
        forward.on_round = recorder.follow
        forward.kept.on_keep = recorder.keep_as
        recorder.error_bits = self._error_bits

    def update(self) -> None:
        """A step of the optimizer with the gradients that are there."""
        if self._optimizer is not None and not self.lowered.defer_gradients:
            self._optimizer.step()

    def close(self) -> None:
        """Takes the engine's hooks off the module."""
        self.lowered.remove()

    def _error_bits(self, layer: str) -> int:
        return self.recipe.number("errors", layer, self.share).bits
