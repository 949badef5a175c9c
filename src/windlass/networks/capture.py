"""Captures any network as a graph of layers with its work and the memories of training.

The network runs one step (forward, loss, backward) on fake tensors, which have shapes and storages but no
elements, under the observers of `windlass.networks.recorder`.  Only copies of its parameters and buffers are
fake; the module itself, its gradients, running statistics, training flags and the random generators stay as
they are.

The loss is cross-entropy over the outputs, auxiliary ones weighted by the module's `auxiliary_weight`, or the
module's own (`windlass.objective`).  It counts in the peak of memory but is no layer.  Plain SGD has no state
beyond that; parameters, buffers, the input batch and its labels count from the start, gradients from when the
backward pass makes them.

What capture cannot see: Python-level randomness (stochastic depth by `random`) is frozen as it fell, and
memory that oneDNN takes for itself is not in the peak (see `windlass.networks.memory`).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from windlass.errors import ConfigError
from windlass.networks.lowered import Rehearsal, within
from windlass.networks.recorder import (
    FunctionObserver,
    Node,
    OperationObserver,
    Recorder,
    attributes_of,
    tensors_in,
)
from windlass.plan.graph import Graph, Layer
from windlass.plan.recipe import Recipe

ADVICE = "use torch.where in place of if, masks in place of selected rows, and no .item()"


def capture(
    module: nn.Module,
    input_shape: tuple[int, ...],
    *,
    name: str,
    num_classes: int,
    training: bool = True,
    keep_gradients: bool = True,
    recipe: Recipe | None = None,
    share: float = 0.0,
    defer_gradients: bool = False,
) -> Graph:
    """Record one step of `module` on a batch of `input_shape` without computing anything.

    Args:
        module: a network from images to logits (batch, num_classes), or to a tuple of such whose first is the
            main one; one with an objective of its own may return any tensors.
        input_shape: shape of the input batch, (N, C, H, W).
        name: what the graph's `network` will say.
        num_classes: number of classes of the labels.
        training: False records a forward pass alone, in evaluation mode: D, ∇D, ∇W and backward work are
        zero.
        keep_gradients: False lets each gradient of a weight go as soon as it is there, as the trainer does that
            copies it into a bucket.
        recipe: in which formats numbers are kept (`windlass.precision`); the step then ends with an update.
        share: of the run that is done, by which the recipe's late formats begin.
        defer_gradients: under a recipe gradients stay float32, and there is no update, as where those of several
            workers are added up first.

    Raises:
        ConfigError: the network cannot take this input, does not give logits, or its Python code depends on
            the elements of tensors; the recipe names a layer that is not there.
    """
    with _left_as_it_is(module), FakeTensorMode(allow_non_fake_inputs=True) as fake_mode:
        module.train(training)
        weights = _fake_weights(module, fake_mode)
        if not keep_gradients:
            _let_gradients_go(weights)
        dtype = next((t.dtype for t in weights.values() if t.dtype.is_floating_point), torch.float32)
        images = torch.empty(input_shape, dtype=dtype)
        labels = torch.empty(input_shape[0], dtype=torch.int64)
        rehearsal = None
        if recipe is not None and not recipe.is_plain:
            rehearsal = Rehearsal(module, weights, recipe, share=share, defer_gradients=defer_gradients)
        recorder = Recorder(module, weights)
        recorder.give_input(images)
        for tensor in (*weights.values(), images, labels):
            recorder.live.hold(tensor, during="start")
        if rehearsal is not None:
            rehearsal.watch(recorder)
        try:
            with OperationObserver(recorder), torch.set_grad_enabled(training):
                _step(module, weights, images, labels, recorder=recorder, name=name, num_classes=num_classes)
                if rehearsal is not None and training:
                    recorder.phase = "update"
                    rehearsal.update()
        finally:
            if rehearsal is not None:
                rehearsal.close()
    return Graph(
        network=name,
        input_shape=tuple(input_shape),
        layers=tuple(_layer(node) for node in recorder.nodes),
        input_bytes=images.untyped_storage().nbytes() + labels.untyped_storage().nbytes(),
        peak_bytes=recorder.live.peak,
        peak_at=recorder.live.peak_at,
        recomputed_macs=recorder.recomputed_macs,
        number_format="float32" if recipe is None else str(recipe),
    )


def _step(
    module: nn.Module, weights: dict[str, Tensor], images: Tensor, labels: Tensor, *, recorder: Recorder, name: str,
    num_classes: int,
) -> None:  # fmt: skip
    """Forward and, in training, loss and backward."""
    outputs = _forward(module, weights, images, recorder=recorder, name=name)
    own_loss = getattr(module, "own_loss", None)
    if own_loss is None:
        _check_outputs(outputs, name=name, batch=len(labels), num_classes=num_classes)
    if not torch.is_grad_enabled():
        return
    recorder.phase = "loss"
    loss = own_loss(outputs, images) if own_loss else _loss(outputs, labels, module=module)
    del outputs
    recorder.phase = "backward"
    if loss.requires_grad:  # with the fake weights in place, for what runs a second time
        within(module, weights, loss.backward)


def _forward(
    module: nn.Module, weights: dict[str, Tensor], images: Tensor, *, recorder: Recorder, name: str
) -> list[Tensor]:
    with contextlib.ExitStack() as stack:
        enter = register_module_forward_pre_hook(recorder.enter_module)
        stack.callback(enter.remove)
        leave = register_module_forward_hook(recorder.leave_module)
        stack.callback(leave.remove)
        stack.enter_context(FunctionObserver(recorder))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(recorder.keep, _as_it_is))
        try:
            return list(tensors_in(functional_call(module, weights, (images,))))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"network {name!r} cannot be captured: {recorder.place()} makes a Python value or a shape"
                f" from a tensor's elements ({error.func}); {ADVICE}"
            ) from error
        except UnsupportedOperatorException as error:
            raise ConfigError(
                f"network {name!r} cannot be captured: {error.func} in {recorder.place()} has no fake"
                " implementation; register one with torch.library.register_fake"
            ) from error
        except ConfigError:
            raise
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"network {name!r} fails on an input of shape {tuple(images.shape)} in {recorder.place()}:"
                f" {type(error).__name__}: {first}"
            ) from error


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _check_outputs(outputs: list[Tensor], *, name: str, batch: int, num_classes: int) -> None:
    if not outputs:
        raise ConfigError(f"network {name!r} returns no tensor; logits (batch, num_classes) are needed")
    for output in outputs:
        shape = tuple(output.shape)
        if len(shape) != 2 or shape[0] != batch or shape[1] < num_classes:
            raise ConfigError(f"network {name!r} must return logits of shape ({batch}, {num_classes}), got {shape}")


def _loss(outputs: list[Tensor], labels: Tensor, *, module: nn.Module) -> Tensor:
    weight = float(getattr(module, "auxiliary_weight", 0.3))
    loss = functional.cross_entropy(outputs[0], labels)
    for output in outputs[1:]:
        loss = loss + weight * functional.cross_entropy(output, labels)
    return loss


def _let_go(leaf: Tensor) -> None:
    leaf.grad = None


def _let_gradients_go(weights: dict[str, Tensor]) -> None:
    for tensor in {id(tensor): tensor for tensor in weights.values() if tensor.requires_grad}.values():
        tensor.register_post_accumulate_grad_hook(_let_go)  # type: ignore[no-untyped-call]


def _fake_weights(module: nn.Module, fake_mode: FakeTensorMode) -> dict[str, Tensor]:
    """Fake copies of all parameters and buffers; what is shared under two names stays shared."""
    copies: dict[int, Tensor] = {}
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ConfigError(f"{name} is not initialised; run the network once on a batch before")
        if id(tensor) not in copies:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return {name: copies[id(tensor)] for name, tensor in named}


@contextlib.contextmanager
def _left_as_it_is(module: nn.Module) -> Iterator[None]:
    """Puts back training flags and random generators."""
    flags = [(child, child.training) for child in module.modules()]
    python_state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        for child, flag in flags:
            child.training = flag


def _layer(node: Node) -> Layer:
    return Layer(
        name=node.name,
        kind=node.kind,
        inputs=tuple(node.inputs),
        output_shape=node.output_shape,
        num_parameters=node.num_parameters,
        forward_macs=node.forward_macs,
        backward_macs=node.backward_macs,
        kept_bytes=node.kept_bytes,
        weight_bytes=node.weight_bytes,
        output_grad_bytes=node.output_grad_bytes,
        weight_grad_bytes=node.weight_grad_bytes,
        attributes=attributes_of(node.module),
    )
