"""Run by ``mpiexec`` from test_collectives: every algorithm against the definition, bit by bit, and Python's rules."""

import itertools
import sys
import time
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from windlass.engine.collective_local import narrow, run_local, widen
from windlass.engine.collectives import Collectives
from windlass.errors import ConfigError, LostRankError
from windlass.plan.collective import SCHEDULES
from windlass.plan.pick import ALLREDUCE_NAMES, LIBRARY, ORDERED, SHARED, Pick

LENGTHS = (0, 1, 5, 64, 1000, 4099)
DTYPES = ("float32", "float64", "float16", "bfloat16", "int16", "int32")
OPS = ("sum", "mean", "max", "min", "prod")


def contribution(rank: int, length: int, dtype: str) -> NDArray[Any]:
    """What a rank brings: numbers whose sums must be rounded."""
    random = np.random.default_rng([rank, length])
    if dtype.startswith("int"):
        return random.integers(-9, 9, length).astype(dtype)
    values = random.standard_normal(length) * 10.0 ** random.integers(-2, 3, length)
    return narrow(values.astype(np.float32 if dtype != "float64" else np.float64), dtype)


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.tobytes() == b.tobytes()


def test_every_algorithm_is_the_definition(world: Collectives) -> None:
    for name, dtype, length in itertools.product(ALLREDUCE_NAMES, DTYPES, LENGTHS):
        parts = [contribution(rank, length, dtype) for rank in range(world.size)]
        for op, segment_bytes in ((op, 512 if op == "sum" else 0) for op in OPS):
            pick = Pick(name, pieces=3, segment_bytes=segment_bytes)
            got = np.empty_like(parts[world.rank])
            world.start_allreduce(parts[world.rank], got, dtype=dtype, op=op, pick=pick).wait()
            where = (name, dtype, length, op, world.rank)
            if name == LIBRARY:  # its order of additions is its own
                want = run_local(Pick("ring").schedule(world.size), parts, op=op, dtype=dtype).values[world.rank]
                close = np.allclose(widen(got, dtype), widen(want, dtype), rtol=3e-2 if "16" in dtype else 1e-3, atol=1)
                assert close or dtype.startswith("int"), where
                continue
            want = run_local(pick.schedule(world.size, world.hosts), parts, op=op, dtype=dtype).values[world.rank]
            assert same_bits(got, want), (*where, got[:4], want[:4])
            assert same_bits(parts[world.rank], contribution(world.rank, length, dtype)), "what was sent stays"


def test_in_place_and_blocking(world: Collectives) -> None:
    for name in ALLREDUCE_NAMES:
        buffer = np.full(777, world.rank + 1, dtype=np.int32)
        world.allreduce(buffer, buffer, dtype="int32", pick=Pick(name))
        assert (buffer == world.size * (world.size + 1) // 2).all(), name


def test_the_order_of_ranks_is_one_order(world: Collectives) -> None:
    parts = [contribution(rank, 3001, "float32") for rank in range(world.size)]
    want = parts[0].copy()
    for part in parts[1:]:
        want += part
    for name in ORDERED:
        got = np.empty_like(want)
        world.start_allreduce(parts[world.rank], got, pick=Pick(name, segment_bytes=1000)).wait()
        assert same_bits(got, want), name


def test_prepared_ones_are_the_same(world: Collectives) -> None:
    for dtype, length in itertools.product(DTYPES, (0, 1, 300, 4099)):
        part = contribution(world.rank, length, dtype)
        got = np.empty_like(part)
        parts = [contribution(rank, length, dtype) for rank in range(world.size)]
        for op in ("sum", "mean", "max"):
            reduce = world.prepare_allreduce(part, got, dtype=dtype, op=op, pick=Pick(SHARED))
            want = run_local(Pick(SHARED).schedule(world.size), parts, op=op, dtype=dtype).values[world.rank]
            for _ in range(3):
                got[...] = 0
                reduce()
                assert same_bits(got, want), (dtype, length, op)
    started = world.start_allreduce(part, got, dtype=dtype, pick=Pick(SHARED))
    reduce()  # behind one that is under way
    started.wait()


def test_many_under_way(world: Collectives) -> None:
    picks = [Pick(name) for name in ALLREDUCE_NAMES] * 2
    buffers = [np.full(5000 + number, world.rank + number, dtype=np.float32) for number in range(len(picks))]
    started = [world.start_allreduce(buffer, buffer, pick=pick) for buffer, pick in zip(buffers, picks, strict=True)]
    for operation in reversed(started):
        operation.wait()
        assert operation.test()
    for number, buffer in enumerate(buffers):
        assert (buffer == sum(rank + number for rank in range(world.size))).all()


def test_the_other_collectives(world: Collectives) -> None:
    p, r = world.size, world.rank
    for name in SCHEDULES["reduce_scatter"]:
        send, part = np.arange(p * 10, dtype=np.float32) + r, np.empty(10, dtype=np.float32)
        world.start_reduce_scatter(send, part, algorithm=name).wait()
        assert (part == p * np.arange(r * 10, r * 10 + 10) + p * (p - 1) / 2).all(), name
    for name in SCHEDULES["allgather"]:
        whole = np.empty(7 * p, dtype=np.int64)
        world.start_allgather(np.full(7, r), whole, algorithm=name).wait()
        assert (whole == np.repeat(np.arange(p), 7)).all(), name
    for name, root in itertools.product(SCHEDULES["broadcast"], range(p)):
        buffer = np.arange(11) * (r == root)
        world.start_broadcast(buffer, root=root, algorithm=name).wait()
        assert (buffer == np.arange(11)).all(), name
    for root in range(p):
        numbers = np.full(5, r + 1.0)
        world.start_reduce(numbers, root=root, dtype="float64").wait()
        assert r != root or (numbers == p * (p + 1) / 2).all()
    for name in SCHEDULES["alltoall"]:
        blocks = np.arange(3 * p) + 100 * r
        receive = np.empty_like(blocks)
        world.start_alltoall(blocks, receive, algorithm=name).wait()
        assert (receive.reshape(p, 3) == [np.arange(3 * r, 3 * r + 3) + 100 * q for q in range(p)]).all(), name
    world.barrier()


def test_bytes_are_those_of_the_schedule(world: Collectives) -> None:
    for name in ALLREDUCE_NAMES:
        if name == LIBRARY:
            continue
        before = world.bytes_sent
        buffer = np.ones(1003, dtype=np.float32)
        pick = Pick(name)
        world.start_allreduce(buffer, buffer, pick=pick).wait()
        assert world.bytes_sent - before == pick.bytes_sent(world.rank, buffer.nbytes, 4, world.size, world.hosts), name


def test_refusals(world: Collectives) -> None:
    buffer = np.ones(4, dtype=np.float32)
    for arguments in ({"dtype": "float64"}, {"op": "median"}, {"dtype": "complex64"}):
        try:
            world.start_allreduce(buffer, buffer, **arguments)  # type: ignore[arg-type]
        except ConfigError as error:
            assert next(iter(arguments.values())) in str(error)
        else:
            raise AssertionError(arguments)
    ordered = Collectives(MPI.COMM_WORLD, fixed_order=True)
    try:
        ordered.start_allreduce(buffer, buffer, pick=Pick("ring"))
    except ConfigError as error:
        assert "order of ranks" in str(error)
    else:
        raise AssertionError("ring is not ordered")
    for num_bytes in (4, 1 << 20, 1 << 30):
        assert ordered.choose(num_bytes).algorithm in ORDERED
    ordered.close()


def test_who_does_not_come_is_named(world: Collectives) -> None:
    impatient = Collectives(MPI.COMM_WORLD, timeout_s=0.3)
    if world.size > 1:
        for name in (SHARED, "ring"):
            buffer = np.ones(100, dtype=np.float32)
            if world.rank == world.size - 1:
                time.sleep(1.0)
                continue
            try:
                impatient.start_allreduce(buffer, buffer, pick=Pick(name)).wait()
            except LostRankError as error:
                assert "allreduce" in str(error) and f"rank {world.rank} on " in str(error)
                assert world.size > 2 or f"for rank {world.size - 1} on " in str(error), str(error)
            else:
                raise AssertionError("nobody was missed")
    world.barrier()


def main() -> None:
    world = Collectives(MPI.COMM_WORLD, piece_bytes=4096)  # small pieces: slots are used again
    for name, check in list(globals().items()):
        if name.startswith("test_"):
            check(world)
    if world.rank == 0:
        sys.stdout.write("all passed\n")
        sys.stdout.flush()
    world.barrier()


if __name__ == "__main__":
    main()
