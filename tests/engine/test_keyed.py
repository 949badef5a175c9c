"""Which workers a sum over some axes of a mesh is for; whole runs under placements test the sums themselves."""

from __future__ import annotations

import itertools

import pytest

from windlass.engine.keyed import KeyedSums, _line
from windlass.plan.mesh import Mesh


@pytest.mark.parametrize("text", ["a:1", "a:3", "a:2,b:3", "a:2,b:1,c:2"])
def test_a_line_is_those_that_differ_along_its_axes_alone(text: str) -> None:
    mesh = Mesh.parse(text)
    axes = range(len(mesh.axes))
    for key in itertools.chain.from_iterable(itertools.combinations(axes, size) for size in range(len(axes) + 1)):
        for one, other in itertools.product(range(mesh.size), repeat=2):
            places = zip(mesh.coordinates(one), mesh.coordinates(other), strict=True)
            same = all(a == b for axis, (a, b) in enumerate(places) if axis not in key)
            assert (_line(mesh, one, key) == _line(mesh, other, key)) == same


def test_what_has_no_axes_needs_no_sum() -> None:
    class Alone:
        rank = 0

    sums = KeyedSums(Alone(), Mesh.parse("a:1"), [()], make=lambda world: pytest.fail("nothing is to be made"))  # type: ignore[arg-type]
    assert sums.start_sums == {} and sums.new_bytes() == (0, 0) and sums.describe() == "nothing was summed"
    with pytest.raises(KeyError, match="needs the axes"):
        sums.start(None, None)  # type: ignore[arg-type]
    sums.close()
