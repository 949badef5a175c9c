"""A simulated network changes when a sum is there, never what it is."""

from __future__ import annotations

import numpy as np
import pytest

from windlass.engine.collective_local import run_local
from windlass.engine.collective_simulated import run_simulated
from windlass.errors import ConfigError
from windlass.plan.collective import make_schedule
from windlass.plan.linkcost import Profile, constant_cost
from windlass.plan.topology import parse_topology

NEAR, FAR = (
    Profile(host=link, network=link)
    for link in (
        constant_cost(latency_ns=1_000, bits_per_s=8_000_000_000),
        constant_cost(latency_ns=50_000, bits_per_s=80_000_000),
    )
)


def buffers(size: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal(1000).astype(np.float32) for _ in range(size)]


@pytest.mark.parametrize("name", ["ring", "recursive-doubling", "rabenseifner", "direct"])
def test_the_bits_are_the_definitions_on_every_network(name: str) -> None:
    schedule, given = make_schedule("allreduce", name, 6), buffers(6)
    wanted = run_local(schedule, given).values
    near, far = (run_simulated(schedule, given, profile=profile) for profile in (NEAR, FAR))
    for got in (near, far):
        assert [values.tobytes() for values in got.values] == [values.tobytes() for values in wanted]
    assert 0 < near.seconds < far.seconds


def test_seconds_are_those_of_the_formula() -> None:
    """Two ranks on a ring: two messages of 2,000 bytes each way, one after the other; a byte takes a nanosecond."""
    result = run_simulated(make_schedule("allreduce", "ring", 2), buffers(2), profile=NEAR)
    assert result.seconds == pytest.approx(2 * (1_000 + 2_000) * 1e-9, rel=1e-12)


def test_shared_links_take_longer() -> None:
    schedule, given = make_schedule("allreduce", "direct", 4), buffers(4)
    free = run_simulated(schedule, given, profile=FAR)
    shared = run_simulated(schedule, given, profile=FAR, topology=parse_topology("switch:2x2"))
    assert shared.seconds > free.seconds
    with pytest.raises(ConfigError, match="ranks"):
        run_simulated(schedule, given, profile=FAR, topology=parse_topology("switch:3x2"))
