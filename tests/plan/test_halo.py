"""Fringes: each part fetches the rows that its windows read, and the windows give what the whole image gives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from windlass.plan.halo import Halo
from windlass.plan.layout import bounds

GEOMETRIES = [
    (3, 1, 1, 1), (5, 1, 2, 1), (1, 1, 0, 1), (2, 2, 0, 1), (3, 2, 1, 1), (11, 4, 2, 1), (1, 2, 0, 1), (3, 1, 2, 2),
    (2, 3, 0, 1),
]  # fmt: skip
"""Kernel, stride, padding, dilation."""
CASES = [
    (geometry, length, parts)
    for geometry, length, parts in itertools.product(GEOMETRIES, (1, 2, 5, 13, 16), (1, 2, 3, 4))
    if length + 2 * geometry[2] > geometry[3] * (geometry[0] - 1)
]


@pytest.mark.parametrize(("geometry", "length", "parts"), CASES)
def test_parts_give_what_the_whole_gives(geometry: tuple[int, int, int, int], length: int, parts: int) -> None:
    kernel, stride, padding, dilation = geometry
    halo = Halo("height", 0, *geometry)
    image, weight = np.arange(1.0, length + 1), np.arange(1.0, kernel + 1)
    reach = dilation * (kernel - 1) + 1

    def windows(padded: np.ndarray, count: int) -> np.ndarray:
        return np.array([padded[at * stride : at * stride + reach : dilation] @ weight for at in range(count)])

    out_length = (length + 2 * padding - reach) // stride + 1
    whole = windows(np.pad(image, padding), out_length)
    owned = bounds(length, parts)
    fetches = halo.fetches(length, out_length, parts)
    for part, (start, stop) in enumerate(itertools.pairwise(bounds(out_length, parts))):
        for owner, (first, last) in enumerate(fetches[part]):
            assert owned[owner] <= first <= last <= owned[owner + 1]
        rows = np.concatenate([image[first:last] for first, last in fetches[part]])
        low, high = halo.reads(length, out_length, parts, part)
        np.testing.assert_array_equal(rows, image[low:high])
        first, last = halo.window(start, stop)
        before, after = (low - first, last - high) if stop > start else (0, 0)
        np.testing.assert_array_equal(windows(np.pad(rows, (before, after)), stop - start), whole[start:stop])


def test_neighbours_need_not_be_next_to_each_other() -> None:
    """Thin tiles: a window of 5 over tiles of one row reaches two tiles each way."""
    halo = Halo("height", 0, 5, 1, 2, 1)
    assert halo.fetches(4, 4, 4)[0] == ((0, 1), (1, 2), (2, 3), (3, 3))
    assert halo.fetches(4, 4, 4)[3] == ((1, 1), (1, 2), (2, 3), (3, 4))
