"""`OptimLP`: any optimizer of PyTorch's, with gradients, weights and momenta rounded around its step.

The name, the arguments and the order are QPyTorch's (Zhang et al., "QPyTorch: A Low-Precision Arithmetic Simulation
Framework", 2019): gradients are scaled and rounded, the accumulators take the place of the weights, the optimizer makes
its step, and then accumulators, weights and momenta are rounded.

All numbers are written where they are: no tensor of the model or of the optimizer is replaced, so views of them (a
flat buffer of all weights, say) stay views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from windlass.errors import ConfigError

Quantization = Callable[[Tensor], Tensor]
Closure = Callable[[], Any]

ACCUMULATOR = "weight_acc"  # the key of a parameter's accumulator in a state_dict
_COUNTERS = ("step", "mu_product", "eta", "mu")  # one number a parameter, in the shape of a parameter that is a number


class OptimLP(Optimizer):
    """An optimizer in low precision around another one, whose groups, state and defaults it shares.

    Without a closure, a step rounds the gradients that are there.  With one, the closure is evaluated at the weights of
    the model, which are rounded ones from the first step on; where the optimizer evaluates it again at other weights,
    as L-BFGS does, these are rounded too while the closure runs.  After every evaluation the gradients are rounded.

    An accumulator comes into being in a parameter's first step, with the value that the weights have then.  It is part
    of `state_dict()`, in the parameter's own entry.

    Attributes:
        optim: the optimizer that makes the step.
        weight_acc: the accumulators by parameter; empty without `acc_quant`.
    """

    def __init__(
        self, optim: Optimizer, weight_quant: Quantization | None = None, grad_scaling: float = 1.0,
        grad_quant: Quantization | None = None, momentum_quant: Quantization | None = None,
        acc_quant: Quantization | None = None,
    ) -> None:  # fmt: skip
        """Wraps `optim`; each function takes a tensor and returns its rounded numbers, None rounds nothing.

        Args:
            optim: any `torch.optim.Optimizer`.
            weight_quant: rounds weights after a step.
            grad_scaling: multiplies gradients before they are rounded.
            grad_quant: rounds gradients before a step.
            momentum_quant: rounds, after a step, every floating-point tensor of the optimizer's state that has the
                shape of its parameter: momenta, averages of squares (of AMSGrad too), averages of weights.
            acc_quant: rounds the accumulators, copies of the weights in a wider format, which updates are added to.

        Raises:
            ConfigError: one of them is of another kind, or gradients are scaled but not rounded.
        """
        functions = {
            "weight_quant": weight_quant, "grad_quant": grad_quant, "momentum_quant": momentum_quant,
            "acc_quant": acc_quant,
        }  # fmt: skip
        _check(optim, grad_scaling, functions)
        self.optim = optim
        self.grad_scaling = float(grad_scaling)
        self.weight_quant, self.grad_quant = weight_quant, grad_quant
        self.momentum_quant, self.acc_quant = momentum_quant, acc_quant
        self.weight_acc: dict[Tensor, Tensor] = {}
        self._begin()

    def _begin(self) -> None:
        # Optimizer.__init__ would make groups and a state of its own; __setstate__ makes the hooks and nothing else.
        super().__setstate__({})
        self.register_state_dict_post_hook(_with_accumulators)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of `optim`: learning-rate schedules may take either of the two."""
        return self.optim.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of `optim`."""
        return self.optim.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of `optim`."""
        return self.optim.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters to `optim`."""
        self.optim.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step of `optim` and the rounding around it; returns what `optim` returns, the loss of the closure.

        Raises:
            ConfigError: a function returned something else than a tensor of the shape it was given.
        """
        arguments: tuple[Closure, ...] = ()
        if closure is None:
            self._round_gradients()
        else:
            arguments = (self._evaluations(closure),)
        self._widen()
        try:
            return self.optim.step(*arguments)
        finally:  # after an error too, so that the model's weights are rounded ones
            self._narrow()
            self._round_momenta()

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _round_gradients(self) -> None:
        if self.grad_quant is None:
            return
        for parameter in self._parameters():
            if parameter.grad is not None:
                _round(_gradient(parameter), self.grad_quant, "grad_quant", self.grad_scaling)

    def _evaluations(self, closure: Closure) -> Closure:
        """`closure` for `optim`: first evaluated now, at the model's weights, and then wherever `optim` went."""
        first = [self._evaluate(closure)]
        return lambda: first.pop() if first else self._evaluate_there(closure)

    def _evaluate(self, closure: Closure) -> Any:
        with torch.enable_grad():
            loss = closure()
        self._round_gradients()
        return loss

    def _evaluate_there(self, closure: Closure) -> Any:
        wide = {parameter: parameter.detach().clone() for parameter in self._parameters()}
        try:
            for parameter in wide:
                _round(parameter, self.acc_quant, "acc_quant")
                _round(parameter, self.weight_quant, "weight_quant")
            return self._evaluate(closure)
        finally:
            with torch.no_grad():  # optimizers call closures with gradients enabled
                for parameter, value in wide.items():
                    parameter.copy_(value)

    def _widen(self) -> None:
        for parameter, accumulator in self.weight_acc.items():
            parameter.copy_(accumulator)

    def _narrow(self) -> None:
        for parameter in self._parameters():
            if self.acc_quant is not None:
                _round(parameter, self.acc_quant, "acc_quant")
                self._keep(parameter)
            _round(parameter, self.weight_quant, "weight_quant")

    def _keep(self, parameter: Tensor) -> None:
        if parameter in self.weight_acc:
            self.weight_acc[parameter].copy_(parameter)
        else:
            self.weight_acc[parameter] = parameter.detach().clone()

    def _round_momenta(self) -> None:
        for parameter in self._parameters():
            if parameter.grad is None:
                continue
            for name, value in self.state.get(parameter, {}).items():
                if _is_momentum(name, value, parameter):
                    _round(value, self.momentum_quant, "momentum_quant")

    def __getstate__(self) -> dict[str, Any]:
        names = (
            "optim", "grad_scaling", "weight_quant", "grad_quant", "momentum_quant", "acc_quant", "weight_acc",
        )  # fmt: skip
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle everything; of `load_state_dict`, which ends here, groups and state."""
        if "optim" in state:
            self.__dict__.update(state)
            self._begin()
            return
        own, accumulators = _parted(state["state"])
        if accumulators and self.acc_quant is None:
            raise ConfigError("the state has accumulators, but this OptimLP has no acc_quant")
        self.optim.__setstate__({**state, "state": own})
        self.weight_acc = accumulators

    def __repr__(self) -> str:
        return f"OptimLP({self.optim!r})"


def _with_accumulators(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The hook of `state_dict`: adds each accumulator to a copy of its parameter's entry."""
    assert isinstance(optimizer, OptimLP)
    state = dict(state_dict["state"])
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, optimizer._parameters(), strict=True):
        if parameter in optimizer.weight_acc:
            state[number] = {**state.get(number, {}), ACCUMULATOR: optimizer.weight_acc[parameter]}
    return {**state_dict, "state": state}


def _parted(state: Any) -> tuple[Any, dict[Tensor, Tensor]]:
    """The optimizer's own state and the accumulators.

    An entry that was only there for an accumulator goes: Adam takes an empty one as its sign to begin, another not.
    """
    own, accumulators = state.copy(), {}
    for parameter, entry in state.items():
        if isinstance(parameter, Tensor) and ACCUMULATOR in entry:
            accumulators[parameter] = entry[ACCUMULATOR].detach().clone()
            own[parameter] = {key: value for key, value in entry.items() if key != ACCUMULATOR}
            if not own[parameter]:
                del own[parameter]
    return own, accumulators


@torch.no_grad()
def _round(x: Tensor, quantization: Quantization | None, name: str, scale: float = 1.0) -> None:
    """Rounds `x`, times `scale`, where it is."""
    if quantization is None:
        return
    y = quantization(x.detach() if scale == 1.0 else x.detach() * scale)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        what = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ConfigError(f"{name} returns a tensor of the shape it is given, {tuple(x.shape)}; got {what}")
    x.copy_(y)


def _gradient(parameter: Tensor) -> Tensor:
    """The numbers of a gradient: of a sparse one those that it stores, each place once."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()
    return parameter.grad.values()


def _is_momentum(name: str, value: object, parameter: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.shape == parameter.shape
        and name not in _COUNTERS
    )


def _check(optim: object, grad_scaling: object, functions: dict[str, Quantization | None]) -> None:
    if not isinstance(optim, Optimizer) or isinstance(optim, OptimLP):
        raise ConfigError(f"OptimLP wraps an optimizer of torch.optim, got {_what(optim)}")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ConfigError(f"{name} is a function of a tensor, as `quantizer` makes, or None, got {function!r}")
    number = isinstance(grad_scaling, int | float) and not isinstance(grad_scaling, bool)
    if not number or not (grad_scaling > 0 and math.isfinite(grad_scaling)):  # type: ignore[operator, arg-type]
        raise ConfigError(f"grad_scaling is a number above 0, got {grad_scaling!r}")
    if grad_scaling != 1 and functions["grad_quant"] is None:
        raise ConfigError(f"grad_scaling {grad_scaling} needs a grad_quant: gradients are scaled as they are rounded")


def _what(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__
