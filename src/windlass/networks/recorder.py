"""Records what a network does, operation by operation, while it runs on fake tensors.

Theory of operation.  Three observers look at the same forward pass.

* Global module hooks say which module is being called.  A *leaf* (a module without children, or whose
  children only re-parametrise it) becomes one node for all its operations.
* A torch-function mode sees the calls of ``torch.*``, ``functional.*`` and tensor methods.  Outside any leaf,
  one such call becomes one node, however many operations it falls apart into.
* A dispatch mode sees the ATen operations themselves, below autograd: their tensors, shapes and work.  A node
  comes into being with its first operation that is not a view, so calls which compute nothing (``flatten``,
  ``x.shape``, `nn.Identity`, dropout in evaluation) leave no node and the edge runs through them.

Edges follow storages: each storage knows the node that wrote it last.  Views share their base's storage, and
an in-place operation takes over the storage it writes, so both come out right without further rules.

In the backward pass an operation belongs to the node whose autograd function is running; forward operations
note the sequence number that autograd has just given out.  What a backward pass computes a second time
(`networks.recompute`) counts as such.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import weak
from torch.utils._python_dispatch import TorchDispatchMode

from windlass.layers.leaf import is_leaf
from windlass.networks.macs import multiply_adds
from windlass.networks.memory import LiveBytes, passing_bytes
from windlass.networks.recompute import is_recomputing
from windlass.plan.graph import INPUT

KINDS: dict[str, str] = {
    "batch_norm1d": "batch_norm",
    "batch_norm2d": "batch_norm",
    "batch_norm3d": "batch_norm",
    "instance_norm2d": "instance_norm",
    "convolution": "conv2d",
    "iadd": "add",
    "radd": "add",
    "isub": "sub",
    "rsub": "sub",
    "imul": "mul",
    "rmul": "mul",
    "truediv": "div",
    "itruediv": "div",
    "rtruediv": "div",
    "rmatmul": "matmul",
    "concat": "cat",
    "concatenate": "cat",
    "getitem": "index",
    "setitem": "index_put",
}
"""Kinds that are spelled otherwise than the function or module they come from."""

ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "in_features",
    "out_features",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "p",
    "inplace",
)
"""Settings of PyTorch's modules that are copied to a layer's attributes where they exist."""


Value = TypeVar("Value")
ByStorage: TypeAlias = MutableMapping[torch.UntypedStorage, Value]
"""Keyed by the storage object itself; an entry goes when its storage dies."""


@dataclass(slots=True)
class Node:
    """One layer in the making."""

    name: str
    kind: str
    module: nn.Module | None = None
    inputs: list[str] = field(default_factory=list)
    output_shape: tuple[int, ...] = ()
    output_grad_bytes: int = 0
    num_parameters: int = 0
    forward_macs: int = 0
    backward_macs: int = 0
    kept_bytes: int = 0
    weight_bytes: int = 0
    weight_grad_bytes: int = 0


class Recorder:
    """Collects nodes while the observers are active; see the head of this file."""

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.nodes: list[Node] = []
        self.live = LiveBytes()
        self.phase = "forward"
        self.recomputed_macs = 0
        self._paths = {id(child): path for path, child in module.named_modules()}
        self._names: Counter[str] = Counter()
        self._calls: list[nn.Module] = []
        self._open: Node | None = None
        self._pending: Callable[[], Node] | None = None
        self._writers: ByStorage[str] = weak.WeakIdKeyDictionary()
        self._kept: ByStorage[bool] = weak.WeakIdKeyDictionary()
        self._weights: ByStorage[Tensor] = weak.WeakIdKeyDictionary()
        self._unclaimed: dict[int, tuple[int, int]] = {}
        self.error_bits: Callable[[str], int] | None = None
        for weight in weights.values():
            self.stand_for(weight, weight)
            num_bytes = weight.numel() * weight.element_size()
            self._unclaimed[id(weight)] = num_bytes, num_bytes if weight.requires_grad else 0
        self._by_sequence: dict[int, Node] = {}
        self._at = ""

    def give_input(self, tensor: Tensor) -> None:
        """Say that `tensor` is the network's input."""
        self._writers[tensor.untyped_storage()] = INPUT
        self._kept[tensor.untyped_storage()] = True

    # What a recipe changes

    def declare(self, weight: Tensor, kept: Tensor, *, gradient_bytes: int) -> None:
        """Say that a weight is kept as another tensor, and its gradient in so many bytes."""
        self._unclaimed[id(weight)] = kept.numel() * kept.element_size(), gradient_bytes
        self.live.hold(kept, during="start")

    def stand_for(self, weight: Tensor, wide: Tensor) -> None:
        """Say that operations which read `wide` read this weight."""
        self._weights[wide.untyped_storage()] = weight

    def follow(self, output: Tensor, rounded: Tensor) -> None:
        """Say that a layer's output is now another tensor."""
        writer = self._writers.get(output.untyped_storage())
        if writer is not None:
            self._writers[rounded.untyped_storage()] = writer

    def keep_as(self, tensor: Tensor, kept: Tensor) -> None:
        """Count what autograd keeps of a tensor, once, at the layer that wrote it first."""
        storage = tensor.untyped_storage()
        if self.phase == "forward" and storage not in self._kept and storage not in self._weights:
            self._kept[storage] = True
            writer = self._writers.get(storage)
            for node in reversed(self.nodes):
                if node.name == writer:
                    node.kept_bytes += kept.untyped_storage().nbytes()
                    break

    def place(self) -> str:
        """The innermost module being called, for messages."""
        path = self._paths.get(id(self._calls[-1]), "") if self._calls else ""
        return f"module {path!r}" if path else "its forward"

    # Module calls

    def enter_module(self, module: nn.Module, args: object) -> None:
        """Global forward pre-hook."""
        self._calls.append(module)
        if self._open is None and self._pending is None and is_leaf(module):
            path = self._paths.get(id(module), "")
            kind = module_kind(module)
            self._pending = lambda: self._new_node(path or kind, kind, module)

    def leave_module(self, module: nn.Module, args: object, output: object) -> None:
        """Global forward hook."""
        self._calls.pop()
        if is_leaf(module) and not any(is_leaf(outer) for outer in self._calls):
            self._close(output)

    def enter_function(self, name: str) -> bool:
        """Begin a torch function outside leaf modules; False where an outer call already collects."""
        if self.phase != "forward" or self._open is not None or self._pending is not None:
            return False
        path = self._paths.get(id(self._calls[-1]), "") if self._calls else ""
        kind = kind_of(name)
        self._pending = lambda: self._new_node(f"{path}.{kind}" if path else kind, kind, None)
        return True

    def leave_function(self, output: object) -> None:
        """End the call that `enter_function` began."""
        self._close(output)

    def _new_node(self, name: str, kind: str, module: nn.Module | None) -> Node:
        self._names[name] += 1
        count = self._names[name]
        node = Node(name if count == 1 else f"{name}#{count}", kind, module)
        self.nodes.append(node)
        return node

    def _close(self, output: object) -> None:
        node, self._open, self._pending = self._open, None, None
        if node is None:
            return
        outputs = list(tensors_in(output))
        if outputs:
            node.output_shape = tuple(outputs[0].shape)
        for tensor in outputs:
            if tensor.requires_grad:
                node.output_grad_bytes += tensor.numel() * self._error_bits(node, tensor) // 8
        if node.module is not None:
            for weight in self._own_weights(node.module):
                self._claim(weight, node)

    def _error_bits(self, node: Node, tensor: Tensor) -> int:
        if self.error_bits is None:
            return tensor.element_size() * 8
        return self.error_bits(node.name.partition("#")[0])

    def _own_weights(self, module: nn.Module) -> Iterator[Tensor]:
        """What `functional_call` has put in the place of a leaf's parameters and buffers."""
        yield from (*module.parameters(), *module.buffers())

    def _claim(self, weight: Tensor, node: Node) -> None:
        """A weight belongs to the first layer that uses it."""
        num_bytes, gradient_bytes = self._unclaimed.pop(id(weight), (0, 0))
        if not num_bytes:
            return
        node.weight_bytes += num_bytes
        if isinstance(weight, nn.Parameter):
            node.num_parameters += weight.numel()
            node.weight_grad_bytes += gradient_bytes if torch.is_grad_enabled() else 0

    # Operations

    def operation(
        self, operation: str, args: Sequence[object], out: object, *, is_view: bool, live_before: int
    ) -> None:
        """Note one ATen operation after it ran; `live_before` bytes were alive when it began."""
        if self.phase == "forward" and not is_view:
            self._forward_operation(operation, args, out)
        elif self.phase == "backward":
            current = torch._C._current_autograd_node()
            node = self._by_sequence.get(current._sequence_nr()) if current is not None else None
            if node is not None:
                self._at = node.name
            if is_recomputing():
                self.recomputed_macs += multiply_adds(operation, args, out)[0]
        during = self.phase if self.phase in ("loss", "update") else f"{self._at} {self.phase}".strip()
        self.live.touch(live_before + passing_bytes(operation, args, out), during=during)
        for tensor in tensors_in(out):
            self.live.hold(tensor, during=during)

    def _forward_operation(self, operation: str, args: Sequence[object], out: object) -> None:
        node = self._open
        if node is None:
            pending = self._pending or (lambda: self._new_node(kind_of(operation), kind_of(operation), None))
            node = pending()
            if self._pending is not None:
                self._open = node
        self._at = node.name
        for tensor in tensors_in(args):
            storage = tensor.untyped_storage()
            if storage in self._weights:
                self._claim(self._weights[storage], node)
            writer = self._writers.get(storage)
            if writer is not None and writer != node.name and writer not in node.inputs:
                node.inputs.append(writer)
        forward, backward = multiply_adds(operation, args, out)
        node.forward_macs += forward
        node.backward_macs += backward if torch.is_grad_enabled() else 0
        for tensor in tensors_in(out):
            if tensor.untyped_storage() not in self._weights:
                self._writers[tensor.untyped_storage()] = node.name
            node.output_shape = node.output_shape or tuple(tensor.shape)
        if any(tensor.requires_grad for tensor in tensors_in(args)):
            self._by_sequence[torch._C._autograd._get_sequence_nr() - 1] = node

    def keep(self, tensor: Tensor) -> Tensor:
        """Saved-tensors hook: count what autograd keeps as it is."""
        self.keep_as(tensor, tensor)
        return tensor


class FunctionObserver(TorchFunctionMode):
    """Tells the recorder where torch functions begin and end."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` as one node."""
        began = self.recorder.enter_function(getattr(func, "__name__", "function"))
        out = func(*args, **(kwargs or {}))
        if began:
            self.recorder.leave_function(out)
        return out


class OperationObserver(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells the recorder of every ATen operation."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and note it."""
        kwargs = kwargs or {}
        live_before = self.recorder.live.now
        out = func(*args, **kwargs)
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "prim":  # asks a tensor for its device
            return out
        is_view = func.is_view or name in NO_WORK
        self.recorder.operation(name, (*args, *kwargs.values()), out, is_view=is_view, live_before=live_before)
        return out


NO_WORK = frozenset({"_unsafe_view", "alias", "detach", "empty", "empty_like", "empty_strided", "lift_fresh"})
"""Operations that move no data although the dispatcher does not call them views."""


def module_kind(module: nn.Module) -> str:
    """PyTorch's word in lower case for PyTorch's modules, the class name for the user's own.

    >>> module_kind(nn.Conv2d(1, 1, 1)), module_kind(nn.ReLU()), module_kind(nn.LocalResponseNorm(5))
    ('conv2d', 'relu', 'local_response_norm')
    """
    cls = type(module)
    if parametrize.is_parametrized(module):
        cls = cls.__bases__[0]
    if not cls.__module__.startswith("torch."):
        return cls.__name__
    words = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", cls.__name__).replace("ReLU", "Relu").lower()
    return KINDS.get(words, words)


def kind_of(function: str) -> str:
    """Kind of a torch function or ATen operation.

    >>> kind_of("__iadd__"), kind_of("relu_"), kind_of("native_dropout"), kind_of("max_pool2d_with_indices")
    ('add', 'relu', 'dropout', 'max_pool2d')
    """
    word = function.strip("_").removeprefix("native_").removesuffix("_with_indices")
    return KINDS.get(word, word)


def attributes_of(module: nn.Module | None) -> tuple[tuple[str, object], ...]:
    """Settings of a PyTorch module, as plain numbers, strings and tuples."""
    if module is None or not type(module).__module__.startswith("torch."):
        return ()
    found = ((name, getattr(module, name, None)) for name in ATTRIBUTES)
    plain = (int, float, str, bool, tuple)
    return tuple((name, value) for name, value in found if isinstance(value, plain))


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
