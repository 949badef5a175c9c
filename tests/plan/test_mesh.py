"""Ranks on axes."""

from __future__ import annotations

import itertools

import pytest

from windlass.errors import ConfigError
from windlass.plan.mesh import Mesh

TEXTS = ["data:1", "data:4", "node:2,device:3", "node:2,row:2,column:3"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_kept(text: str) -> None:
    mesh = Mesh.parse(text)
    assert str(mesh) == text and Mesh.parse(str(mesh)) == mesh


@pytest.mark.parametrize("text", TEXTS)
def test_ranks_are_numbered_row_by_row(text: str) -> None:
    mesh = Mesh.parse(text)
    places = list(itertools.product(*map(range, mesh.shape)))
    assert [mesh.coordinates(rank) for rank in range(mesh.size)] == places
    assert [mesh.rank(place) for place in places] == list(range(mesh.size))


@pytest.mark.parametrize("text", TEXTS)
def test_a_group_differs_along_one_axis_alone(text: str) -> None:
    mesh = Mesh.parse(text)
    for rank, axis in itertools.product(range(mesh.size), range(len(mesh.axes))):
        places = [mesh.coordinates(member) for member in mesh.group(rank, axis)]
        assert [place[axis] for place in places] == list(range(mesh.extent(axis)))
        others = {place[:axis] + place[axis + 1 :] for place in places}
        assert len(others) == 1 and rank in mesh.group(rank, axis)


@pytest.mark.parametrize(
    "text", ["", "data", "data:0", "data:-1", "data:2,data:2", "2:data", "data:2,,model:2", "a:1.5"]
)
def test_what_is_no_mesh_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="mesh"):
        Mesh.parse(text)
