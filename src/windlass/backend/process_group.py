"""What ``torch.distributed`` calls on a group, translated into steps of an `Exchange`.

C++ (DDP, functional collectives) reaches the methods through their names in ``c10d::PyProcessGroup``; PyTorch 2.13
renamed several of them, and both names stand here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mpi4py import MPI

from windlass.backend import exchange
from windlass.backend.exchange import Steps
from windlass.backend.group import Group
from windlass.backend.progress import Operation
from windlass.backend.tensors import check_dense, flat, join, put_back, row_counts, same_dtype, sizes, split
from windlass.backend.work import Work
from windlass.errors import ConfigError

Tensors = list[torch.Tensor]

OPERATIONS = {
    "SUM": "sum",
    "AVG": "mean",
    "PRODUCT": "product",
    "MIN": "min",
    "MAX": "max",
    "BAND": "and",
    "BOR": "or",
    "BXOR": "xor",
}
"""PyTorch's names of reductions, and those of `datatypes.FOLDS`."""


def operation_name(opts: Any) -> str:
    """The name of the reduction in a call's options; PyTorch hands over an object, or its kind alone."""
    kind = str(getattr(opts.reduceOp, "op", opts.reduceOp)).rsplit(".", 1)[-1]
    if kind not in OPERATIONS:
        raise ConfigError(f'the backend "windlass" has no reduction {kind}; there are: {", ".join(OPERATIONS)}')
    return OPERATIONS[kind]


class WindlassGroup(Group):
    """The collective operations and messages of a group; each returns a `Work`."""

    # --- reductions -----------------------------------------------------------------------------------------

    def allreduce(self, tensors: Tensors, opts: Any = None) -> Work:
        """Reduces each tensor over all ranks, in place."""
        opts = opts if opts is not None else _options("AllreduceOptions")
        return self._allreduce("allreduce", tensors, opts)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Work:
        """The same in one exchange."""
        opts = opts if opts is not None else _options("AllreduceCoalescedOptions")
        return self._allreduce("allreduce_coalesced", tensors, opts)

    def _allreduce(self, name: str, tensors: Tensors, opts: Any) -> Work:
        check_dense(tensors)
        op = operation_name(opts)

        def steps() -> Steps:
            if len(tensors) > 1 and same_dtype(tensors):
                elements = join(tensors)
                yield from self._exchange.start_allreduce(elements, op)
                split(elements, tensors)
            else:
                yield from in_place(tensors, lambda elements: self._exchange.start_allreduce(elements, op))

        return self._run(name, steps(), opts, tensors)

    def reduce(self, tensors: Tensors, opts: Any = None) -> Work:
        """Reduces onto one rank."""
        opts = opts if opts is not None else _options("ReduceOptions")
        check_dense(tensors)
        op, root = operation_name(opts), opts.rootRank
        steps = in_place(tensors, lambda elements: self._exchange.reduce(elements, op, root))
        return self._run("reduce", steps, opts, tensors)

    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any = None) -> Work:
        """Reduces lists of tensors; each rank keeps the one at its number."""
        opts = opts if opts is not None else _options("ReduceScatterOptions")
        check_dense([*outputs, *(tensor for tensors in inputs for tensor in tensors)])
        op = operation_name(opts)

        def steps() -> Steps:
            for output, tensors in zip(outputs, inputs, strict=True):
                elements = output.new_empty(output.numel())
                yield from self._exchange.reduce_scatter(elements, join(tensors), sizes(tensors), op)
                split(elements, [output])

        return self._run("reduce_scatter", steps(), opts, outputs)

    def reduce_scatter_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Work:
        """Reduces a tensor; each rank keeps an equal part."""
        return self._reduce_scatter("reduce_scatter_single", [output], [tensor], opts)

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        """The same for several tensors."""
        return self._reduce_scatter("reduce_scatter_single_coalesced", outputs, inputs, opts)

    def _reduce_scatter(self, name: str, outputs: Tensors, inputs: Tensors, opts: Any) -> Work:
        opts = opts if opts is not None else _options("ReduceScatterOptions")
        check_dense([*outputs, *inputs])
        self._check_sizes(name, outputs, inputs)
        op = operation_name(opts)

        def steps() -> Steps:
            for output, tensor in zip(outputs, inputs, strict=True):
                elements, counts = flat(output), [output.numel()] * self._size
                yield from self._exchange.reduce_scatter(elements, flat(tensor), counts, op)
                put_back(output, elements)

        return self._run(name, steps(), opts, outputs)

    # --- movements ------------------------------------------------------------------------------------------

    def broadcast(self, tensors: Tensors, opts: Any = None) -> Work:
        """Copies one rank's tensors to all."""
        opts = opts if opts is not None else _options("BroadcastOptions")
        check_dense(tensors)
        root = opts.rootRank
        steps = in_place(tensors, lambda elements: self._exchange.broadcast(elements, root))
        return self._run("broadcast", steps, opts, tensors)

    def allgather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> Work:
        """Every rank's tensor into every rank's list; they may differ in length."""
        opts = opts if opts is not None else _options("AllgatherOptions")
        check_dense([*inputs, *(tensor for tensors in outputs for tensor in tensors)])
        for tensors, tensor in zip(outputs, inputs, strict=True):
            self._check_list("allgather", tensors, tensor)

        def steps() -> Steps:
            for tensors, tensor in zip(outputs, inputs, strict=True):
                elements = tensor.new_empty(sum(sizes(tensors)))
                yield from self._exchange.allgather(elements, flat(tensor), sizes(tensors))
                split(elements, tensors)

        return self._run("allgather", steps(), opts, outputs)

    def allgather_coalesced(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> Work:
        """The same with a list for every rank: ``outputs[r][i]`` is tensor i of rank r."""
        by_input = [list(tensors) for tensors in zip(*outputs, strict=True)]
        return self.allgather(by_input, inputs, opts)

    def all_gather_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Work:
        """Every rank's tensor, one after the other, into one tensor."""
        return self._allgather("all_gather_single", [output], [tensor], opts)

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        """The same for several tensors."""
        return self._allgather("all_gather_single_coalesced", outputs, inputs, opts)

    def _allgather(self, name: str, outputs: Tensors, inputs: Tensors, opts: Any) -> Work:
        opts = opts if opts is not None else _options("AllgatherOptions")
        check_dense([*outputs, *inputs])
        self._check_sizes(name, inputs, outputs)

        def steps() -> Steps:
            for output, tensor in zip(outputs, inputs, strict=True):
                elements, counts = flat(output), [tensor.numel()] * self._size
                yield from self._exchange.allgather(elements, flat(tensor), counts)
                put_back(output, elements)

        return self._run(name, steps(), opts, outputs)

    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> Work:
        """Every rank's tensor into one rank's list."""
        opts = opts if opts is not None else _options("GatherOptions")
        check_dense([*inputs, *(tensor for tensors in outputs for tensor in tensors)])
        root, tensors = opts.rootRank, outputs[0] if outputs else []

        def steps() -> Steps:
            parts = [flat(tensor) for tensor in tensors]
            yield from self._exchange.gather(flat(inputs[0]), parts, root)
            for tensor, part in zip(tensors, parts, strict=True):
                put_back(tensor, part)

        return self._run("gather", steps(), opts, outputs, self._missing if root == self._rank else None)

    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any = None) -> Work:
        """One rank's list to all, each rank the tensor at its number."""
        opts = opts if opts is not None else _options("ScatterOptions")
        check_dense([*outputs, *(tensor for tensors in inputs for tensor in tensors)])
        root, tensors = opts.rootRank, inputs[0] if inputs else []

        def steps() -> Steps:
            elements = flat(outputs[0])
            yield from self._exchange.scatter(elements, [flat(tensor) for tensor in tensors], root)
            put_back(outputs[0], elements)

        return self._run("scatter", steps(), opts, outputs, (lambda: {root}) if root != self._rank else None)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_splits: list[int] | None = None,
        input_splits: list[int] | None = None,
        opts: Any = None,
    ) -> Work:
        """Parts of the first dimension, each to the rank at its number."""
        opts = opts if opts is not None else _options("AllToAllOptions")
        check_dense([output, tensor])
        receive = row_counts(output, output_splits or [], self._size, what="output")
        send = row_counts(tensor, input_splits or [], self._size, what="input")

        def steps() -> Steps:
            elements = flat(output)
            yield from self._exchange.all_to_all(elements, flat(tensor), receive, send)
            put_back(output, elements)

        return self._run("all_to_all_single", steps(), opts, [output])

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        """A list of tensors, each to the rank at its number."""
        opts = opts if opts is not None else _options("AllToAllOptions")
        check_dense([*outputs, *inputs])

        def steps() -> Steps:
            elements = outputs[0].new_empty(sum(sizes(outputs)))
            yield from self._exchange.all_to_all(elements, join(inputs), sizes(outputs), sizes(inputs))
            split(elements, outputs)

        return self._run("alltoall", steps(), opts, outputs)

    def barrier(self, opts: Any = None) -> Work:
        """Ends when all ranks have come; after the timeout, an error names those that have not."""
        opts = opts if opts is not None else _options("BarrierOptions")
        return self._run("barrier", self._exchange.barrier(), opts, [torch.empty(0)])

    # The names before PyTorch 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # --- messages between two ranks -------------------------------------------------------------------------

    def send(self, tensors: Tensors, to: int, tag: int = 0) -> Work:
        """Sends a tensor to one rank."""
        steps = exchange.send(self._messages, self._message(tensors), to, tag)
        return self._post(f"send to {self._members.name(to)}", lambda _: steps, tensors, lambda: {to})

    def recv(self, tensors: Tensors, source: int, tag: int = 0) -> Work:
        """Receives a tensor from one rank."""
        name = f"receive from {self._members.name(source)}"
        return self._post(name, self._receive(tensors, source, tag), tensors, lambda: {source})

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Work:
        """Receives a tensor from whoever sends one; the work knows from whom."""
        others = set(range(self._size)) - {self._rank}
        steps = self._receive(tensors, MPI.ANY_SOURCE, tag)
        return self._post("receive from any rank", steps, tensors, lambda: others)

    def _message(self, tensors: Tensors) -> torch.Tensor:
        check_dense(tensors)
        if len(tensors) != 1:
            raise ConfigError(f"a message is one tensor, got {len(tensors)}")
        return flat(tensors[0])

    def _receive(self, tensors: Tensors, source: int, tag: int) -> Callable[[list[Operation]], Steps]:
        elements = self._message(tensors)

        def steps(operation: list[Operation]) -> Steps:
            status = MPI.Status()
            yield from exchange.receive(self._messages, elements, source, tag, status)
            operation[0].source = status.Get_source()
            put_back(tensors[0], elements)

        return steps

    def _post(
        self, name: str, steps: Callable[[list[Operation]], Steps], tensors: Tensors, missing: Callable[[], set[int]]
    ) -> Work:
        self._check_open()
        itself: list[Operation] = []
        operation = Operation(name, steps(itself), timeout_s=self._timeout_s, missing=missing)
        itself.append(operation)
        self._progress.post(operation)
        return Work(operation, self._progress, tensors)

    # --- checks ---------------------------------------------------------------------------------------------

    def _missing(self) -> set[int]:
        return self._exchange.missing

    def _check_list(self, name: str, tensors: Tensors, tensor: torch.Tensor) -> None:
        if len(tensors) != self._size:
            raise ConfigError(f"{name}: needs a list of {self._size} tensors, got {len(tensors)}")
        if tensors[self._rank].numel() != tensor.numel():
            raise ConfigError(
                f"{name}: this rank's tensor has {tensor.numel()} elements, its place in the list "
                f"{tensors[self._rank].numel()}"
            )

    def _check_sizes(self, name: str, small: Tensors, large: Tensors) -> None:
        for part, whole in zip(small, large, strict=True):
            if part.numel() * self._size != whole.numel() or part.dtype != whole.dtype:
                raise ConfigError(
                    f"{name}: {self._size} parts of {part.numel()} x {part.dtype} do not make the whole of "
                    f"{whole.numel()} x {whole.dtype}"
                )


def in_place(tensors: Tensors, run: Callable[[torch.Tensor], Steps]) -> Steps:
    """Runs an exchange on each tensor's elements, and stores the result."""
    for tensor in tensors:
        elements = flat(tensor)
        yield from run(elements)
        put_back(tensor, elements)


def _options(kind: str) -> Any:
    """The options of a call that gives none."""
    return getattr(torch._C._distributed_c10d, kind)()
