"""A parameter stepped in slices: the numbers and the state of a step at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from windlass import precision
from windlass.precision import lowered
from windlass.precision.slices import ELEMENTWISE, SlicedState, slices

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"fused": True, "momentum": 0.5}],
    "Adam": [{}, {"amsgrad": True}, {"fused": True}],
    "RMSprop": [{"momentum": 0.5, "centered": True}],
}
SHAPES = [(7, 3), (1, 4), (5, 2, 3, 2), (9,)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("optimizer", ELEMENTWISE, ids=lambda cls: cls.__name__)
def test_slices_are_the_whole(optimizer: Any, shape: tuple[int, ...], channels_last: bool) -> None:
    if channels_last and len(shape) != 4:
        pytest.skip("four dimensions alone have another layout")
    for settings in SETTINGS.get(optimizer.__name__, [{}]):
        start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        start = start.contiguous(memory_format=torch.channels_last) if channels_last else start
        whole, sliced = (nn.Parameter(start.clone()) for _ in range(2))
        first, second = (optimizer([parameter], lr=0.01, **settings) for parameter in (whole, sliced))
        for step in range(3):
            random = torch.randn(shape, generator=torch.Generator().manual_seed(10 + step))
            gradient = torch.empty_like(start).copy_(random)
            whole.grad = gradient.clone()
            first.step()
            step_sliced(second, sliced, gradient)
        # the tail of a vector, which lies elsewhere in a slice, is computed without fused multiply-adds
        torch.testing.assert_close(sliced, whole, rtol=1e-6, atol=1e-7)
        if not settings.get("fused"):
            assert torch.equal(whole, sliced), settings
        ours, theirs = (one.state_dict()["state"].get(0, {}) for one in (second, first))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(torch.as_tensor(ours[key]), torch.as_tensor(value), rtol=1e-6, atol=1e-7)


def step_sliced(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradient: Tensor) -> None:
    numbers = parameter.data
    state = SlicedState(optimizer, parameter, numbers)
    parts = slices(numbers, 6)
    assert len(parts) > 1 or len(numbers) == 1
    for part in parts:
        parameter.grad = None
        parameter.data, parameter.grad = numbers[part], gradient[part]
        state.show(part)
        optimizer.step()
        state.take(part)
    state.give_back()
    parameter.grad = None
    parameter.data = numbers


@pytest.mark.parametrize("store_gradients", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_in_slices_has_the_same_bits(
    store_gradients: bool, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(large: int) -> tuple[list[Tensor], Any, Any]:
        monkeypatch.setattr(lowered, "LARGE", large)
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 36, 11))
        model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        under = precision.apply(model, optimizer, "fixed16", seed=5, store_gradients=store_gradients)
        x = torch.randn(4, 3, 8, 8).contiguous(memory_format=memory_format)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        rows = sorted(under.rows(), key=lambda row: (row["role"], row["layer"]))
        return [entry.codes for entry in under.stored], rows, optimizer.state_dict()

    (whole, rows, state), (sliced, sliced_rows, sliced_state) = trained(1 << 18), trained(50)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(whole, sliced, strict=True))
    for row, other in zip(rows, sliced_rows, strict=True):
        assert other.pop("error_sum") == pytest.approx(row.pop("error_sum"))
    assert rows == sliced_rows
    assert state.keys() == sliced_state.keys()
    for key, values in state["state"].items():
        assert all(torch.equal(values[name], sliced_state["state"][key][name]) for name in values)
