"""torch.compile, torch.export, FX and TorchScript with Windlass's layers in them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from windlass.errors import ConfigError
from windlass.layers import Conv2d, Layout, conv2d, set_chooser
from windlass.layers.operators import CONV2D
from windlass.networks.capture import capture
from windlass.plan.convolution import ConvChoice, ConvShape

U = 2.0**-24
"""float32's unit roundoff."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def network(algorithm: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        Conv2d(3, 4, 3, padding=1, algorithm=algorithm, activation="relu"),
        Conv2d(4, 3, 3, padding="same", algorithm=algorithm),
    )


def step(model: Any, parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    return [y.detach(), *torch.autograd.grad((y**2).sum(), [leaf, *parameters])]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        # The same kernels, or PyTorch's: sums of at most 200 terms in another order, three in a row.
        assert (a - b).abs().max() <= 3 * 200 * U * b.abs().max()


def calls(graph: torch.fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


class TestCompile:
    @pytest.mark.parametrize("algorithm", ["direct", "winograd", "auto", "torch"])
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_a_training_step(self, algorithm: str, backend: str, dynamic: bool) -> None:
        model = network(algorithm)
        parameters = list(model.parameters())
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
        for size in ((2, 3, 6, 6), (3, 3, 7, 8)):
            x = torch.randn(size)
            assert_close(step(compiled, parameters, x), step(model, parameters, x))

    @pytest.mark.parametrize(("algorithm", "ours"), [("direct", 2), ("auto", 0), ("torch", 0)])
    def test_the_graph_holds_what_was_chosen(self, algorithm: str, ours: int) -> None:
        graphs = []

        def backend(module: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(module.graph)
            return module.forward

        torch.compile(network(algorithm), backend=backend, fullgraph=True)(torch.randn(2, 3, 6, 6))
        assert calls(graphs[0]).count(CONV2D) == ours

    def test_a_chooser_is_asked_while_tracing(self) -> None:
        asked = []

        def chooser(shape: ConvShape, *, layout: Layout, grad: bool) -> ConvChoice:
            asked.append(shape.in_channels)
            return ConvChoice.parse("direct")

        set_chooser(chooser)
        try:
            compiled = torch.compile(network("auto"), backend="eager", fullgraph=True)
            x = torch.randn(2, 3, 6, 6)
            for _ in range(3):
                compiled(x)
        finally:
            set_chooser(None)
        assert asked == [3, 4]

    def test_a_dynamic_batch_is_not_fixed(self) -> None:
        """The choice waits for the run, so one graph serves all batches."""
        graphs = []

        def backend(module: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(module.graph)
            return module.forward

        model = network("auto")
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        x = torch.randn(4, 3, 6, 6)
        torch._dynamo.mark_dynamic(x, 0)
        for size in (4, 5, 9):
            part = torch.randn(size, 3, 6, 6) if size != 4 else x
            assert_close([compiled(part).detach()], [model(part).detach()])
        assert len(graphs) == 1
        assert calls(graphs[0]).count(CONV2D) == 2

    def test_autocast(self) -> None:
        model = network("direct")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.randn(2, 3, 6, 6)
            y = compiled(x)
            assert y.dtype == torch.bfloat16
            assert torch.equal(y, model(x))

    def test_an_impossible_algorithm_is_named(self) -> None:
        layer = Conv2d(3, 4, 3, stride=2, algorithm="winograd-4x4")
        with pytest.raises(Exception, match="winograd-4x4: needs stride 1, got 2"):
            torch.compile(layer, backend="eager")(torch.randn(1, 3, 8, 8))


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    def test_saved_and_loaded(self, strict: bool) -> None:
        model, x = network("direct"), torch.randn(2, 3, 6, 6)
        program = torch.export.export(model, (x,), strict=strict)
        assert calls(program.graph).count(CONV2D) == 2
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        assert torch.equal(torch.export.load(file).module()(x), model(x))

    @pytest.mark.parametrize("algorithm", ["direct", "auto"])
    def test_any_batch(self, algorithm: str) -> None:
        model, x = network(algorithm), torch.randn(5, 3, 6, 6)
        batch = {"input": {0: torch.export.Dim("batch", min=2)}}
        program = torch.export.export(model, (x[:2],), dynamic_shapes=batch)
        assert calls(program.graph).count(CONV2D) == 2
        assert_close([program.module()(x).detach()], [model(x).detach()])

    def test_joint_with_its_gradients(self) -> None:
        """The derivatives are operators too: the whole step is one graph."""

        def both(x: Tensor, w: Tensor) -> Any:
            x, w = x.requires_grad_(), w.requires_grad_()
            return torch.autograd.grad(conv2d(x, w, padding=1, algorithm="direct", relu=True).sum(), (x, w))

        graph = make_fx(both, tracing_mode="symbolic")(torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3))
        names = [str(target) for target in calls(graph.graph)]
        for name in ("conv2d", "conv2d_backward_input", "conv2d_backward_weight"):
            assert names.count(f"windlass.{name}.default") == 1
        x, w = torch.randn(3, 3, 7, 7), torch.randn(4, 3, 3, 3)
        for ours, theirs in zip(graph(x, w), both(x.clone(), w.clone()), strict=True):
            assert torch.equal(ours, theirs)


class TestOthers:
    def test_fx_records_the_function(self) -> None:
        model, x = network("direct"), torch.randn(2, 3, 6, 6)
        traced = torch.fx.symbolic_trace(model)
        assert calls(traced.graph) == [conv2d, conv2d]
        assert torch.equal(traced(x), model(x))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_torchscript_gets_pytorchs_own(self) -> None:
        model = network("direct").eval()
        traced = torch.jit.trace(model, torch.randn(2, 3, 6, 6))  # type: ignore[no-untyped-call]
        assert "windlass::" not in str(traced.inlined_graph)
        x = torch.randn(3, 3, 7, 8)
        assert_close([traced(x).detach()], [model(x).detach()])

    def test_capture_of_a_network(self) -> None:
        graph = capture(
            nn.Sequential(network("direct"), nn.Flatten(), nn.Linear(108, 5)), (2, 3, 6, 6), name="net", num_classes=5
        )
        assert [layer.output_shape for layer in graph.layers[:2]] == [(2, 4, 6, 6), (2, 3, 6, 6)]

    def test_wrong_sizes_are_refused_without_elements(self) -> None:
        compiled = torch.compile(
            lambda x, w: CONV2D(x, w, None, [1, 1], [0] * 4, [1, 1], 1, "direct", False), backend="eager"
        )
        with pytest.raises(Exception, match="needs 3 input channels, got 2"):
            compiled(torch.randn(1, 2, 6, 6), torch.randn(4, 3, 3, 3))
        with pytest.raises(Exception, match="do not fit"):
            compiled(torch.randn(1, 3, 2, 2), torch.randn(4, 3, 3, 3))

    def test_unknown_algorithms_are_refused_while_tracing(self) -> None:
        with pytest.raises(ConfigError, match="unknown convolution algorithm"):
            make_fx(lambda x, w: conv2d(x, w, algorithm="direkt"), tracing_mode="symbolic")(
                torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3)
            )
