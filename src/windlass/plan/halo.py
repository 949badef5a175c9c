"""The fringe of rows or columns that a tile of a layer's output needs of its neighbours' tiles of the input.

Coates et al. 2013 ("Deep learning with COTS HPC systems", section 4.2): neurons lie on workers by their place in
the image, and each worker fetches what the receptive fields of its neurons reach into its neighbours' tiles.  The
fetch lists depend on lengths alone and are computed once.

Rows are meant along ``height``, columns along ``width``; a *row* below is either.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TypeAlias

from windlass.plan.layout import bounds

Range: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Halo:
    """What a sliding window along one dim reads.

    Attributes:
        dim: ``height`` or ``width``.
        axis: the mesh's axis along which it is cut, input and output each evenly.
        kernel, stride, padding, dilation: of the window along this dim.
        pad: what lies beyond the image: ``zero`` or, for a maximum, ``lowest``.
    """

    dim: str
    axis: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    pad: str = "zero"

    def window(self, start: int, stop: int) -> Range:
        """The input rows that output rows start to stop read, before and beyond the image included.

        >>> Halo("height", 0, kernel=3, stride=1, padding=1, dilation=1).window(0, 4)
        (-1, 5)
        """
        first = start * self.stride - self.padding
        if stop <= start:
            return first, first
        return first, (stop - 1) * self.stride - self.padding + self.dilation * (self.kernel - 1) + 1

    def reads(self, in_length: int, out_length: int, parts: int, part: int) -> Range:
        """The rows of the image that this part's outputs read; the rest of `window` is padding."""
        cuts = bounds(out_length, parts)
        first, last = self.window(cuts[part], cuts[part + 1])
        low = min(max(first, 0), in_length)
        return low, max(low, min(last, in_length))

    def fetches(self, in_length: int, out_length: int, parts: int) -> tuple[tuple[Range, ...], ...]:
        """Which rows each part reads of each part's rows: ``fetches[reader][owner]``, its own included.

        Rows count from the image's first; nothing to fetch is an empty range.
        """
        owned = tuple(itertools.pairwise(bounds(in_length, parts)))
        read = [self.reads(in_length, out_length, parts, part) for part in range(parts)]
        return tuple(tuple(_common(rows, own) for own in owned) for rows in read)

    def crosses(self, in_length: int, out_length: int, parts: int) -> bool:
        """Whether any part reads rows of another."""
        fetches = self.fetches(in_length, out_length, parts)
        return any(
            start < stop
            for reader, ranges in enumerate(fetches)
            for owner, (start, stop) in enumerate(ranges)
            if owner != reader
        )


def _common(rows: Range, own: Range) -> Range:
    low = min(max(rows[0], own[0]), own[1])
    return low, max(low, min(rows[1], own[1]))
