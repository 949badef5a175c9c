"""A network divided over workers: its ops, executed on one worker along the network's DAG.

The ops run in the order in which the network called them.  Before each, its inputs are moved into the layout that it
needs, once for all ops that need the same; after its last reader a tensor is let go.  In the backward pass autograd
meets the moves in exactly the reverse order on every worker, because it takes nodes by the number of their creation
and no worker leaves one out: so exchanges match without any agreement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from windlass.errors import ConfigError
from windlass.parallel.calls import Call, invoke
from windlass.parallel.connect import nothing
from windlass.parallel.fringe import Fringe, fetch, fringe
from windlass.parallel.local import Builder, buffer_layout, layout_of
from windlass.parallel.masks import Position
from windlass.parallel.moves import Edge, move, part_of, run_steps
from windlass.parallel.trace import Traced
from windlass.parallel.transport import Transport, reduce
from windlass.parallel.whole import ancestors, put_in_order, refuse_names, without_tensors
from windlass.plan.derive import Derived, Parameter, Placed
from windlass.plan.graph import INPUT
from windlass.plan.layout import DIMS, WHOLE, Layout, Split, local_shape, route

Key = tuple[str, str]
"""A moved tensor: the op that made the move, and whose output was moved."""


@dataclass(frozen=True)
class LocalOp:
    """One op on one worker."""

    placed: Placed
    call: Call
    module: nn.Module
    edges: tuple[Edge, ...]
    keys: tuple[Key, ...]
    fringes: tuple[Fringe, ...]

    @property
    def name(self) -> str:
        """The op's name."""
        return self.placed.op.name


class PlacedModule(nn.Module):
    """One worker's part of a network; made by `windlass.parallel.apply`.

    Parameters and buffers have the network's own names and hold this worker's parts.

    Args:
        module: the whole network; nothing of it is kept but its settings.
        traced: its ops.
        derived: how they lie.
        transport: the way to the other workers.

    Attributes:
        derived, transport: as given.
        parameter_layouts: how each parameter lies, by full name.
    """

    def __init__(self, module: nn.Module, traced: Traced, derived: Derived, transport: Transport) -> None:
        super().__init__()
        self.derived, self.transport = derived, transport
        self.parameter_layouts: dict[str, Parameter] = {}
        self._traced = traced
        self._position = Position(batch=traced.input_shape[0])
        self._mesh, self._rank = transport.mesh, transport.rank
        self._tensor_layouts: dict[str, tuple[tuple[int, ...], Layout]] = {}
        self._owners: dict[str, str] = {}
        refuse_names(module, self)
        builder = Builder(transport, self._position)
        shapes = {op.name: op.output_shape for op in traced.ops}
        self._shapes = {INPUT: traced.input_shape, **shapes}
        self._ops = {placed.op.name: self._local(module, builder, placed, n) for n, placed in enumerate(derived.ops)}
        self._ends = {
            end.name: Edge(end.tag, derived.layout_of(end.name), end.moves, end.need, end.back_moves)
            for end in derived.outputs
        }
        put_in_order(self, module)
        self._served = ancestors(traced, traced.outputs[:1])
        for name in ("own_loss", "auxiliary_weight"):
            if hasattr(module, name):
                object.__setattr__(self, name, without_tensors(module, name))
        self.train(module.training)

    # --- building ---

    def _local(self, module: nn.Module, builder: Builder, placed: Placed, number: int) -> LocalOp:
        call = self._traced.calls[placed.op.name]
        for parameter in placed.parameters:
            self._note(module, builder, call, placed, parameter)
        made = builder.build(call, placed, number, self._weight)
        self._register(call.path or placed.op.name, made)
        if isinstance(call.target, nn.Module):
            for name, buffer in call.target.named_buffers():
                layout = buffer_layout(placed, name)
                if layout is not None:
                    self._tensor_layouts.setdefault(f"{call.path}.{name}", (tuple(buffer.shape), layout))
        sources = [self.derived.layout_of(name) for name in placed.op.inputs]
        steps = zip(sources, placed.moves, placed.grads, placed.back_moves, strict=True)
        makers = [share or placed.op.name for share in placed.shares]
        lengths = placed.op.input_shapes[0], placed.op.output_shape
        return LocalOp(
            placed,
            call,
            made,
            tuple(Edge(maker, *step) for maker, step in zip(makers, steps, strict=True)),
            tuple(zip(makers, placed.op.inputs, strict=True)),
            tuple(
                fringe(halo, *(shape[DIMS[halo.dim]] for shape in lengths), self._mesh, self._rank)
                for halo in placed.halos
            ),
        )

    def _note(self, module: nn.Module, builder: Builder, call: Call, placed: Placed, parameter: Parameter) -> None:
        full = f"{call.path}.{parameter.name}" if call.path else parameter.name
        self.parameter_layouts[full] = parameter
        self._tensor_layouts[full] = (parameter.shape, layout_of(parameter))
        self._owners[full] = placed.op.name
        if not isinstance(call.target, nn.Module):
            path, _, name = full.rpartition(".")
            whole: Any = module.get_parameter(full)
            container = self._container(path)
            container.register_parameter(name, nn.Parameter(whole.detach().clone(), requires_grad=whole.requires_grad))

    def _weight(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        found: Tensor = getattr(self.get_submodule(path), last)
        return found

    def _container(self, path: str) -> nn.Module:
        at: nn.Module = self
        for part in path.split(".") if path else ():
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        return at

    def _register(self, path: str, made: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        container = self._container(parent)
        while container._modules.get(name, made) is not made:
            name += "_"
        container.add_module(name, made)

    # --- running ---

    def begin_step(self, seed: int, batch: int, samples: Sequence[int] | None = None) -> None:
        """Say what the next forward pass is of.

        Args:
            seed: of its random numbers; the same on all workers.
            batch: its samples, all workers' together.
            samples: their numbers within the step; None: from 0.
        """
        self._position.seed, self._position.batch, self._position.samples = seed, batch, samples

    @property
    def batch(self) -> int:
        """Samples of the forward pass, all workers' together."""
        return self._position.batch

    def forward(self, images: Tensor) -> Any:
        """This worker's part of the images to its part of the outputs.

        In training a tuple where the network returns one; in evaluation the main output, unless the network has an
        objective of its own.

        Raises:
            ConfigError: the images have another shape than this worker's part of the batch.
        """
        batch = self._position.batch
        needed = local_shape((batch, *self._traced.input_shape[1:]), self.derived.input, self._mesh, self._rank)
        if tuple(images.shape) != needed:
            raise ConfigError(
                f"worker {self._rank} of {self._mesh} needs images of shape {needed}, its part of {batch}, got"
                f" {tuple(images.shape)}; begin_step says how many samples there are"
            )
        found = self.run(self._active(), {INPUT: images}, batch=batch)
        if self._whole_network() and self._traced.several:
            return tuple(found[name] for name in self._traced.outputs)
        return found[self._traced.outputs[0]]

    def _whole_network(self) -> bool:
        return self.training or hasattr(self, "own_loss")

    def _active(self) -> tuple[str, ...]:
        """The ops that run; in evaluation those that serve the main output."""
        return tuple(name for name in self._ops if self._whole_network() or name in self._served)

    def run(
        self, names: Sequence[str], values: Mapping[str, Tensor], *, batch: int, arrived: Iterable[str] = ()
    ) -> dict[str, Tensor]:
        """Runs some of the ops.

        Args:
            names: which, in their order.
            values: what they read of others, by op or ``input``, as those lie.
            batch: samples, all workers' together.
            arrived: which of `values` lie already as their readers need them: they are not moved, nor are their
                gradients.

        Returns:
            What other ops still want of these, as it lies, and outputs as the loss needs them.
        """
        self._position.batch = batch
        chosen, come = set(names), set(arrived)
        others = {
            source for name in self._active() if name not in chosen for source in self._ops[name].placed.op.inputs
        }
        readers = Counter(source for name in names for source in self._ops[name].placed.op.inputs)
        movers = Counter(key for name in names for key in self._ops[name].keys)
        held, moved = dict(values), dict[Key, Tensor]()
        results: dict[str, Tensor] = {}
        for name in names:
            op = self._ops[name]
            inputs = [self._input(op, place, held, moved, come, batch) for place in range(len(op.keys))]
            readers.subtract(op.placed.op.inputs)
            movers.subtract(op.keys)
            _drop(held, readers)
            _drop(moved, movers)
            value = self._compute(op, inputs, batch)
            del inputs
            if name in others:
                results[name] = value
            if name in self._ends:
                results[name] = move(value, self._ends[name], shape=self._at(name, batch), transport=self.transport)
            if readers[name]:
                held[name] = value
            del value
        return results

    def _input(
        self, op: LocalOp, place: int, held: Mapping[str, Tensor], moved: dict[Key, Tensor], come: set[str], batch: int
    ) -> Tensor:
        source, key = op.placed.op.inputs[place], op.keys[place]
        if source in come or op.edges[place].silent:
            return held[source]
        if key not in moved:
            moved[key] = move(
                held[source],
                op.edges[place],
                shape=self._at(source, batch),
                transport=self.transport,
                fresh=op.call.in_place,
            )
        return moved[key]

    def _compute(self, op: LocalOp, inputs: list[Tensor], batch: int) -> Tensor:
        if op.fringes:
            inputs[0] = fetch(inputs[0], op.fringes, transport=self.transport, tag=op.name)
        shape = local_shape(self._at(op.name, batch), op.placed.output, self._mesh, self._rank)
        empty = 0 in shape or any(tensor.numel() == 0 for tensor in inputs)
        if empty and not op.placed.sync_axes:  # statistics are everybody's
            return nothing(shape, [*inputs, *op.module.parameters()])
        value: Tensor = invoke(op.module, op.call, inputs, self._weight) if _is_layer(op) else op.module(*inputs)
        assert tuple(value.shape) == shape, f"{op.name}: {tuple(value.shape)} came out, {shape} was to"
        return value

    def _at(self, name: str, batch: int) -> tuple[int, ...]:
        return (batch, *self._shapes[name][1:])

    # --- what others ask ---

    def layout_of(self, name: str) -> Layout:
        """How the output of an op, or ``input``, lies."""
        return self.derived.layout_of(name)

    def trunk_and_head(self, before: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The ops that do not depend on the op `before`, and that one with all that do.

        Raises:
            ConfigError: there is no such op.
        """
        if before not in self._ops:
            raise ConfigError(f"the network has no layer {before!r}")
        head = {before}
        for name, op in self._ops.items():
            if head & set(op.placed.op.inputs):
                head.add(name)
        return tuple(name for name in self._ops if name not in head), tuple(name for name in self._ops if name in head)

    def local_images(self, images: Tensor) -> Tensor:
        """This worker's part of a whole batch."""
        return part_of(images, self.derived.input, self._mesh, self._rank)

    def local_labels(self, labels: Tensor) -> Tensor:
        """The labels of the samples whose outputs this worker has: its part where samples are divided."""
        layout = tuple(part if part == Split("batch") else WHOLE for part in self.derived.input)
        return part_of(labels, layout, self._mesh, self._rank)

    # --- parameters, whole ---

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole network's state, on every worker; all of them must ask."""
        return {name: self._whole(name, tensor) for name, tensor in self.state_dict().items()}

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes this worker's parts of a whole network's state.

        Raises:
            ConfigError: a name is missing or left over, or a tensor has another shape.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            wrong = sorted(own.keys() ^ state.keys())
            raise ConfigError(f"the state of another network: {', '.join(wrong[:5])} in one of the two alone")
        for name, tensor in own.items():
            shape, layout = self._lies(name, tensor)
            if tuple(state[name].shape) != shape:
                raise ConfigError(f"{name} needs shape {shape}, got {tuple(state[name].shape)}")
            with torch.no_grad():
                tensor.copy_(part_of(state[name], layout, self._mesh, self._rank))

    def sum_gradients(self, names: Iterable[str] | None = None) -> None:
        """Adds up the gradients that are addends over several workers; all workers must ask, after ``backward``.

        Args:
            names: of which parameters; None: of all.
        """
        chosen = self.parameter_layouts if names is None else set(names)
        for name, parameter in self.named_parameters():
            if name not in chosen:
                continue
            tag = (self._owners[name], "gradient")
            for axis in self.parameter_layouts[name].sum_axes:
                if parameter.grad is not None:
                    parameter.grad = reduce(self.transport, parameter.grad, axis, tag=tag)

    def gather_gradients(self) -> dict[str, Tensor]:
        """The whole gradients, on every worker, of what has one; sum them before."""
        named = [(name, parameter.grad) for name, parameter in self.named_parameters()]
        return {name: self._whole(name, grad) for name, grad in named if grad is not None}

    def owner(self, name: str) -> str:
        """The op whose parameter this is."""
        return self._owners[name]

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """A whole tensor, on every worker, from parts that lie as this parameter or buffer; all of them must ask."""
        return self._whole(name, tensor)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This worker's part of a tensor that lies as this parameter or buffer."""
        return part_of(whole, self._lies(name, whole)[1], self._mesh, self._rank)

    def _lies(self, name: str, tensor: Tensor) -> tuple[tuple[int, ...], Layout]:
        return self._tensor_layouts.get(name, (tuple(tensor.shape), (WHOLE,) * len(self._mesh.axes)))

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        shape, layout = self._lies(name, tensor)
        steps = route(layout, (WHOLE,) * len(layout))
        whole = run_steps(tensor.detach(), layout, steps, shape, self.transport, tag=(name, "state"))
        return whole.clone() if whole.untyped_storage() is tensor.untyped_storage() else whole


def _is_layer(op: LocalOp) -> bool:
    return isinstance(op.call.target, nn.Module)


def _drop(values: dict[Any, Tensor], readers: Counter[Any]) -> None:
    """Let go of what nobody reads any more."""
    for name in [name for name in values if readers[name] <= 0]:
        del values[name]
