from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from windlass.data.order import CHUNK, EpochOrder, combine, mix64, permute, shard, uniforms


def test_permute_is_a_bijection_of_every_small_range() -> None:
    for length in range(1, 301):
        image = permute(np.arange(length), length=length, seed=length, epoch=3)
        assert np.array_equal(np.sort(image), np.arange(length)), length


@pytest.mark.parametrize("length", [2**16 - 1, 2**16, 2**16 + 1, 100_003])
def test_permute_is_a_bijection_of_larger_ranges(length: int) -> None:
    image = permute(np.arange(length), length=length, seed=7, epoch=0)
    assert np.array_equal(np.bincount(image, minlength=length), np.ones(length))


def test_permute_of_a_range_too_big_to_list_has_no_collision_in_a_sample() -> None:
    length = 3 * 10**12
    positions = np.concatenate([np.arange(50_000), length - 1 - np.arange(50_000)])
    image = permute(positions, length=length, seed=1, epoch=1)
    assert image.min() >= 0
    assert image.max() < length
    assert len(np.unique(image)) == len(positions)


def test_permute_needs_no_neighbours() -> None:
    whole = permute(np.arange(1000), length=1000, seed=5, epoch=2)
    for position in (0, 17, 999):
        assert permute(np.array([position]), length=1000, seed=5, epoch=2)[0] == whole[position]
    square = permute(np.arange(1000).reshape(10, 100), length=1000, seed=5, epoch=2)
    assert np.array_equal(square.ravel(), whole)


def test_seed_and_epoch_each_change_the_order() -> None:
    orders = [permute(np.arange(1000), length=1000, seed=s, epoch=e) for s in (0, 1, -1, 2**63) for e in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two independent permutations agree in one place on average; 12 or more has odds below 1e-9.
            assert np.count_nonzero(one == other) < 12


def test_permute_leaves_no_trend() -> None:
    n = 4096
    image = permute(np.arange(n), length=n, seed=3, epoch=0)
    # The correlation of independent orders has deviation 1/sqrt(n - 1) = 0.0156; 5 of them are allowed.
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 5 / np.sqrt(n - 1)
    # Of 64 samples, the 8 eighths of the range each get 8, deviation 2.6; all lie within 5.5 of those.
    counts = np.array([np.bincount(batch // (n // 8), minlength=8) for batch in image.reshape(64, 64)])
    assert counts.max() < 8 + 5.5 * 2.6
    assert counts.std() > 1.5


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_epoch_order_is_the_permutation_whatever_the_pieces(length: int) -> None:
    order = EpochOrder(length, seed=9)
    whole = permute(np.arange(length), length=length, seed=9, epoch=4)
    for size in (1000, CHUNK, 3 * CHUNK):
        pieces = [order.ids(4, start, min(start + size, length)) for start in range(0, length, size)]
        assert np.array_equal(np.concatenate(pieces), whole)
    assert order.ids(4, length, length).size == 0


def test_epoch_order_without_shuffling_counts() -> None:
    order = EpochOrder(CHUNK + 10, seed=9, shuffle=False)
    assert np.array_equal(order.ids(6, CHUNK - 2, CHUNK + 3), np.arange(CHUNK - 2, CHUNK + 3))


def test_epoch_order_is_protected_from_its_readers() -> None:
    ids = EpochOrder(100, seed=1).ids(0, 0, 10)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 3


def test_epoch_order_is_the_same_from_many_threads() -> None:
    order = EpochOrder(5 * CHUNK, seed=2)
    pieces = [(epoch, start) for epoch in range(4) for start in range(0, 5 * CHUNK, 1000)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda at: order.ids(at[0], at[1], min(at[1] + 1000, 5 * CHUNK)), pieces))
    for (epoch, start), ids in zip(pieces, found, strict=True):
        alone = permute(np.arange(start, start + len(ids)), length=5 * CHUNK, seed=2, epoch=epoch)
        assert np.array_equal(ids, alone)


def test_shards_cover_a_batch_in_order_and_differ_by_at_most_one() -> None:
    for count in range(20):
        for world_size in range(1, 9):
            slices = [shard(100, 100 + count, rank=r, world_size=world_size) for r in range(world_size)]
            assert [p for start, stop in slices for p in range(start, stop)] == list(range(100, 100 + count))
            sizes = [stop - start for start, stop in slices]
            assert max(sizes) - min(sizes) <= 1


def test_mix64_is_splitmix64() -> None:
    # The first three outputs of splitmix64 from state 0, as in the reference implementation of Vigna.
    golden = 0x9E3779B97F4A7C15
    outputs = [mix64(golden * k) for k in (1, 2, 3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_combine_minds_the_order_of_its_parts() -> None:
    assert len({combine(1, 2, 3), combine(3, 2, 1), combine(1, 2), combine(1, 2, 0)}) == 4


def test_uniforms_are_uniform_and_depend_on_the_counter_alone() -> None:
    n = 100_000
    u = uniforms(np.arange(n), seed=1, epoch=2, stream=3)
    assert u.min() >= 0.0
    assert u.max() < 1.0
    # Ten bins of 10,000, deviation 95; five of them.
    assert np.abs(np.histogram(u, bins=10, range=(0, 1))[0] - n / 10).max() < 5 * 95
    shuffled = np.random.default_rng(0).permutation(n)
    assert np.array_equal(uniforms(shuffled, seed=1, epoch=2, stream=3), u[shuffled])


def test_uniforms_of_other_seeds_epochs_and_streams_are_unrelated() -> None:
    n = 10_000
    draws = [uniforms(np.arange(n), seed=s, epoch=e, stream=t) for s in (0, 1) for e in (0, 1) for t in (0, 1)]
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlations).max() < 5 / np.sqrt(n)
