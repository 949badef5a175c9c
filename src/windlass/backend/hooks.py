"""Communication hooks for DDP: gradients travel in 16 bits and are summed in 32, over any backend's group.

With p ranks whose gradients of a bucket are g_r, a hook returns the mean in two exchanges of 16-bit numbers: every
rank gets its p-th part of all ranks' buckets, sums it in 32 bits, rounds the mean to 16 bits, and the parts are
gathered.  All ranks receive the same bits.  Traffic is half that of float32.

- `bf16_compress_hook`: bf16( (1/p) sum_r bf16(g_r) ), rounded to nearest even: an error of at most 2^-8 of the mean of
  the magnitudes.  PyTorch's own hook of this name needs CUDA, and sums in bfloat16.
- `int16_stochastic_hook`: with s = max over ranks and elements of abs(g_r), L = 32767, and R(x) = floor(x) + 1 with
  probability x - floor(x), else floor(x):  s/L R( (1/p) sum_r R(L g_r / s) ).  R(x) has the mean x, so the result has
  the mean (1/p) sum_r g_r; its error is below 2 s/L always.  (Gupta et al., "Deep Learning with Limited Numerical
  Precision", ICML 2015, section 3, rounds so.)

Use: ``ddp.register_comm_hook(Int16State(seed=1), int16_stochastic_hook)``.
"""

# No `from __future__ import annotations` here: DDP compares a hook's annotations with classes.
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket

from windlass.errors import ConfigError

LEVELS = 32767
"""The largest number of 16 bits with its negative."""

Future = torch.futures.Future[torch.Tensor]
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(kw_only=True)
class Int16State:
    """What `int16_stochastic_hook` needs: its randomness depends on `seed`, `step`, bucket and rank alone.

    Attributes:
        seed: equal seeds give equal bits.
        step: counts backward passes; set it when a run is resumed.
        process_group: None for the default group.
    """

    seed: int = 0
    step: int = 0
    process_group: dist.ProcessGroup | None = None

    def generator(self, *place: int | str) -> torch.Generator:
        """Randomness for a place of this step."""
        key = repr((self.seed, self.step, *place)).encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        return torch.Generator().manual_seed(number >> 1)


def bfloat16_compress_hook(state: dist.ProcessGroup | None, bucket: GradBucket) -> Future:
    """The mean gradient by way of bfloat16; `state` is the process group, None for the default one."""
    group = state if state is not None else dist.group.WORLD
    gradient = _checked(bucket)
    size = dist.get_world_size(group)
    parts = _padded(gradient.to(torch.bfloat16), size)
    inbox = torch.empty_like(parts)

    def finish() -> torch.Tensor:
        mean = inbox.view(size, -1).float().sum(0) / size
        return gradient.copy_(_gather(mean.to(torch.bfloat16), group)[: gradient.numel()])

    return _chain(_swap(inbox, parts, group), finish, group)


bf16_compress_hook = bfloat16_compress_hook
"""The same by PyTorch's name for such hooks; DDP refuses a function whose own name is this, without CUDA."""


def int16_stochastic_hook(state: Int16State, bucket: GradBucket) -> Future:
    """The mean gradient by way of 16-bit integers, rounded at random without bias."""
    group = state.process_group if state.process_group is not None else dist.group.WORLD
    gradient = _checked(bucket)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    random = state.generator("contribution", bucket.index(), rank)
    random_mean = state.generator("mean", bucket.index(), rank)
    state.step += int(bucket.is_last())
    peak = gradient.abs().amax().float().view(1) if gradient.numel() else torch.zeros(1)
    peak.nan_to_num_(nan=float("inf"))  # infinity is the largest for every backend; it makes the mean not a number

    def finish() -> torch.Tensor:
        unit = float(peak) / LEVELS or 1.0
        parts = _padded(round_at_random(gradient / unit, random), size)
        inbox = torch.empty_like(parts)
        _swap(inbox, parts, group).wait()
        mean = inbox.view(size, -1).sum(0, dtype=torch.int32) / size
        return gradient.copy_(_gather(round_at_random(mean, random_mean), group)[: gradient.numel()]).mul_(unit)

    return _chain(dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group, async_op=True), finish, group)


def round_at_random(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """To one of the two nearest integers of 16 bits, so that the mean over many roundings is the value.

    >>> round_at_random(torch.tensor([2.0, -3.0]), torch.Generator().manual_seed(0))
    tensor([ 2, -3], dtype=torch.int16)
    """
    below = values.floor()
    up = torch.rand(values.shape, generator=generator, dtype=values.dtype) < values - below
    return (below + up).clamp_(-LEVELS, LEVELS).to(torch.int16)


def _checked(bucket: GradBucket) -> torch.Tensor:
    gradient: torch.Tensor = bucket.buffer()
    if gradient.dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"a compressing hook needs gradients of float32 or float64, got {gradient.dtype}")
    return gradient


def _padded(values: torch.Tensor, size: int) -> torch.Tensor:
    """Filled up with zeros to `size` equal parts."""
    return torch.nn.functional.pad(values, (0, -values.numel() % size))


def _swap(inbox: torch.Tensor, parts: torch.Tensor, group: Any) -> Any:
    """Part r goes to rank r.  As bytes: not every backend knows 16-bit numbers."""
    return dist.all_to_all_single(inbox.view(torch.uint8), parts.view(torch.uint8), group=group, async_op=True)


def _gather(part: torch.Tensor, group: Any) -> torch.Tensor:
    """Every rank's part, one after the other."""
    whole = part.new_empty(part.numel() * dist.get_world_size(group))
    _all_gather_single(whole.view(torch.uint8), part.view(torch.uint8), group=group)
    return whole


def _chain(work: Any, finish: Callable[[], torch.Tensor], group: Any) -> Future:
    """`finish` after `work`; it asks for further operations.

    In a callback where the backend runs these in the same order on every rank, as ours does; others would run the
    callbacks of two buckets in any order, so there everything is done before the next bucket is looked at.
    """
    if dist.get_backend(group) == "windlass":
        done: Future = work.get_future().then(lambda _: finish())
        return done
    work.wait()
    future: Future = torch.futures.Future()
    future.set_result(finish())
    return future
