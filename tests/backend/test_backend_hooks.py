"""Rounding at random has no bias, and the same seed gives the same bits."""

import math

import torch

from windlass.backend.hooks import LEVELS, Int16State, round_at_random

NUM = 100_000


def test_rounding_has_the_value_as_its_mean() -> None:
    for value in (0.0, 0.25, -0.25, 7.5, -1234.9, 20000.03):
        rounded = round_at_random(torch.full((NUM,), value, dtype=torch.float64), torch.Generator().manual_seed(1))
        ups = int((rounded == math.floor(value) + 1).sum())
        assert ups + int((rounded == math.floor(value)).sum()) == NUM
        chance = value - math.floor(value)
        # ups is binomial(NUM, chance): five standard deviations are left by chance once in 1.7 million times.
        assert abs(ups - NUM * chance) <= 5 * math.sqrt(NUM * chance * (1 - chance))


def test_whole_numbers_stay() -> None:
    values = torch.arange(-LEVELS, LEVELS + 1, dtype=torch.float32)
    assert torch.equal(round_at_random(values, torch.Generator()).float(), values)


def test_randomness_depends_on_seed_step_and_place_alone() -> None:
    draws = {
        (seed, step, place): torch.rand(4, generator=Int16State(seed=seed, step=step).generator("x", place)).tolist()
        for seed in (0, 1)
        for step in (0, 1)
        for place in (0, 1)
    }
    assert len({tuple(values) for values in draws.values()}) == len(draws)
    assert draws[1, 1, 1] == torch.rand(4, generator=Int16State(seed=1, step=1).generator("x", 1)).tolist()
