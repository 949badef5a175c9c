"""Dataclasses from mappings that people write: every key known, every value of its type, or one clear error."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from windlass.errors import ConfigError, unknown

T = TypeVar("T")


def build_config(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Makes the dataclass `cls` from a mapping, strictly: every key known, every value of its type."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments = {}
    for key, value in mapping.items():
        if key not in names:
            raise ConfigError(f"{unknown('configuration key', where + str(key), [where + n for n in names])}")
        arguments[key] = _convert(value, hints[key], where + key)
    return cls(**arguments)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type, or ConfigError; YAML reads ``1e-3`` as a text, so floats accept texts."""
    origin = get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(value, get_args(hint), where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: needs keys of its own ({where}.KEY=VALUE), got {value!r}")
        return build_config(hint, value, where + ".")
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise ConfigError(f"{where}: needs a list, got {value!r}")
        return tuple(_convert(part.strip() if isinstance(part, str) else part, str, where) for part in parts if part)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: needs a mapping, got {value!r}")
        return {str(key): part for key, part in value.items()}
    return _convert_scalar(value, hint, where)


def _convert_union(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in hints:
        return None
    return _convert(value, next(hint for hint in hints if hint is not type(None)), where)


def _convert_scalar(value: Any, hint: Any, where: str) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{where}: needs {names[hint]}, got {value!r}")
