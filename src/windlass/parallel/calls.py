"""Calls that a network makes, as data: a leaf module or a function, and its arguments with inputs and weights left out.

Functions that PyTorch also has as modules become these, so that a placement knows their settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils import parametrize

from windlass.layers.module import Conv2d
from windlass.networks.recorder import attributes_of, module_kind
from windlass.plan.shapes import same_padding

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of an op's input among the arguments of its call."""

    index: int


@dataclass(frozen=True, slots=True)
class Weight:
    """The place of a parameter or buffer, by its full name."""

    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """How an op is computed.

    Attributes:
        target: a leaf module, or a function.
        args, kwargs: its arguments; `Slot`s stand for inputs and `Weight`s for parameters.
        path: the module's path in the network; "" of a function.
        in_place: whether it writes on its first input.
    """

    target: nn.Module | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    path: str = ""
    in_place: bool = False


def invoke(target: Any, call: Call, inputs: Sequence[Tensor], weights: Callable[[str], Tensor]) -> Any:
    """Calls `target` with the call's arguments, inputs and weights in their places."""
    return target(
        *_filled(call.args, inputs, weights),
        **{key: _filled(value, inputs, weights) for key, value in call.kwargs.items()},
    )


def _filled(value: Any, inputs: Sequence[Tensor], weights: Callable[[str], Tensor]) -> Any:
    if isinstance(value, Slot):
        return inputs[value.index]
    if isinstance(value, Weight):
        return weights(value.name)
    if isinstance(value, tuple | list):
        return type(value)(_filled(item, inputs, weights) for item in value)
    return value


def weights_in(value: Any) -> Iterator[Weight]:
    """The weights in nested arguments."""
    if isinstance(value, Weight):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from weights_in(item)
    elif isinstance(value, dict):
        yield from weights_in(tuple(value.values()))


# --- functions ----------------------------------------------------------------------------------------------

FUNCTION_MODULES: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "max_pool2d": (nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    "avg_pool2d": (
        nn.AvgPool2d,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d, ("output_size",)),
    "local_response_norm": (nn.LocalResponseNorm, ("size", "alpha", "beta", "k")),
    "dropout": (nn.Dropout, ("p", "training", "inplace")),
}
"""Functions that are computed as modules, and the names of their arguments after the first."""


def as_module(spelled: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> Call:
    """The module of a function of `FUNCTION_MODULES`."""
    make, names = FUNCTION_MODULES[spelled]
    given = dict(zip(names, args[1:], strict=False)) | {key: value for key, value in kwargs.items() if key != "input"}
    given.pop("training", None)
    module = make(**given).train(training)
    return Call(module, (Slot(0),), {}, in_place=bool(given.get("inplace", False)))


def reshape_to(rest: Shape) -> Callable[[Tensor], Tensor]:
    """A reshaping of every sample, however many there are."""

    def reshape(tensor: Tensor) -> Tensor:
        return tensor.flatten(1) if len(rest) == 1 else tensor.reshape(tensor.shape[0], *rest)

    return reshape


def method_of(name: str) -> Callable[..., Any]:
    """A tensor's method as a function."""

    def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(tensor, name)(*args, **kwargs)

    return method


# --- modules ------------------------------------------------------------------------------------------------

MORE_ATTRIBUTES = (
    *("ceil_mode", "count_include_pad", "padding_mode", "output_size", "divisor_override"),
    *("maps", "start", "stop", "reconstruct"),
)
PAIRS = ("kernel_size", "stride", "padding", "dilation")
OWN_ATTRIBUTES: dict[str, dict[str, tuple[int, int]]] = {
    "subsampling": {"kernel_size": (2, 2), "stride": (2, 2), "padding": (0, 0)},
    "partialconv2d": {"stride": (1, 1), "padding": (0, 0)},
}
"""What LeNet-5's own layers do not say of themselves."""


def placement_kind(module: nn.Module) -> str:
    """The kind by which `windlass.plan.rules` knows a layer; a module may say it in ``placement_kind``."""
    if parametrize.is_parametrized(module):
        return "parametrized"  # its weights are made of others, which lie whole
    kind = "conv2d" if type(module) is Conv2d else module_kind(module)
    return str(getattr(module, "placement_kind", kind)).lower()


def module_attributes(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """What a placement looks at of a layer; spatial settings as pairs."""
    found: dict[str, object] = dict(attributes_of(module))
    for name in (*PAIRS, "groups", *MORE_ATTRIBUTES):
        value = getattr(module, name, None)
        if isinstance(value, int | str | bool | tuple):
            found[name] = value
    for name in PAIRS:
        if isinstance(found.get(name), int):
            found[name] = (found[name], found[name])
    if isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
        top, _, left, _ = same_padding(
            module.padding, kernel=_pair(module.kernel_size), dilation=_pair(module.dilation)
        )
        found["padding"] = (top, left)
    found |= OWN_ATTRIBUTES.get(placement_kind(module), {})
    if placement_kind(module) == "partialconv2d":
        found["kernel_size"] = tuple(module.get_parameter("weight").shape[-2:])
    return tuple(found.items())


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]
