"""Builds a network by name: a built-in one, or what ``package.module:function`` returns.

Torch is imported only when a network is built, so that this module can be imported for free.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from windlass.errors import ConfigError, unknown
from windlass.networks.catalog import NETWORKS, check_network_name

if TYPE_CHECKING:
    from torch import nn


def build_network(name: str, *, num_classes: int, in_channels: int, image_size: int, **arguments: object) -> nn.Module:
    """A new network with fresh weights, drawn from torch's global generator.

    Args:
        name: a key of `NETWORKS`, or ``package.module:function`` (a function or an ``nn.Module`` class; the
            current directory can be imported from).
        num_classes: number of outputs.
        in_channels: channels of the images.
        image_size: side of the square images.
        arguments: passed on to the network's factory.

    A factory of the user's own gets those of `num_classes`, `in_channels` and `image_size` that it names.

    Raises:
        ConfigError: the network or an argument is unknown, its module cannot be imported, or what comes back
            is no ``nn.Module``.
    """
    check_network_name(name)
    given = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    entry = NETWORKS.get(name)
    if entry is not None:
        if image_size < entry.min_size:
            raise ConfigError(f"{name} needs images of side {entry.min_size} at least, got {image_size}")
        factory = _find(name, entry.factory)
    else:
        _make_current_directory_importable()
        factory = _find(name, name)
        given = _accepted(factory, given)
    _check_arguments(name, factory, arguments)
    return _call(name, factory, {**given, **arguments})


def _make_current_directory_importable() -> None:
    """A console script does not find modules beside the person who typed it; ``python`` does."""
    here = os.getcwd()  # noqa: PTH109 - sys.path holds strings
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def _find(name: str, factory: str) -> Callable[..., object]:
    module_name, _, function_name = factory.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"network {name!r}: importing {module_name} failed: {_one_line(error)}") from error
        raise ConfigError(
            f"network {name!r}: there is no module {error.name!r} (in {os.getcwd()} or installed)"  # noqa: PTH109
        ) from error
    except Exception as error:
        raise ConfigError(f"network {name!r}: importing {module_name} failed: {_one_line(error)}") from error
    found = getattr(module, function_name, None)
    if found is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"network {name!r}: " + unknown(f"function in {module_name}", function_name, public))
    if not callable(found):
        raise ConfigError(f"network {name!r}: {function_name} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def _parameters(factory: Callable[..., object]) -> Mapping[str, inspect.Parameter] | None:
    """The factory's parameters by name; None where Python cannot tell (some builtins)."""
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return None


def _names(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [key for key, parameter in parameters.items() if parameter.kind in by_name]


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def _accepted(factory: Callable[..., object], given: dict[str, int]) -> dict[str, int]:
    parameters = _parameters(factory)
    if parameters is None or _takes_any(parameters):
        return given
    names = _names(parameters)
    return {key: value for key, value in given.items() if key in names}


def _check_arguments(name: str, factory: Callable[..., object], arguments: Mapping[str, object]) -> None:
    parameters = _parameters(factory)
    if parameters is None or _takes_any(parameters):
        return
    names = _names(parameters)
    for key in arguments:
        if key not in names:
            raise ConfigError(f"network {name!r}: " + unknown("argument", key, names))


def _call(name: str, factory: Callable[..., object], arguments: Mapping[str, object]) -> nn.Module:
    from torch import nn

    try:
        network = factory(**arguments)
    except ConfigError:
        raise
    except Exception as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ConfigError(f"network {name!r} cannot be built with {shown}: {_one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"network {name!r} gave a {type(network).__name__}, not a torch.nn.Module")
    return network


def _one_line(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
