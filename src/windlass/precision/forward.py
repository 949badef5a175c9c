"""A forward pass under a recipe: weights widened where they are used, outputs rounded, saved tensors packed.

Every module's ``forward`` is wrapped, which says which layer runs; a *layer* is a module without children, or a
function that is called outside such modules (a sum of two branches).  A torch-function mode sees every function's
arguments: a hidden parameter among them is replaced by its numbers in float32, which live until the layer is done.  A
layer's output is rounded once, when it is done, and the error that comes back to it once, when all that used the output
have added theirs.

The first module that is called switches all this on, and off again when it returns or raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from windlass.errors import ConfigError
from windlass.plan.number import FLOAT32, NumberFormat
from windlass.precision.exact import EXACT_LAYERS
from windlass.precision.given import Given, tensors_in
from windlass.precision.kept import Kept
from windlass.precision.kinds import Kind, kind_of
from windlass.precision.rows import TakeRows, linear_by_rows
from windlass.precision.sites import Site, Sites
from windlass.precision.slices import LARGE
from windlass.precision.stored import Stored

ANY = FLOAT32
"""Known of zeros: they are in every format."""
REFUSED = (torch.float64, torch.float16, torch.bfloat16)


class _Rounded(torch.autograd.Function):
    """A new tensor that is a layer's output rounded; its error is rounded on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, site: Site) -> Tensor:
        ctx.site = site
        out = torch.empty_like(x)
        site.round_output(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.site.rounded_error(gradients[0]), None


class Wrapped:
    """A module's ``forward`` while the module is under a recipe; it cannot be copied."""

    __slots__ = ("forward", "module", "name", "run")

    def __init__(self, forward: Forward, module: nn.Module, name: str) -> None:
        self.forward, self.module, self.name, self.run = forward, module, name, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module."""
        return self.forward.call(self, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            "a network under a recipe can be neither copied nor pickled: save its state_dict(), or remove() the recipe"
        )


class Forward(TorchFunctionMode):
    """What is on while a network runs; see the head of this file.

    Args:
        model: the network.
        sites: where its numbers are rounded.
        stored: its parameters' codes, by the id of the parameter.
        leaves: ids of the modules that are one layer.

    Attributes:
        shows: whether parameters have their numbers, and need not be widened.
        on_widen: is told of every parameter that is widened, and where to.
        on_round: is told of every output of a layer and what it became.
        take_rows: gets the gradient of a large layer range by range; None: it is made at once.
    """

    def __init__(self, model: nn.Module, sites: Sites, stored: dict[int, Stored], leaves: set[int]) -> None:
        super().__init__()
        self.sites, self.kept = sites, Kept(sites.recipe.activations)
        self.shows = False
        self._stored, self._leaves = stored, leaves
        self._buffers = [module._buffers for module in model.modules() if module._buffers]
        self.on_widen: Callable[[Stored, Tensor], None] | None = None
        self.on_round: Callable[[Tensor, Tensor], None] | None = None
        self.take_rows: TakeRows | None = None
        self._calls: list[Wrapped] = []
        self._layer: nn.Module | None = None
        self._open: dict[int, Tensor] = {}
        self._keeps = False
        self._wrapped = [Wrapped(self, module, name) for name, module in model.named_modules()]
        self._before = [module.__dict__.get("forward") for module in model.modules()]
        for wrapped in self._wrapped:
            wrapped.module.__dict__["forward"] = wrapped

    def remove(self) -> None:
        """The network runs as before."""
        for wrapped, before in zip(self._wrapped, self._before, strict=True):
            if before is None:
                del wrapped.module.__dict__["forward"]
            else:
                wrapped.module.__dict__["forward"] = before

    # Modules

    def call(self, wrapped: Wrapped, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a module; the first that is called runs with all this switched on."""
        if self._calls:
            return self._inner(wrapped, args, kwargs)
        self._begin(wrapped.module, [*args, *kwargs.values()])
        try:
            with self:
                if not torch.is_grad_enabled():
                    return self._inner(wrapped, args, kwargs)
                with saved_tensors_hooks(self.kept.pack, self.kept.unpack):
                    return self._inner(wrapped, args, kwargs)
        finally:
            self._calls.clear()
            self._layer = None
            self._open.clear()
            self.kept.settle()

    def _inner(self, wrapped: Wrapped, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, calls = wrapped.module, self._calls
        calls.append(wrapped)
        try:
            if self._layer is not None or id(module) not in self._leaves:
                return wrapped.run(*args, **kwargs)
            self._layer = module
            with torch._C.DisableTorchFunction():
                given = Given(tensors_in(args))
            output = wrapped.run(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                return self._finished(wrapped, given, output)
        finally:
            calls.pop()
            if self._layer is module:
                self._layer = None
                self._open.clear()

    def _begin(self, module: nn.Module, values: list[Any]) -> None:
        if torch._C._current_graph_task_id() != -1:
            raise ConfigError(RECOMPUTED)
        tensors = tensors_in(values)
        for x in tensors:
            if x.dtype in REFUSED or x.is_complex():
                raise ConfigError(f"a network under a recipe takes float32, got an input of {x.dtype}")
        self._keeps = torch.is_grad_enabled() and self.sites.recipe.activations != FLOAT32
        if self._keeps:
            for x in tensors:
                self.kept.know(x, stays=True)
            for buffers in self._buffers:
                for buffer in buffers.values():
                    if buffer is not None:
                        self.kept.know(buffer, stays=True)
        samples = next((x.shape[0] for x in tensors if x.dim()), 1)
        self.sites.begin_forward(training=module.training, samples=samples)

    def _finished(self, wrapped: Wrapped, given: Given, output: Any) -> Any:
        if not isinstance(wrapped.module, EXACT_LAYERS):
            given.see_writes()
            output = self._rounded(output, wrapped.name or type(wrapped.module).__name__, given)
        self.kept.settle()
        return output

    # Functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func` with numbers in the place of hidden parameters; outside of layers it is one itself."""
        kind = kind_of(func)
        kwargs = kwargs or {}
        if kind.name == "linear" and self.take_rows is not None and self._is_large(args):
            return self._linear(*args, **kwargs)
        if kind.reads:
            for x in args:
                if id(x) in self._stored or type(x) is list or type(x) is tuple:
                    args = self._shown_among(kind, args)
                    break
            if kwargs:
                kwargs = self._shown_named(kwargs)
        if kind.is_layer and self._layer is None:
            return self._function(kind, func, args, kwargs)
        if kind.is_layer and not kind.pooled:
            return func(*args, **kwargs)
        if kind.pooled and args:
            return self._pooled(kind, func, args, kwargs)
        number = self._selected(kind, args, kwargs) if kind.is_exact else None
        out = func(*args, **kwargs)
        if kind.is_exact:
            self._carry_over(number, out)
        elif kind.zeros and self._keeps and isinstance(out, Tensor):
            self.kept.know(out, ANY)
        return out

    def _is_large(self, args: Any) -> bool:
        """Whether these are arguments of a layer with more weights than should be in float32 at once."""
        stored = self._stored.get(id(args[1])) if len(args) > 1 and self._layer is not None else None
        return stored is not None and stored.codes.numel() > LARGE and not self.shows

    def _linear(self, x: Tensor, weight: nn.Parameter, bias: Any = None) -> Tensor:
        """A layer of many weights."""

        def know(wide: Tensor, part: Stored) -> None:
            if self.on_widen is not None:
                self.on_widen(part, wide)
            self.kept.know(wide, part.number, weight=part)

        assert self.take_rows is not None
        return linear_by_rows(
            x, weight, self._shown(bias), stored=self._stored[id(weight)], take=self.take_rows, know=know
        )

    def _function(self, kind: Kind, func: Any, args: Any, kwargs: Any) -> Any:
        """A function that is a layer."""
        given = Given(tensors_in(args))
        out = func(*args, **kwargs)
        if kind.writes:
            given.written, given.tensors = given.tensors[:1], given.tensors[1:]
        self._open.clear()
        path = self._calls[-1].name if self._calls else ""
        out = self._rounded(out, f"{path}.{kind.name}" if path else kind.name, given)
        self.kept.settle()
        return out

    def _pooled(self, kind: Kind, func: Any, args: Any, kwargs: Any) -> Any:
        """A pooling, whose indices are small."""
        number = self._selected(kind, args, kwargs)
        shape = args[0].shape[-kind.pooled :]
        self.kept.plane = shape.numel()
        try:
            out = func(*args, **kwargs)
        finally:
            self.kept.plane = 0
        self._carry_over(number, out)
        return out

    def _shown_among(self, kind: Kind, args: Any) -> list[Any]:
        """Arguments with numbers in the place of hidden parameters."""
        if kind.writes and id(args[0]) in self._stored:
            self._refuse_write(self._stored[id(args[0])])
        return [self._shown(x) for x in args]

    def _shown_named(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if id(kwargs.get("out")) in self._stored:
            self._refuse_write(self._stored[id(kwargs["out"])])
        return {key: self._shown(x) for key, x in kwargs.items()}

    def _refuse_write(self, stored: Stored) -> NoReturn:
        raise ConfigError(
            f"{stored.name} is written inside the network; under a recipe weights are written in Lowered.weights()"
        )

    def _shown(self, value: Any) -> Any:
        stored = self._stored.get(id(value))
        if stored is not None:
            return self._wide(value, stored)
        if type(value) in (list, tuple) and value:
            return type(value)([self._shown(part) for part in value])
        return value

    def _wide(self, parameter: nn.Parameter, stored: Stored) -> Tensor:
        """The parameter's numbers; within a layer the same tensor every time."""
        found = self._open.get(id(parameter))
        if found is None or (torch.is_grad_enabled() and found.requires_grad != parameter.requires_grad):
            wide = parameter.detach().clone() if self.shows else stored.wide()
            found = self._open[id(parameter)] = self._linked(parameter, wide)
            if self.on_widen is not None:
                self.on_widen(stored, found)
            if self.shows:
                self.kept.know(found, stays=True)
            else:
                self.kept.know(found, stored.number, weight=stored)
        return found

    @staticmethod
    def _linked(parameter: nn.Parameter, wide: Tensor) -> Tensor:
        """A tensor of these numbers whose gradient goes to the parameter."""
        if not (parameter.requires_grad and torch.is_grad_enabled()):
            return wide
        link = parameter.view_as(parameter)
        link.data = wide
        return link

    # Results

    def _selected(self, kind: Kind, args: Any, kwargs: dict[str, Any]) -> NumberFormat | None:
        """The one format of all numbers that a function selects from."""
        if not self._keeps or (kind.fills and any(_is_number(x) for x in (*args, *kwargs.values()))):
            return None
        numbers = {self.kept.number_of(x) for x in tensors_in([*args, *kwargs.values()]) if x.dtype is torch.float32}
        numbers.discard(ANY)
        return numbers.pop() if len(numbers) == 1 else None

    def _carry_over(self, number: NumberFormat | None, out: Any) -> None:
        """What is selected from numbers of one format has that format."""
        if number is not None:
            for x in tensors_in((out,)):
                if x.dtype is torch.float32 and self.kept.number_of(x) != number:
                    self.kept.know(x, number)
        if self._layer is None:
            self.kept.settle()

    def _rounded(self, output: Any, name: str, given: Given) -> Any:
        """A layer's output, with all floating tensors in it rounded that it was not given."""
        if not isinstance(output, Tensor):
            return self._each_rounded(output, name, given)
        if not output.is_floating_point():
            return output
        site = self.sites.site(name)
        if site.is_plain or any(output is x for x in given.tensors):
            return output
        if output.dtype is not torch.float32:
            raise ConfigError(f"layer {name}: a network under a recipe computes in float32, got {output.dtype}")
        rounded = self._round(output, site, given)
        if self.on_round is not None:
            self.on_round(output, rounded)
        if self._keeps:
            self.kept.know(rounded, site.number)
        return rounded

    def _each_rounded(self, output: Any, name: str, given: Given) -> Any:
        """The same for what a layer gives instead of a tensor."""
        if isinstance(output, tuple | list):
            parts = [self._rounded(part, name, given) for part in output]
            return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
        if isinstance(output, dict):
            return {key: self._rounded(part, name, given) for key, part in output.items()}
        return output

    def _round(self, output: Tensor, site: Site, given: Given) -> Tensor:
        if output.grad_fn is not None and torch.is_grad_enabled():
            if output.dim() < 2 or output._is_view() or given.shares(output):
                made: Tensor = _Rounded.apply(output, site)  # type: ignore[no-untyped-call]
                return made
            site.round_output(output, output)
            if site.rounds_error:
                output.register_hook(site.rounded_error)  # type: ignore[no-untyped-call]
            return output
        rounded = output if any(output is x for x in given.written) else torch.empty_like(output, requires_grad=False)
        site.round_output(output, rounded)
        return rounded


RECOMPUTED = (
    "a network under a recipe cannot run again within a backward pass: leave torch.utils.checkpoint away, "
    "activations are kept in 16 bits as it is"
)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 0
