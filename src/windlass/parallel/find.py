"""The placement that a person asks for: by name, or in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from windlass.check.placement import check_placement
from windlass.errors import ConfigError
from windlass.plan.levers import PLACEMENT_FILES, check_parallel
from windlass.plan.mesh import Mesh
from windlass.plan.placement import Op, Placement, placement_from_mapping
from windlass.plan.placements import by_name


def find_placement(
    text: str, ops: Sequence[Op], *, workers: int, mesh: Mesh | None = None, outputs: Sequence[str] = ()
) -> Placement:
    """The placement of this name or file, checked.

    Args:
        text: one of `windlass.plan.placements.BUILDERS`, or a YAML file.
        ops: the network, with the whole batch in its shapes.
        workers: how many.
        mesh: of a placement by name; a file has its own.
        outputs: the ops that give the logits.

    Raises:
        ConfigError: it cannot be read, or does not fit.
    """
    placement = named_placement(text, ops, workers=workers, mesh=mesh)
    check_placement(ops, placement, workers=workers, outputs=outputs, where=text)
    return placement


def named_placement(text: str, ops: Sequence[Op], *, workers: int, mesh: Mesh | None = None) -> Placement:
    """The same, not yet checked against the network.

    Raises:
        ConfigError: there is no such name, or the file cannot be read.
    """
    check_parallel(text)
    if not text.endswith(PLACEMENT_FILES):
        return by_name(text, ops, workers, mesh=mesh)
    placement = read_placement(Path(text))
    if mesh not in (None, placement.mesh):
        raise ConfigError(f"--mesh {mesh}: the placement {text} has a mesh of its own, {placement.mesh}")
    return placement


def read_placement(path: Path) -> Placement:
    """The placement in a YAML file.

    Raises:
        ConfigError: it cannot be read or is no placement.
    """
    where = f"placement {path}"
    try:
        mapping = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: is not YAML: {' '.join(str(error).split())}") from None
    return placement_from_mapping(mapping, where=where)
