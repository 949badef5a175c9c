"""Gradients averaged over all ranks, in buckets, while the backward pass goes on.

Theory of operation.  All trainable parameters of one dtype are moved into one flat tensor, in the reverse of
the order in which the module lists them, which is about the order in which the backward pass finishes them.
A parameter becomes a view of the flat tensor, its gradient is copied into the same place of a second flat
tensor (`own`), the sum over the ranks arrives in a third (`gradient`; with one rank the second serves), and
the optimizer updates the flat tensor as a whole: one pass over memory instead of one per parameter.

The flat gradient is cut into buckets of about `bucket_bytes`.  A hook on each parameter copies its fresh
gradient; when a bucket is full its sum over the ranks starts.  Buckets start in the order of their numbers on
every rank, as MPI demands, whatever order autograd takes.  With one bucket, or without overlap, hooks would
only cost: everything is copied and summed after the backward pass.

Each rank divides its loss by the *global* batch, so the plain sum is the mean over the batch for any shards.

A step may take several backward passes, one for each micro-batch: all but the last are announced (`hold`), their
gradients are added up in `own` (`add`), and hooks and sums begin with the last one.

Where parameters are divided among the ranks, not all are summed over the same ranks: a key says which of several sums
is a parameter's; those of one key share flat tensors, and those of the key ``()`` are one rank's own.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from windlass.engine.allreduce import StartSum
from windlass.engine.mover import Mover
from windlass.engine.world import RankLost, Request, losses_named

ABANDON_S = 5e-3
"""Longest wait for the end of a sum that has lost a rank: MPI's end with an error at once, one over shared memory
never, but it moves only when it is asked."""
ALIGN = 16
"""Every parameter starts at a multiple of so many elements: a cache line of float32."""


@dataclass
class FlatGroup:
    """All trainable parameters of one dtype and key as one tensor, this rank's gradients and their sum as others."""

    parameter: torch.nn.Parameter
    own: torch.Tensor
    gradient: torch.Tensor
    names: list[str]
    parameters: list[torch.nn.Parameter]
    offsets: list[int]
    strides: list[tuple[int, ...]]
    key: Hashable = None

    def view(self, flat: torch.Tensor, index: int) -> torch.Tensor:
        """The part of `flat` that belongs to parameter `index`, in that parameter's shape and strides."""
        return flat[self.offsets[index] :].as_strided(
            self.parameters[index].shape, self.strides[index], flat.storage_offset() + self.offsets[index]
        )

    def split(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and views of every parameter's part of `flat`."""
        for index, name in enumerate(self.names):
            yield name, self.view(flat, index)


class LoneGroup(FlatGroup):
    """One parameter that is not part of a flat tensor."""

    def __init__(self, name: str, parameter: torch.nn.Parameter) -> None:
        none = torch.empty(0)
        super().__init__(parameter, none, none, [name], [parameter], [0], [parameter.stride()])

    def view(self, flat: torch.Tensor, index: int) -> torch.Tensor:
        """The tensor itself."""
        return flat


class Keeper(Protocol):
    """Keeps gradients otherwise than as they are.

    Attributes:
        dtype: of the flat tensors.
    """

    dtype: torch.dtype

    def put(self, name: str, view: torch.Tensor, gradient: torch.Tensor) -> None:
        """`view` becomes what is kept of the gradient of this parameter."""

    def add(self, name: str, view: torch.Tensor, gradient: torch.Tensor) -> None:
        """The same, added to what `view` holds."""


@dataclass
class _Bucket:
    group: FlatGroup
    start: int
    stop: int
    members: list[int] = field(default_factory=list)
    views: dict[int, torch.Tensor] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)
    request: Request | None = None
    total: torch.Tensor | None = None


def flatten_parameters(
    module: torch.nn.Module,
    *,
    alone: bool = True,
    keys: Mapping[str, Hashable] | None = None,
    gradient_dtype: torch.dtype | None = None,
) -> list[FlatGroup]:
    """Moves the module's trainable parameters into one flat tensor per dtype and key; each stays a view of its own."""
    groups: dict[tuple[torch.dtype, Hashable], list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and (keys is None or name in keys):
            key = None if keys is None else keys[name]
            groups.setdefault((parameter.dtype, key), []).append((name, parameter))
    flat = [
        _flatten(named[::-1], dtype, gradient_dtype or dtype, alone or key == (), key)
        for (dtype, key), named in groups.items()
    ]
    return flat if keys is None else flat[::-1]  # of several keys, the one whose gradients come first


def _flatten(
    named: list[tuple[str, torch.nn.Parameter]],
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    alone: bool,
    key: Hashable,
) -> FlatGroup:
    offsets, total = [], 0
    for _, parameter in named:
        offsets.append(total)
        total += -(-parameter.numel() // ALIGN) * ALIGN
    flat = torch.nn.Parameter(torch.zeros(total, dtype=dtype))
    gradient = torch.zeros(total, dtype=gradient_dtype)
    own = gradient if alone else torch.zeros(total, dtype=gradient_dtype)
    if gradient_dtype == dtype:
        flat.grad = gradient
    parameters = [parameter for _, parameter in named]
    for parameter in parameters:
        if not _dense(parameter):
            parameter.data = parameter.data.contiguous()
    strides = [parameter.stride() for parameter in parameters]
    group = FlatGroup(flat, own, gradient, [name for name, _ in named], parameters, offsets, strides, key)
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            view = group.view(flat.data, index)
            view.copy_(parameter)
            parameter.data = view
    return group


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the strides are a permutation of contiguous ones, so that `numel` elements hold the tensor."""
    return torch.empty_like(tensor).stride() == tensor.stride()


class GradientAverager:
    """Averages a module's gradients over all ranks; see the theory of operation above.

    Args:
        module: its trainable parameters are moved into flat tensors.
        start_sum: starts the sum of a buffer over all ranks (`engine.allreduce`).
        bucket_bytes: a bucket is closed when it has this many bytes.
        overlap: whether sums start during the backward pass.
        alone: whether there is but one rank, so that a sum needs no memory of its own.
        keys: which sum is a parameter's, by its name; parameters that it does not name are left alone.  None: all
            go through `start_sum`.
        start_sums: starts the sum of a buffer by key; what is of the key ``()`` is not summed.
        background: a thread moves sums on during the backward pass (`engine.mover`); MPI must allow threads.
        keeper: how gradients are kept in the flat tensors; None: as they are.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        start_sum: StartSum,
        bucket_bytes: int,
        overlap: bool,
        alone: bool,
        keys: Mapping[str, Hashable] | None = None,
        start_sums: Mapping[Hashable, StartSum] | None = None,
        background: bool = False,
        keeper: Keeper | None = None,
    ) -> None:
        dtype = keeper.dtype if keeper is not None else None
        self.groups = flatten_parameters(module, alone=alone, keys=keys, gradient_dtype=dtype)
        self._keeper = keeper
        self._start_sums: dict[Hashable, StartSum] = {None: start_sum, **(start_sums or {})}
        self._buckets = [bucket for group in self.groups for bucket in _cut(group, bucket_bytes)]
        self._next = 0
        self._first_start = 0.0
        self._held = self._added = False
        self._overlap = overlap and len(self._buckets) > 1
        self._mover = Mover(self._move) if background and self._overlap else None
        if self._overlap:
            self._add_hooks()

    @property
    def num_buckets(self) -> int:
        """How many sums a step takes."""
        return len(self._buckets)

    def begin(self) -> None:
        """Call before a step's first backward pass."""
        self._held = self._added = False
        self._next = 0
        self._first_start = 0.0
        for bucket in self._buckets:
            bucket.missing = set(bucket.members)
            bucket.request = bucket.total = None

    def hold(self) -> None:
        """The next backward pass is not the step's last: no sum starts with it."""
        self._held = True

    def add(self) -> None:
        """Call after such a backward pass: its gradients are added to those before."""
        for bucket in self._buckets:
            self._collect(bucket)
            bucket.missing = set(bucket.members)
        self._held, self._added = False, True

    def finish_backward(self) -> bool:
        """Starts what the backward pass has not started; whether all gradients of this rank are finite."""
        for bucket in self._buckets[self._next :]:
            self._collect(bucket)
            self._start(bucket)
        self._next = len(self._buckets)
        totals = [bucket.total for bucket in self._buckets if bucket.total is not None]
        return bool(torch.isfinite(torch.stack(totals)).all()) if totals else True

    def under_way_s(self) -> float:
        """Seconds since the step's first sum was started: what was hidden behind the backward pass so far."""
        return time.perf_counter() - self._first_start if self._first_start else 0.0

    def wait(self) -> None:
        """Returns when every flat gradient holds the sum over all ranks."""
        if self._mover is not None:
            self._mover.end()
        for bucket in self._buckets:
            if bucket.request is not None:
                bucket.request.wait()

    def use(self, start_sum: StartSum) -> None:
        """From now on sums go this way: the ranks have changed."""
        self._start_sums[None] = start_sum

    def abandon(self) -> None:
        """Gives up the sums under way; returns when nothing is written into their buffers any more."""
        if self._mover is not None:
            self._mover.end()
        deadline = time.monotonic() + ABANDON_S
        for bucket in self._buckets:
            with suppress(RankLost), losses_named("an allreduce"):
                while bucket.request is not None and not bucket.request.test() and time.monotonic() < deadline:
                    time.sleep(0)
            bucket.request = None
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None

    def _add_hooks(self) -> None:
        for bucket in self._buckets:
            for index in bucket.members:
                hook = self._hook(bucket, index, bucket.views[index])
                bucket.group.parameters[index].register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _hook(self, bucket: _Bucket, index: int, view: torch.Tensor):  # type: ignore[no-untyped-def]
        def collect(parameter: torch.Tensor) -> None:
            if self._held:
                return
            gradient = parameter.grad
            assert gradient is not None
            self._keep(bucket.group.names[index], view, gradient)
            parameter.grad = None
            bucket.missing.discard(index)
            while self._next < len(self._buckets) and not self._buckets[self._next].missing:
                self._start(self._buckets[self._next])
                self._next += 1
            if self._mover is None:
                self._move()
            elif self._next:
                self._mover.begin()

        return collect

    def _keep(self, name: str, view: torch.Tensor, gradient: torch.Tensor) -> None:
        if self._keeper is not None:
            (self._keeper.add if self._added else self._keeper.put)(name, view, gradient)
        elif self._added:
            view.add_(gradient)
        else:
            view.copy_(gradient)

    def _move(self) -> None:
        """Open MPI moves messages only when it is called."""
        for bucket in self._buckets[: self._next]:
            if bucket.request is not None:
                bucket.request.test()

    def _collect(self, bucket: _Bucket) -> None:
        """Takes the gradients that no hook has taken; a parameter that the loss did not reach counts zero."""
        views, gradients = [], []
        for index in sorted(bucket.missing):
            parameter = bucket.group.parameters[index]
            view = bucket.views[index]
            if parameter.grad is None:
                if not self._added:
                    view.zero_()
                continue
            if self._keeper is not None:
                self._keep(bucket.group.names[index], view, parameter.grad)
            else:
                views.append(view)
                gradients.append(parameter.grad)
            parameter.grad = None
        if views and self._added:
            torch._foreach_add_(views, gradients)
        elif views:
            torch._foreach_copy_(views, gradients)
        bucket.missing.clear()

    def _start(self, bucket: _Bucket) -> None:
        own = bucket.group.own[bucket.start : bucket.stop]
        # One NaN or infinity makes the sum NaN or infinite; of all such tests this is the cheapest by far.
        bucket.total = own.sum(dtype=torch.float32 if own.dtype.itemsize < 4 else None).float()
        if bucket.group.key == ():
            return
        gradient = bucket.group.gradient[bucket.start : bucket.stop]
        self._first_start = self._first_start or time.perf_counter()
        with self._mover.lock if self._mover is not None else nullcontext():
            bucket.request = self._start_sums[bucket.group.key](_array(own), _array(gradient))


def _array(x: torch.Tensor) -> NDArray[Any]:
    """A tensor's memory as NumPy's; bfloat16, which NumPy does not have, as int16."""
    found: NDArray[Any] = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    return found


def _cut(group: FlatGroup, bucket_bytes: int) -> list[_Bucket]:
    """Cuts a flat gradient into buckets of whole parameters, each of at least `bucket_bytes` but the last."""
    buckets: list[_Bucket] = []
    start, members = 0, []
    ends = [*group.offsets[1:], group.parameter.numel()]
    for index, end in enumerate(ends):
        members.append(index)
        if (end - start) * group.own.element_size() >= bucket_bytes or index == len(ends) - 1:
            views = {member: group.view(group.own, member) for member in members}
            buckets.append(_Bucket(group, start, end, members, views))
            start, members = end, []
    return buckets
