"""A mesh of workers: how many there are along each of its named axes.

Written as one line, the outermost axis first: ``node:2,device:4`` is two nodes of four devices each.  Ranks are
numbered row by row: the last axis is the innermost, so its members have neighbouring ranks and, as the launcher
places ranks, share a host.

This is the tiers' picture of Coates et al. 2013 ("Deep learning with COTS HPC systems", section 4): within a node
the devices cut a layer up, between nodes the batch is cut.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from windlass.errors import ConfigError

AXIS = re.compile(r"([A-Za-z][A-Za-z0-9_-]*):([1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Mesh:
    """Workers in rows and columns.

    Attributes:
        axes: name and extent of each axis, the outermost first.
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        """Refuses axes of one name and axes without workers."""
        if not self.axes or len(set(self.names)) < len(self.axes) or min(self.shape) < 1:
            raise ConfigError(f"a mesh needs axes of different names with one worker or more each, got {self}")

    def __str__(self) -> str:
        return ",".join(f"{name}:{extent}" for name, extent in self.axes)

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """The mesh written as `text`.

        >>> Mesh.parse("node:2,device:4").size
        8
        """
        found = [AXIS.fullmatch(part.strip()) for part in text.split(",")]
        if not all(found):
            raise ConfigError(f"a mesh is written as node:2,device:4, got {text!r}")
        return cls(tuple((match[1], int(match[2])) for match in found if match))

    @property
    def names(self) -> tuple[str, ...]:
        """The axes' names, the outermost first."""
        return tuple(name for name, _ in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes' extents, the outermost first."""
        return tuple(extent for _, extent in self.axes)

    @property
    def size(self) -> int:
        """How many workers there are."""
        return math.prod(self.shape)

    def extent(self, axis: int) -> int:
        """How many workers are along this axis."""
        return self.axes[axis][1]

    def stride(self, axis: int) -> int:
        """The difference of rank between neighbours along this axis."""
        return math.prod(self.shape[axis + 1 :])

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Where a rank stands along each axis.

        >>> Mesh.parse("node:2,device:4").coordinates(6)
        (1, 2)
        """
        return tuple(rank // self.stride(axis) % extent for axis, extent in enumerate(self.shape))

    def rank(self, coordinates: tuple[int, ...]) -> int:
        """Which rank stands there: the inverse of `coordinates`."""
        return sum(place * self.stride(axis) for axis, place in enumerate(coordinates))

    def group(self, rank: int, axis: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` along this axis alone, in order; `rank` is one of them.

        >>> Mesh.parse("node:2,device:4").group(6, 0)
        (2, 6)
        """
        stride = self.stride(axis)
        first = rank - self.coordinates(rank)[axis] * stride
        return tuple(first + place * stride for place in range(self.extent(axis)))
