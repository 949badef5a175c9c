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
    check_parallel(text)
    if text.endswith(PLACEMENT_FILES):
        if mesh is not None:
            raise ConfigError(f"--mesh {mesh}: the placement {text} has a mesh of its own")
        placement = read_placement(Path(text))
    else:
        placement = by_name(text, ops, workers, mesh=mesh)
    check_placement(ops, placement, workers=workers, outputs=outputs, where=text)
    return placement


def read_placement(path: Path) -> Placement:
    """The placement in a YAML file.

    Raises:
        ConfigError: it cannot be read or is no placement.
    """
    try:
        mapping = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no YAML: {' '.join(str(error).split())}") from None
    return placement_from_mapping(mapping, where=str(path))
