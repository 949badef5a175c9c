"""Every operation of the group against its definition, computed from what all ranks contributed.

Contributions differ by rank and element, so that a wrong source or a wrong place shows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.distributed
from leave import leave

import windlass  # noqa: F401  registers the backend

dist: Any = torch.distributed  # its annotations allow None everywhere
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
COMPLEX = [torch.complex64, torch.complex128]
SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (3, 5), (0,), (4, 4099)]
Op = dist.ReduceOp
# PyTorch 2.13 renamed them.
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def shapes_of(dtype: torch.dtype) -> list[tuple[int, ...]]:
    """All shapes for one dtype of each way through the code, two for the others."""
    return SHAPES if dtype in (torch.float32, torch.bfloat16, torch.bool) else SHAPES[2:4]


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What a rank contributes: small integers, so that sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(100 + rank)
    values = torch.randint(0, 5, shape, generator=generator)
    if dtype.is_complex:
        return torch.complex(values.double(), values.double() - 2 * rank).to(dtype)
    return (values % 2 == rank % 2) if dtype is torch.bool else values.to(dtype)


def parts(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [part(rank, shape, dtype) for rank in range(SIZE)]


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def total(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The sum of what all ranks contribute."""
    return reduce(torch.add, parts(shape, dtype))


REDUCTIONS: list[tuple[str, list[torch.dtype], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = [
    ("SUM", [*FLOATS, *INTEGERS], torch.add),
    ("PRODUCT", [*FLOATS, *INTEGERS], torch.mul),
    ("MAX", [*FLOATS, *INTEGERS, torch.bool], torch.maximum),
    ("MIN", [*FLOATS, *INTEGERS, torch.bool], torch.minimum),
    ("BAND", [*INTEGERS, torch.bool], torch.bitwise_and),
    ("BOR", [*INTEGERS, torch.bool], torch.bitwise_or),
    ("BXOR", [*INTEGERS, torch.bool], torch.bitwise_xor),
    ("SUM", [torch.bool], torch.logical_or),
]


def check_reductions() -> None:
    for name, dtypes, fold in REDUCTIONS:
        op = getattr(Op, name)
        for dtype in dtypes:
            for shape in shapes_of(dtype):
                wanted = reduce(fold, parts(shape, dtype))
                mine = part(RANK, shape, dtype)
                dist.all_reduce(mine, op=op)
                same(mine, wanted)
            root = SIZE - 1
            mine = part(RANK, (6,), dtype)
            dist.reduce(mine, root, op=op)
            same(mine, reduce(fold, parts((6,), dtype)) if root == RANK else part(RANK, (6,), dtype))
            whole = part(RANK, (SIZE * 3, 2), dtype)
            output = torch.empty(3, 2, dtype=dtype)
            reduce_scatter_single(output, whole, op=op)
            same(output, reduce(fold, parts((SIZE * 3, 2), dtype))[RANK * 3 : RANK * 3 + 3])


def check_means() -> None:
    for dtype in FLOATS:
        mine = part(RANK, (9,), dtype)
        dist.all_reduce(mine, op=Op.AVG)
        same(mine, (total((9,), dtype).double() / SIZE).to(dtype))
    whole = part(RANK, (9,), torch.int32)
    dist.all_reduce(whole, op=Op.AVG)
    same(whole, (total((9,), torch.int32) // SIZE).to(torch.int32))
    output = torch.empty(2)
    reduce_scatter_single(output, part(RANK, (2 * SIZE,), torch.float32), op=Op.AVG)
    same(output, total((2 * SIZE,), torch.float32).view(SIZE, 2)[RANK] / SIZE)


def check_complex() -> None:
    for dtype in COMPLEX:
        mine = part(RANK, (5,), dtype)
        dist.all_reduce(mine)
        same(mine, total((5,), dtype))
        lazily = part(RANK, (5,), dtype).conj()
        dist.group.WORLD.allreduce([lazily]).wait()
        same(lazily.resolve_conj(), total((5,), dtype).conj().resolve_conj())


def check_uneven_reduce_scatter() -> None:
    shapes = [(rank + 1,) for rank in range(SIZE)]
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        output = torch.empty(shapes[RANK], dtype=dtype)
        dist.reduce_scatter(output, [part(RANK, shape, dtype) for shape in shapes])
        same(output, total(shapes[RANK], dtype))


def check_movements() -> None:
    for dtype in [*FLOATS, *INTEGERS, *COMPLEX, torch.bool, torch.float8_e4m3fn, torch.uint16]:
        known = dtype if dtype not in (torch.float8_e4m3fn,) else torch.float32
        for shape in shapes_of(dtype):
            all_parts = [p.to(dtype) for p in parts(shape, known)]
            raw = [p.contiguous().view(-1).view(torch.uint8) if p.numel() else p for p in all_parts]
            mine = all_parts[RANK].clone()
            lists = [torch.empty_like(mine) for _ in range(SIZE)]
            dist.all_gather(lists, mine)
            for found, wanted in zip(lists, raw, strict=True):
                assert not found.numel() or bool((found.view(-1).view(torch.uint8) == wanted).all())
            for root in {0, SIZE - 1}:
                buffer = all_parts[RANK].clone()
                dist.broadcast(buffer, root)
                assert not buffer.numel() or bool((buffer.view(-1).view(torch.uint8) == raw[root]).all())


def check_lists() -> None:
    mine = part(RANK, (4,), torch.float32)
    everyone = parts((4,), torch.float32)
    output = torch.empty(SIZE, 4)
    all_gather_single(output, mine)
    same(output, torch.stack(everyone))
    uneven = [torch.empty(rank + 2) for rank in range(SIZE)]
    dist.all_gather(uneven, torch.full((RANK + 2,), float(RANK)))
    for rank, found in enumerate(uneven):
        same(found, torch.full((rank + 2,), float(rank)))
    for root in range(SIZE):
        gathered = [torch.empty(4) for _ in range(SIZE)] if root == RANK else None
        dist.gather(mine, gathered, root)
        for found, wanted in zip(gathered or [], everyone, strict=False):
            same(found, wanted)
        scattered = torch.empty(4)
        dist.scatter(scattered, [p + 10 * root for p in everyone] if root == RANK else None, root)
        same(scattered, mine + 10 * root)


def check_all_to_all() -> None:
    send = [RANK + rank for rank in range(SIZE)]  # rows from this rank to each
    receive = [rank + RANK for rank in range(SIZE)]
    tensor = torch.cat([torch.full((rows, 2), 10.0 * RANK + to) for to, rows in enumerate(send)])
    output = torch.empty(sum(receive), 2)
    dist.all_to_all_single(output, tensor, receive, send)
    same(output, torch.cat([torch.full((rows, 2), 10.0 * source + RANK) for source, rows in enumerate(receive)]))
    even = torch.empty(SIZE, dtype=torch.int64)
    dist.all_to_all_single(even, torch.arange(SIZE) + 100 * RANK)
    same(even, torch.arange(SIZE) * 100 + RANK)
    outputs = [torch.empty(2) for _ in range(SIZE)]
    dist.all_to_all(outputs, [torch.tensor([float(RANK), float(to)]) for to in range(SIZE)])
    same(torch.stack(outputs), torch.tensor([[float(source), float(RANK)] for source in range(SIZE)]))


def check_layouts() -> None:
    """Tensors that are no contiguous memory: transposed, strided, channels last, a parameter that needs a gradient."""
    base = part(RANK, (4, 6), torch.float32)
    transposed, strided = base.clone().t(), base.clone()[:, ::2]
    wanted = total((4, 6), torch.float32)
    dist.all_reduce(transposed)
    dist.all_reduce(strided)
    same(transposed, wanted.t())
    same(strided, wanted[:, ::2])
    image = part(RANK, (2, 3, 4, 5), torch.float32).to(memory_format=torch.channels_last)
    dist.broadcast(image, 0)
    same(image, part(0, (2, 3, 4, 5), torch.float32))
    assert image.is_contiguous(memory_format=torch.channels_last)
    parameter = torch.nn.Parameter(part(RANK, (3, 3), torch.float32).t())
    dist.all_reduce(parameter)
    same(parameter.data, total((3, 3), torch.float32).t())


def check_coalesced() -> None:
    first, second = part(RANK, (3,), torch.float32), part(RANK, (2, 2), torch.float32).t()
    group = dist.group.WORLD
    with dist.distributed_c10d._coalescing_manager():
        dist.all_reduce(first)
        dist.all_reduce(second)
    same(first, total((3,), torch.float32))
    same(second, total((2, 2), torch.float32).t())
    outputs = [torch.empty(SIZE, 3), torch.empty(SIZE, 2)]
    inputs = [part(RANK, (3,), torch.float32), part(RANK, (2,), torch.float32)]
    group.all_gather_single_coalesced(outputs, inputs).wait()
    for output, shape in zip(outputs, [(3,), (2,)], strict=True):
        same(output, torch.stack(parts(shape, torch.float32)))
    small = [torch.empty(1), torch.empty(2)]
    group.reduce_scatter_single_coalesced(
        small, [part(RANK, (SIZE,), torch.float32), part(RANK, (2 * SIZE,), torch.float32)]
    ).wait()
    for output in small:
        count = output.numel()
        same(output, total((SIZE * count,), torch.float32)[RANK * count :][:count])


def check_messages() -> None:
    right, left = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        received = torch.zeros(2, 3, dtype=dtype).t()
        works = [dist.irecv(received, left), dist.isend(part(RANK, (3, 2), dtype), right)]  # a receive first
        for work in works:
            work.wait()
        same(received, part(left, (3, 2), dtype))
    big = torch.full((1 << 18,), float(RANK))
    inbox = torch.empty(1 << 18)
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, big, right), dist.P2POp(dist.irecv, inbox, left)]):
        work.wait()
    same(inbox, torch.full((1 << 18,), float(left)))
    if SIZE > 1 and RANK == 0:
        seen = set()
        for _ in range(SIZE - 1):
            value = torch.empty(1)
            source = dist.recv(value)
            assert value.item() == source
            seen.add(source)
        assert seen == set(range(1, SIZE))
    elif SIZE > 1:
        dist.send(torch.tensor([float(RANK)]), 0)
    if SIZE > 1:  # two messages overtake each other by their tags
        if RANK == 0:
            late, early = torch.empty(1), torch.empty(1)
            dist.recv(late, 1, tag=2)
            dist.recv(early, 1, tag=1)
            assert (early.item(), late.item()) == (1.0, 2.0)
        elif RANK == 1:
            works = [dist.isend(torch.tensor([1.0]), 0, tag=1), dist.isend(torch.tensor([2.0]), 0, tag=2)]
            for work in works:
                work.wait()


def check_objects() -> None:
    gathered: list[object] = [None] * SIZE
    dist.all_gather_object(gathered, {"rank": RANK, "text": "x" * RANK})
    assert gathered == [{"rank": rank, "text": "x" * rank} for rank in range(SIZE)]
    shared = [("from", RANK), RANK] if RANK == 0 else [None, None]
    dist.broadcast_object_list(shared, 0)
    assert shared == [("from", 0), 0]
    collected: list[object] | None = [None] * SIZE if RANK == 0 else None
    dist.gather_object(RANK * "y", collected, 0)
    assert RANK or collected == ["y" * rank for rank in range(SIZE)]
    mine: list[object] = [None]
    dist.scatter_object_list(mine, [{"to": rank} for rank in range(SIZE)] if RANK == 0 else None, 0)
    assert mine == [{"to": RANK}]


def check_asynchronous() -> None:
    """Many operations under way; futures and callbacks; an operation that a callback asks for and waits for."""
    tensors = [torch.full((64,), float(RANK + turn)) for turn in range(20)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for turn, (work, tensor) in reversed(list(enumerate(zip(works, tensors, strict=True)))):
        assert work.wait() and work.is_completed() and work.is_success()
        assert tensor.tolist() == [sum(rank + turn for rank in range(SIZE))] * 64
    order = []

    def then_again(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        order.append("callback")
        again: torch.Tensor = dist.all_reduce(future.value()[0], async_op=True).get_future().wait()[0]
        return again

    first, second = torch.ones(3), torch.ones(3)
    chained = dist.all_reduce(first, async_op=True).get_future().then(then_again)
    other = dist.all_reduce(second, async_op=True)
    assert chained.wait().tolist() == [float(SIZE * SIZE)] * 3 and order == ["callback"]
    other.wait()
    assert second.tolist() == [float(SIZE)] * 3
    done = dist.barrier(async_op=True)
    while not done.is_completed():
        pass


def check_groups() -> None:
    groups = [dist.new_group(list(range(first, SIZE))) for first in range(SIZE)]
    for first, group in enumerate(groups):
        value = torch.tensor([float(RANK)])
        if first <= RANK:
            dist.all_reduce(value, group=group)
            assert value.item() == sum(range(first, SIZE))
            dist.broadcast(value, SIZE - 1, group=group)
    backwards = dist.new_group(list(reversed(range(SIZE))), sort_ranks=False)
    assert dist.get_rank(backwards) == SIZE - 1 - RANK
    gathered = torch.empty(SIZE)
    all_gather_single(gathered, torch.tensor([float(RANK)]), group=backwards)
    assert gathered.tolist() == [float(rank) for rank in reversed(range(SIZE))]
    for group in groups if RANK % 2 else reversed(groups):
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
    beside = dist.new_group(backend="gloo")
    value = torch.ones(2)
    dist.all_reduce(value, group=beside)
    assert value.tolist() == [float(SIZE)] * 2


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]

if __name__ == "__main__":
    dist.init_process_group("windlass")
    RANK, SIZE = dist.get_rank(), dist.get_world_size()
    for check in CHECKS:
        check()
    dist.barrier()
    dist.destroy_process_group()
    leave()
