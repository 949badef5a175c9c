"""Reads a network as the ops that a placement divides: what is computed, from what, with which parameters.

`torch.fx` runs the network's Python code once with stand-ins for tensors and writes down the calls: one op for each
leaf module (as `windlass.layers.leaf.is_leaf` has it) and for each function outside of one, named as
`windlass.networks.capture` names its layers.  Then the calls run on fake tensors of two batch sizes, which gives the
shapes and shows what depends on the batch.

Calls that only look at sizes leave no op; ``x.view(x.size(0), -1)`` is a flattening.  In-place calls are followed: what
is read after one is read from it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from windlass.errors import ConfigError
from windlass.layers.leaf import is_leaf
from windlass.networks.recorder import kind_of
from windlass.parallel.calls import (
    FUNCTION_MODULES,
    Call,
    Shape,
    Slot,
    Weight,
    as_module,
    method_of,
    module_attributes,
    placement_kind,
    reshape_to,
    weights_in,
)
from windlass.plan.graph import INPUT
from windlass.plan.placement import Op

ADVICE = "--parallel data takes it as it is"


@dataclass(frozen=True, slots=True)
class Traced:
    """A network as ops.

    Attributes:
        ops: in the order in which they run.
        outputs: the ops that give the network's outputs, the main one first.
        calls: how each op is computed.
        several: whether the network returns a tuple.
        input_shape: of the images it was traced with.
    """

    ops: tuple[Op, ...]
    outputs: tuple[str, ...]
    calls: Mapping[str, Call]
    several: bool
    input_shape: Shape


def trace(module: nn.Module, input_shape: tuple[int, ...], *, training: bool = True) -> Traced:
    """The ops of `module` on a batch of `input_shape`.

    Args:
        module: a network from images to a tensor or a tuple of tensors; it is left as it is.
        input_shape: of the whole batch.
        training: as in training, with what the network then returns beside its main output.

    Raises:
        ConfigError: its Python code depends on the elements of tensors, or on the batch in a way that cannot be
            divided; the place is named.
    """
    flags = [(child, child.training) for child in module.modules()]
    try:
        module.train(training)
        graph = _graph(module)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            runs = [_run(module, graph, (input_shape[0] + more, *input_shape[1:])) for more in (0, 1)]
        return _Reader(module, graph, runs[0], runs[1]).traced(input_shape)
    finally:
        for child, flag in flags:
            child.training = flag


# --- the calls ----------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["place"] = self.scope.module_path
        return node


def _graph(module: nn.Module) -> fx.Graph:
    tracer = _Tracer()
    try:
        return tracer.trace(module)
    except ConfigError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"network {type(module).__name__} cannot be divided: {_place(tracer.scope.module_path)}: {first}; {ADVICE}"
        ) from error


def _place(path: str) -> str:
    return f"module {path!r}" if path else "its forward"


# --- shapes -------------------------------------------------------------------------------------------------


def _run(module: nn.Module, graph: fx.Graph, input_shape: Shape) -> dict[fx.Node, Any]:
    """The value of every node on fake tensors."""
    values: dict[fx.Node, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {id(tensor): _like(tensor) for tensor in _weights(module)}
        dtype = next((t.dtype for t in module.parameters() if t.dtype.is_floating_point), torch.float32)
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = torch.empty(input_shape, dtype=dtype) if not values else _default(node)
            elif node.op == "get_attr":
                values[node] = fakes[id(_attribute(module, str(node.target)))]
            elif node.op != "output":
                try:
                    values[node] = _compute(node, module, values, fakes)
                except Exception as error:
                    first = str(error).strip().partition("\n")[0]
                    raise ConfigError(
                        f"network {type(module).__name__} fails on an input of shape {input_shape} in"
                        f" {_place(str(node.meta['place']))}: {first}"
                    ) from error
    return values


def _weights(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _default(node: fx.Node) -> Any:
    if not node.args:
        raise ConfigError(f"a network that is divided takes images alone; its forward wants {node.target!r} too")
    return node.args[0]


def _attribute(module: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(module)


def _compute(node: fx.Node, module: nn.Module, values: Mapping[fx.Node, Any], fakes: Mapping[int, Tensor]) -> Any:
    args = fx.map_arg(node.args, values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        named = [*leaf.named_parameters(), *leaf.named_buffers()]
        return functional_call(leaf, {name: fakes[id(tensor)] for name, tensor in named}, args, dict(kwargs))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Any = node.target
    return function(*args, **kwargs)


# --- the ops ------------------------------------------------------------------------------------------------

IN_PLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
RESHAPES = ("view", "reshape", "flatten")


@dataclass
class _Reader:
    """Turns the nodes of a graph into ops."""

    module: nn.Module
    graph: fx.Graph
    values: Mapping[fx.Node, Any]
    larger: Mapping[fx.Node, Any]
    ops: list[Op] = field(default_factory=list)
    calls: dict[str, Call] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    claimed: set[int] = field(default_factory=set)
    written: dict[int, fx.Node] = field(default_factory=dict)
    places: dict[fx.Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Numbers the nodes."""
        self.places.update({node: place for place, node in enumerate(self.graph.nodes)})

    def traced(self, input_shape: Shape) -> Traced:
        """Everything that was read."""
        outputs: tuple[str, ...] = ()
        several = False
        for node in self.graph.nodes:
            if node.op == "placeholder" and not self.names:
                self.names[node] = INPUT
            elif node.op == "output":
                several = not isinstance(node.args[0], fx.Node)
                outputs = self._outputs(node.args[0])
            elif node.op in ("call_module", "call_function", "call_method") and self._is_op(node):
                self._add(node)
        return Traced(tuple(self.ops), outputs, self.calls, several, tuple(input_shape))

    def _is_op(self, node: fx.Node) -> bool:
        """Whether a tensor of the batch comes out; sizes and their arithmetic are constants, and so are weights'."""
        value = self.values[node]
        if not isinstance(value, Tensor):
            if isinstance(value, tuple | list) and any(isinstance(item, Tensor) for item in value):
                raise self._error(node, "returns several tensors")
            return False
        if not any(source in self.names for source in node.all_input_nodes):
            raise self._error(node, "computes something that no image has part in")
        other = self.larger[node]
        batch = value.shape[0] if value.dim() else 0
        if other.dim() == 0 or other.shape[0] != batch + 1 or other.shape[1:] != value.shape[1:]:
            raise self._error(
                node, f"gives shape {tuple(value.shape)}, whose first dim alone should be the batch's and grow with it"
            )
        return True

    def _error(self, node: fx.Node, what: str) -> ConfigError:
        place = node.target if node.op == "call_module" else node.meta["place"]
        return ConfigError(
            f"network {type(self.module).__name__} cannot be divided: {_place(str(place))}, {node.name}: it {what};"
            f" {ADVICE}"
        )

    def _outputs(self, value: Any) -> tuple[str, ...]:
        nodes = [value] if isinstance(value, fx.Node) else value
        if not isinstance(nodes, tuple | list) or not all(
            isinstance(node, fx.Node) and self.names.get(node, INPUT) != INPUT for node in nodes
        ):
            raise ConfigError(
                f"network {type(self.module).__name__} cannot be divided: it must return a tensor or a tuple of tensors"
            )
        return tuple(self.names[self._latest(node)] for node in nodes)

    def _latest(self, node: fx.Node) -> fx.Node:
        """The node itself, or the in-place call that has written its memory since."""
        writer = self.written.get(_storage(self.values[node]), node)
        if self.places[writer] <= self.places[node]:
            return node
        if self.values[writer].shape != self.values[node].shape:
            raise self._error(writer, f"writes in place what {node.name} is in another shape")
        return writer

    def _add(self, node: fx.Node) -> None:
        sources = [source for source in node.all_input_nodes if source in self.names]
        inputs = list(dict.fromkeys(self._latest(source) for source in sources))
        call = self._call(node, inputs)
        weights = sorted({weight.name for weight in weights_in((call.args, call.kwargs))})
        name = self._name(node, call)
        parameters = self._parameters(call, weights)
        self.names[node] = name
        if call.in_place:
            self.written[_storage(self.values[node])] = node
        self.calls[name] = call
        self.ops.append(
            Op(
                name=name,
                kind=self._kind(node, call, weights),
                inputs=tuple(self.names[source] for source in inputs),
                input_shapes=tuple(tuple(self.values[source].shape) for source in inputs),
                output_shape=tuple(self.values[node].shape),
                parameters=parameters,
                attributes=_attributes(node, call),
            )
        )

    def _name(self, node: fx.Node, call: Call) -> str:
        path = str(node.meta["place"])
        kind = self._kind(node, call, ()) if _reshape(node) else kind_of(_spelled(node))
        base = call.path or (f"{path}.{kind}" if path else kind)
        self.counts[base] += 1
        return base if self.counts[base] == 1 else f"{base}#{self.counts[base]}"

    def _kind(self, node: fx.Node, call: Call, weights: Sequence[str]) -> str:
        value = self.values[node]
        if _reshape(node):
            return "flatten" if value.dim() == 2 else "view"
        if isinstance(call.target, nn.Module):
            return placement_kind(call.target)
        kind = kind_of(_spelled(node))
        return f"functional_{kind}" if weights else kind

    def _parameters(self, call: Call, weights: Sequence[str]) -> tuple[tuple[str, Shape], ...]:
        """Those that no op before has used."""
        if isinstance(call.target, nn.Module):
            named = list(call.target.named_parameters())
        else:
            named = [(name, _attribute(self.module, name)) for name in weights]
        fresh = [
            (name, tensor)
            for name, tensor in named
            if isinstance(tensor, nn.Parameter) and id(tensor) not in self.claimed
        ]
        self.claimed.update(id(tensor) for _, tensor in fresh)
        return tuple((name, tuple(tensor.shape)) for name, tensor in fresh)

    def _call(self, node: fx.Node, inputs: list[fx.Node]) -> Call:
        if _reshape(node):
            rest = tuple(self.values[node].shape[1:])
            return Call(reshape_to(rest), (Slot(0),), {})
        args = tuple(self._template(arg, node, inputs) for arg in node.args)
        kwargs = {key: self._template(arg, node, inputs) for key, arg in node.kwargs.items()}
        if node.op == "call_module":
            leaf = self.module.get_submodule(str(node.target))
            return Call(leaf, args, kwargs, path=str(node.target), in_place=bool(getattr(leaf, "inplace", False)))
        spelled = _spelled(node)
        if spelled in FUNCTION_MODULES and node.op == "call_function":
            return as_module(spelled, args, kwargs, self.module.training)
        function: Any = node.target
        if node.op == "call_method":
            function = method_of(str(node.target))
        in_place = function in IN_PLACE_OPERATORS or (spelled.endswith("_") and not spelled.endswith("__"))
        return Call(function, args, kwargs, in_place=in_place or bool(kwargs.get("inplace", False)))

    def _template(self, value: Any, node: fx.Node, inputs: list[fx.Node]) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._template(item, node, inputs) for item in value)
        if not isinstance(value, fx.Node):
            return value
        if value in self.names:
            return Slot(inputs.index(self._latest(value)))
        if value.op == "get_attr":
            return Weight(str(value.target))
        if self.values[value] != self.larger[value]:
            raise self._error(node, "takes a size that changes with the batch")
        return self.values[value]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _spelled(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))


def _reshape(node: fx.Node) -> bool:
    return node.op != "call_module" and _spelled(node) in RESHAPES


def _attributes(node: fx.Node, call: Call) -> tuple[tuple[str, object], ...]:
    if isinstance(call.target, nn.Module):
        return module_attributes(call.target)
    if kind_of(_spelled(node)) == "cat":
        return (("dim", call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0)),)
    return ()
