"""A network and its optimizer under a recipe: what `apply` makes.

    lowered = windlass.precision.apply(model, optimizer, "fixed16")
    ...                                 # the training loop as it was

The network's weights become codes (`stored`), its forward and backward pass round (`forward`), and a step of the
optimizer is taken in float32, piece by piece: the numbers of a piece and its gradient are widened, the optimizer
steps them, what it has added is rounded to the format of updates, added to the codes with saturation, and forgotten.
A step with a closure shows all weights at once, since the optimizer may move them several times before it is done.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from windlass.errors import ConfigError
from windlass.layers.leaf import is_leaf
from windlass.plan.number import FLOAT32
from windlass.plan.recipe import Recipe, parse_recipe
from windlass.precision.counters import Counters
from windlass.precision.forward import Forward, Wrapped
from windlass.precision.quantize import DTYPES
from windlass.precision.sites import Sites
from windlass.precision.slices import ELEMENTWISE, LARGE
from windlass.precision.states import States
from windlass.precision.stored import Piece, Stored, rounder, set_formats, store
from windlass.precision.tally import Place
from windlass.precision.updates import Updates

PIECE = 1 << 18
"""Parameters are stepped together until they have so many numbers."""


def apply(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    recipe: Recipe | str = "fixed16",
    *,
    seed: int = 0,
    store_gradients: bool = False,
) -> Lowered:
    """Puts a network and its optimizer under a recipe, in place; the training loop stays as it is.

    Args:
        model: of float32 parameters on the CPU.  Its parameters are NaN from here on, except in `Lowered.weights`;
            ``state_dict`` and ``load_state_dict`` work as before, with the numbers in float32.
        optimizer: any of ``torch.optim`` that has the network's parameters; None: the network is only evaluated, or
            its gradients are used by hand.
        recipe: `Recipe`, or its text, e.g. ``"fixed16"`` or ``"fixed16,rounding=nearest,activations=<8,8>"``.
        seed: of all random bits.
        store_gradients: gradients are kept in their format, out of sight; otherwise they stand in ``grad`` in float32,
            rounded, where `torch.nn.utils.clip_grad_norm_` finds them.  Those that are kept so are used up by a step;
            ``zero_grad()`` does not reach them (`Lowered.forget_gradients` does).

    A step of an optimizer of ``torch.optim`` is taken in parts, so that not all weights are in float32 at once, and its
    hooks run once for each; another optimizer sees all weights together.  Gradients from `torch.autograd.grad` are not
    rounded.  One optimizer steps the network; it cannot be copied, pickled, scripted or run again by
    `torch.utils.checkpoint`, and has no second derivatives.  `torch.nn.parallel.DistributedDataParallel` is put around
    a network before its ``module`` goes under a recipe, and then averages gradients that each worker has left
    unrounded only if `Lowered.defer_gradients` is set; `windlass.train` does all that.

    Source: Gupta et al., ICML 2015.

    Raises:
        ConfigError: the recipe names a layer that is not there; a parameter is not float32; the network is under a
            recipe already.
    """
    return Lowered(model, optimizer, parse_recipe(recipe), seed=seed, store_gradients=store_gradients)


class Lowered:
    """A network under a recipe; see the head of this file and `apply`.

    Attributes:
        model, optimizer, recipe: what was given.
        defer_gradients: gradients stand in ``grad`` unrounded, for one who adds up those of several workers first and
            then calls `round_gradient`.
        is_whole: whether all parameters have their numbers.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, recipe: Recipe, *, seed: int = 0,
        store_gradients: bool = False, share: float = 0.0,
    ) -> None:  # fmt: skip
        _check(model, optimizer)
        self.model, self.optimizer, self.recipe = model, optimizer, recipe
        self._store_gradients = store_gradients
        self.defer_gradients = False
        self.sites = Sites(recipe, seed)
        self.sites.share = share
        leaves = {id(module) for module in model.modules() if is_leaf(module)}
        recipe.check_layers(layer_names(model))
        self.stored = store(model, recipe, share)
        self._by_id = {id(entry.parameter): entry for entry in self.stored}
        self._by_name = {entry.name: entry for entry in self.stored}
        self.is_whole = self._is_stepping = False
        self._held: list[tuple[Tensor, Tensor]] = []
        self._handed: list[Tensor] = []
        self._opened: list[Piece] = []
        self._frame: FrameType | None = None
        self._depth = 0
        self.forward = Forward(model, self.sites, self._by_id, leaves)
        self.forward.take_rows = self._take_rows if store_gradients else None
        self.pieces = [Piece(entry.parameter, [entry], strides=entry.codes.stride()) for entry in self.stored]
        self._updates = Updates(self.sites)
        self._handles: list[Any] = list(States(self).hook(model, optimizer))
        trained: list[tuple[str, Any]] = [(x.name, x.parameter) for x in self.stored if x.parameter.requires_grad]
        self._handles += [
            parameter.register_post_accumulate_grad_hook(partial(_take_gradient, weakref.ref(self), name))
            for name, parameter in trained
        ]
        if optimizer is not None:
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
        self.encode()

    # What a person sees

    @property
    def counters(self) -> dict[Place, Counters]:
        """What rounding did, by role and layer, since `reset_counters`."""
        return self.sites.tally.counters

    def rows(self) -> list[dict[str, Any]]:
        """The counters as plain mappings, with formats, and of updates how many were not rounded to zero."""
        return self.sites.tally.rows()

    def reset_counters(self) -> None:
        """Begins to count anew."""
        self.sites.tally.clear()

    @property
    def step(self) -> int:
        """Updates so far; random bits depend on it."""
        return self.sites.step

    @property
    def share(self) -> float:
        """The share of the run that is done, by which the recipe's late formats begin; set it once an epoch."""
        return self.sites.share

    @share.setter
    def share(self, value: float) -> None:
        before = [entry.at for entry in self.recipe.late if self.sites.share >= entry.at]
        after = [entry.at for entry in self.recipe.late if value >= entry.at]
        if before == after:
            self.sites.share = value
            return
        with self.weights():
            self.sites.share = value
            for entry in self.stored:
                set_formats(entry, self.recipe, value)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The parameters can be read and written as float32 meanwhile; what is written is rounded at the end."""
        if self.is_whole:
            yield
            return
        self.show()
        try:
            yield
        finally:
            self.encode()

    def remove(self) -> None:
        """The network and the optimizer are as before, with the weights of now in float32."""
        self.show()
        self.forward.remove()
        for handle in self._handles:
            handle.remove()

    # Weights

    def show(self) -> None:
        """All parameters have their numbers."""
        for piece in self.pieces:
            piece.show()
        self.is_whole = self.forward.shows = True

    def encode(self) -> None:
        """All parameters become codes, to nearest, and are hidden."""
        for piece in self.pieces:
            for entry in piece.members:
                rounder(entry.number, "nearest", coded=True)(
                    entry.view(piece.parameter.data), entry.codes, (0, 0, 0, 0), 0, None
                )
                entry.version += 1
            piece.hide()
        self.is_whole = self.forward.shows = False

    # Gradients

    def take_gradient(self, name: str, parameter: Tensor) -> None:
        """A weight's gradient has come: it is rounded, with what there was before, or kept as codes."""
        entry, gradient = self._by_name[name], parameter.grad
        if self.defer_gradients or gradient is None:
            return
        if not self._store_gradients or self.is_whole:
            self.round_gradient(entry, gradient)
            return
        if entry.gradient is not None:
            gradient = entry.wide_gradient(torch.empty_like(entry.codes, dtype=torch.float32)).add_(gradient)
        else:
            dtype = rounder(entry.gradient_number, self.recipe.rounding, coded=True).dtype
            entry.gradient = torch.empty_like(entry.codes, dtype=dtype)
        self._round_gradient(entry, gradient, entry.gradient, coded=True)
        parameter.grad = None

    def _take_rows(self, entry: Stored, rows: slice, gradient: Tensor) -> None:
        """The gradient of a range of a large weight has come: kept as codes.  The first rows come last."""
        is_first = entry.gradient is None
        if is_first:
            entry.gradient = torch.zeros_like(entry.codes, dtype=DTYPES[entry.gradient_number.storage])
        part = entry.part(rows)
        assert part.gradient is not None
        if not is_first:
            gradient = part.wide_gradient(torch.empty_like(part.codes, dtype=torch.float32)).add_(gradient)
        self._round_gradient(part, gradient, part.gradient, coded=True)
        entry.rounded += rows.start == 0

    def round_gradient(self, entry: Stored, gradient: Tensor) -> None:
        """Rounds a weight's gradient in place, once it is summed over all workers."""
        if entry.gradient_number != FLOAT32:
            self._round_gradient(entry, gradient, gradient, coded=False)

    def _round_gradient(self, entry: Stored, gradient: Tensor, out: Tensor, *, coded: bool) -> None:
        number, sites = entry.gradient_number, self.sites
        words = sites.words("gradients", entry.name, entry.rounded)
        entry.rounded += 1
        counters = None if number == FLOAT32 else sites.tally.of("gradients", entry.name, number)
        rounder(number, self.recipe.rounding, coded=coded)(gradient, out, words, entry.first, counters)

    def forget_gradients(self) -> None:
        """Gradients that are kept as codes are no more; ``optimizer.zero_grad()`` does not reach them."""
        for entry in self.stored:
            entry.gradient = None

    # Updates

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_stepping:
            return
        if self._frame is not None and _is_running(self._frame):
            self._depth += 1  # a step that calls the step of the class above
            return
        if self._frame is not None:  # the last step was broken off
            self._close(updated=False)
            if self.is_whole:
                self.encode()
        if self.is_whole:
            raise ConfigError("an optimizer's step cannot be taken within Lowered.weights()")
        given = (args[1:] if args and args[0] is optimizer else args) + tuple(kwargs.values())
        self._forget_step()
        self._frame = sys._getframe(1)
        stepped = self._stepped(optimizer)
        if any(value is not None for value in given) or not type(optimizer).__module__.startswith("torch.optim"):
            self.show()
            for entry in self.stored:
                self._hand_over_gradient(entry)
            return
        self._is_stepping = True
        try:
            self._step_apart(optimizer, stepped)
        finally:
            self._is_stepping = False

    def _step_apart(self, optimizer: torch.optim.Optimizer, pieces: list[Piece]) -> None:
        """Steps pieces in turn; the last, and what is not the network's, the optimizer's own step then finds."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        held = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter, _ in held:
            parameter.grad = None
        own = {id(piece.parameter) for piece in pieces}
        gradients = {id(parameter): gradient for parameter, gradient in held}
        stepped = [piece for piece in pieces if _has_gradient(piece, gradients)]
        sliced = [piece for piece in stepped if type(optimizer) in ELEMENTWISE and piece.parameter.numel() > LARGE]
        for piece in sliced:
            for entry in piece.members:
                self._updates.step_sliced(optimizer, entry, gradients.get(id(piece.parameter)), largest=LARGE)
        for batch in _batches([piece for piece in stepped if piece not in sliced]):
            self._step_open(optimizer)
            self._open(batch, gradients)
        for parameter, gradient in held:
            if id(parameter) in own:
                self._held.append((parameter, gradient))
            else:
                parameter.grad = gradient

    def _stepped(self, optimizer: torch.optim.Optimizer) -> list[Piece]:
        """Pieces that the optimizer steps."""
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [piece for piece in self.pieces if id(piece.parameter) in known]

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_stepping:
            return
        if self._depth:
            self._depth -= 1
            return
        if self.is_whole:
            stepped = {id(piece) for piece in self._stepped(optimizer)}
            for piece in self.pieces:
                if id(piece) in stepped:
                    self._updates.take(piece)
                piece.hide()
            self.is_whole = self.forward.shows = False
        self._close(updated=True)
        for parameter in self._handed:
            parameter.grad = None
        for parameter, gradient in self._held:
            parameter.grad = gradient
        self._forget_step()
        self.sites.tell(step=self.sites.step + 1)

    def _forget_step(self) -> None:
        self._frame, self._depth = None, 0
        self._held.clear()
        self._handed.clear()

    def _open(self, pieces: list[Piece], gradients: dict[int, Tensor]) -> None:
        """The optimizer finds these pieces and their gradients."""
        self._opened = pieces
        for piece in pieces:
            piece.parameter.grad = gradients.get(id(piece.parameter))
            piece.show()
            for entry in piece.members:
                self._hand_over_gradient(entry)

    def _step_open(self, optimizer: torch.optim.Optimizer) -> None:
        if self._opened:
            type(optimizer).step(optimizer)
            self._close(updated=True)

    def _close(self, *, updated: bool) -> None:
        """The pieces that were open have been stepped, or the step was broken off."""
        for piece in self._opened:
            piece.parameter.grad = None
            if updated:
                self._updates.take(piece)
            piece.hide()
        self._opened = []

    def _hand_over_gradient(self, entry: Stored) -> None:
        """The gradient stands in ``grad`` for the optimizer."""
        if entry.gradient is not None:
            self._handed.append(entry.parameter)
            entry.parameter.grad = entry.wide_gradient(torch.empty_like(entry.codes, dtype=torch.float32))
            entry.gradient = None


def _take_gradient(lowered: weakref.ref[Lowered], name: str, parameter: Tensor) -> None:
    """A hook that does not keep the network alive: Python cannot see a cycle that goes through a tensor's hooks."""
    found = lowered()
    if found is not None:
        found.take_gradient(name, parameter)


def _is_running(frame: FrameType) -> bool:
    """Whether this call is one of those that wait for the present one."""
    caller: FrameType | None = sys._getframe()
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None


def layer_names(model: nn.Module) -> list[str]:
    """Layers and parameters that a recipe may name."""
    return [name for name, _ in model.named_modules() if name] + [name for name, _ in model.named_parameters()]


def _batches(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are stepped together."""
    batch: list[Piece] = []
    numbers = 0
    for piece in pieces:
        batch.append(piece)
        numbers += piece.parameter.numel()
        if numbers >= PIECE:
            yield batch
            batch, numbers = [], 0
    if batch:
        yield batch


def _has_gradient(piece: Piece, gradients: dict[int, Tensor]) -> bool:
    return id(piece.parameter) in gradients or any(entry.gradient is not None for entry in piece.members)


def _check(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a recipe needs a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ConfigError(f"a recipe goes onto the network within {type(model).__name__}: apply(model.module, ...)")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ConfigError("a recipe needs a network in Python, got one of torch.jit.script or torch.jit.trace")
    if any(isinstance(module.__dict__.get("forward"), Wrapped) for module in model.modules()):
        raise ConfigError("the network is under a recipe already; remove() that one first")
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"a recipe needs a torch.optim.Optimizer, got {type(optimizer).__name__}")
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ConfigError("the optimizer has none of the network's parameters")
