"""A network as data: a directed acyclic graph of layers with shapes, work and the memories of training.

`networks.capture` makes it from any module; plans refer to it, `check` compares against it, `inspect` prints
it.  Standard library only: no tensor is needed to reason about a network.

The four memories of training, in bytes for one step on one worker:

* D   - activations that the forward pass keeps for the backward pass (unique storages, counted once, at the
        layer that produced them);
* W   - parameters and buffers;
* ∇D  - the derivative of the loss with respect to the layer's outputs (same size as the outputs);
* ∇W  - the derivative with respect to the layer's parameters.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

INPUT = "input"
"""The name by which a layer refers to the network's input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One node: a leaf module called once, or one tensor operation outside any leaf module.

    Attributes:
        name: module path, with ``#2`` and so on for a second call (``layer1.0.relu#2``), or the path of the
            enclosing module and the operation (``layer1.0.add``).
        kind: what it is, in PyTorch's words and lower case: ``conv2d``, ``linear``, ``batch_norm``, ``relu``,
            ``max_pool2d``, ``add``, ``cat``, …; a leaf module of the user's own keeps its class name.
        inputs: names of the layers whose outputs it reads, `INPUT` among them; the DAG's edges.
        output_shape: shape of its (first) output, batch included.
        num_parameters: trainable and frozen parameters that it is the first to use.
        forward_macs: multiply-adds of the forward pass.
        backward_macs: multiply-adds of the backward pass (gradient of the input, where one is needed, plus
            gradient of the weights).
        kept_bytes, weight_bytes, output_grad_bytes, weight_grad_bytes: D, W, ∇D and ∇W as above.
        attributes: what else defines it: ``(("kernel", (3, 3)), ("stride", (1, 1)), …)``.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    output_shape: tuple[int, ...]
    num_parameters: int
    forward_macs: int
    backward_macs: int
    kept_bytes: int
    weight_bytes: int
    output_grad_bytes: int
    weight_grad_bytes: int
    attributes: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A captured network: its layers in an order in which they can run, and the step's totals.

    Attributes:
        network: the name it was asked for by.
        input_shape: shape of the input batch.
        layers: in execution order; every input of a layer stands before it.
        input_bytes: bytes of the input batch and its labels.
        peak_bytes: predicted most bytes of tensors alive at once in a step (forward, loss, backward).
        peak_at: the layer or phase where that peak lies.
        recomputed_macs: multiply-adds that the backward pass makes again, where activations are not kept.
        number_format: the recipe in whose formats numbers are kept; the peak is then of the update too.
    """

    network: str
    input_shape: tuple[int, ...]
    layers: tuple[Layer, ...]
    input_bytes: int
    peak_bytes: int
    peak_at: str
    recomputed_macs: int = 0
    number_format: str = "float32"

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole network."""
        return sum(layer.num_parameters for layer in self.layers)

    @property
    def forward_macs(self) -> int:
        """Multiply-adds of one forward pass over the batch."""
        return sum(layer.forward_macs for layer in self.layers)

    @property
    def backward_macs(self) -> int:
        """Multiply-adds of one backward pass over the batch."""
        return sum(layer.backward_macs for layer in self.layers)

    def memories(self) -> dict[str, int]:
        """Total bytes of D, W, ∇D and ∇W.  ∇D counts every layer; the peak knows what is alive together."""
        return {
            "D": sum(layer.kept_bytes for layer in self.layers),
            "W": sum(layer.weight_bytes for layer in self.layers),
            "∇D": sum(layer.output_grad_bytes for layer in self.layers),
            "∇W": sum(layer.weight_grad_bytes for layer in self.layers),
        }

    def digest(self) -> str:
        """Names the network's structure whatever the batch: sha256 over names, kinds, edges and parameters."""
        rows = [
            (layer.name, layer.kind, layer.inputs, layer.output_shape[1:], layer.num_parameters)
            for layer in self.layers
        ]
        return "sha256:" + hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
