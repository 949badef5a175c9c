"""Losses, gradients, states and bytes of placed networks beside those of plain ones, on real ranks."""

import pytest
from placement_cases import placements_of
from ranks_of_placements import must_run

pytestmark = pytest.mark.mpi


def expected(num_ranks: int, nets: tuple[str, ...]) -> list[list[str]]:
    return [[net, name] for net in nets for name in placements_of(net, num_ranks)]


SMALL = ("lenet5", "alexnet", "alexnet_dropout", "coates")
DEEP = ("googlenet", "resnet18")


@pytest.mark.parametrize(
    ("num_ranks", "backend", "nets"),
    [
        pytest.param(1, "windlass", (*SMALL, *DEEP), marks=pytest.mark.slow),
        (2, "windlass", (*SMALL, *DEEP)),
        (2, "gloo", ("lenet5", "alexnet")),
        pytest.param(3, "gloo", SMALL, marks=pytest.mark.slow),
        pytest.param(4, "windlass", SMALL, marks=pytest.mark.slow),
        pytest.param(2, "gloo", ("googlenet_heads", "resnet18"), marks=pytest.mark.slow),
        pytest.param(3, "windlass", DEEP, marks=pytest.mark.slow),
        pytest.param(4, "windlass", DEEP, marks=pytest.mark.slow),
        pytest.param(4, "gloo", ("alexnet", "resnet18"), marks=pytest.mark.slow),
    ],
)
def test_every_placement_computes_what_one_worker_does(num_ranks: int, backend: str, nets: tuple[str, ...]) -> None:
    """Three steps: losses and whole gradients of each, the state after them, logits in evaluation, bytes by layer."""
    out = must_run("equivalence", num_ranks, backend, *nets)
    assert [line.split()[:2] for line in out.splitlines()] == expected(num_ranks, nets)
