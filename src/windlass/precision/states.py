"""``state_dict`` and ``load_state_dict`` of a network and an optimizer under a recipe: float32 outside, codes inside.

A network's state has float32 weights, as without a recipe.  Late in a run they need the late formats to be read again
without loss, so the share of the run that is done goes with them as metadata; it stands in the optimizer's state too,
with the step and the seed, on which random bits depend.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from windlass.errors import ConfigError

if TYPE_CHECKING:
    from windlass.precision.lowered import Lowered

STATE = "windlass_precision"
"""The key under which the optimizer's ``state_dict()`` has what random bits depend on, and a network's the share."""


class States:
    """The hooks of one network and its optimizer.

    Args:
        lowered: what they belong to.
    """

    def __init__(self, lowered: Lowered) -> None:
        self._lowered = lowered
        self._by_id = {id(entry.parameter): entry for entry in lowered.stored}
        self._loading: nn.Module | None = None

    def hook(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[Any]:
        """Registers all; gives the handles."""
        for module in model.modules():
            hooks: Any = module  # they have no types
            yield hooks._register_state_dict_hook(self._give_state)
            yield hooks.register_load_state_dict_pre_hook(self._before_load)
            yield hooks.register_load_state_dict_post_hook(self._load_done)
        if optimizer is not None:
            yield optimizer.register_state_dict_post_hook(self._give_optimizer_state)
            yield optimizer.register_load_state_dict_pre_hook(self._take_optimizer_state)

    def _give_state(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        if self._lowered.recipe.late:
            metadata[STATE] = self._lowered.share
        if self._lowered.is_whole:
            return
        for name, parameter in module._parameters.items():
            entry = self._by_id.get(id(parameter))
            if entry is not None and prefix + name in state:
                state[prefix + name] = entry.wide()

    def _before_load(self, module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any], *args: Any) -> None:
        if metadata.get("assign_to_params_buffers"):
            raise ConfigError("load_state_dict(assign=True) would put other parameters in place of those of the recipe")
        if self._lowered.is_whole:
            return
        self._lowered.share = metadata.get(STATE, self._lowered.share)
        self._loading = module
        self._lowered.show()

    def _load_done(self, module: nn.Module, *args: Any) -> None:
        if self._loading is module:
            self._lowered.encode()
            self._loading = None

    def _give_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, STATE: self._lowered.sites.state()}

    def _take_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        found = state.get(STATE)
        if found is not None:
            self._lowered.sites.tell(step=int(found["step"]))
            self._lowered.sites.seed = int(found["seed"])
            self._lowered.share = float(found["share"])
