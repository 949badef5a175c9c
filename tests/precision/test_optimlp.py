from __future__ import annotations

import copy
import importlib
import inspect
import math
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from windlass.errors import ConfigError
from windlass.precision.qtorch import FixedPoint, OptimLP, fixed_point_quantize, quantizer

OPTIMIZERS = [
    rule for rule in vars(torch.optim).values()
    if inspect.isclass(rule) and issubclass(rule, torch.optim.Optimizer) and rule is not torch.optim.Optimizer
]  # fmt: skip
SPARSE = (torch.optim.SparseAdam,)  # takes sparse gradients alone
CLOSURE = (torch.optim.LBFGS,)  # needs a closure
MATRICES = ("Muon",)  # takes matrices alone
RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": partial(torch.optim.Adam, lr=0.01),
}

X, Y = torch.randn(16, 5, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


def nearest(wl: int, fl: int) -> Callable[[Tensor], Tensor]:
    return lambda x: fixed_point_quantize(x, wl, fl, rounding="nearest")


def stochastic(wl: int, fl: int) -> Callable[[Tensor], Tensor]:
    return quantizer(FixedPoint(wl, fl))


FORMATS: dict[str, dict[str, Any]] = {
    "plain": {"weight_quant": (8, 5), "grad_quant": (8, 8), "momentum_quant": (8, 6), "grad_scaling": 2.0},
    "accumulators": {"weight_quant": (8, 5), "grad_quant": (16, 12), "momentum_quant": (16, 10), "acc_quant": (16, 12)},
}


def functions(formats: str, way: Callable[[int, int], Callable[[Tensor], Tensor]] = nearest) -> dict[str, Any]:
    return {name: way(*value) if isinstance(value, tuple) else value for name, value in FORMATS[formats].items()}


def network(seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def backward(model: nn.Module) -> Tensor:
    model.zero_grad()
    loss = functional.cross_entropy(model(X), Y)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def numbers(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def on_grid(model: nn.Module, fl: int) -> bool:
    return all(torch.equal(p * 2.0**fl, (p * 2.0**fl).round()) for p in numbers(model))


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6) -> list[Tensor]:
    for _ in range(steps):
        backward(model)
        optimizer.step()
    return numbers(model)


def by_hand(formats: str, steps: int = 6) -> list[Tensor]:
    """SGD with momentum 0.9, lr 0.1 and weight decay 1e-3, written out."""
    how, model = functions(formats), network()
    weights, momenta = [p.data for p in model.parameters()], [torch.zeros_like(p) for p in model.parameters()]
    wide = [w.clone() for w in weights]
    for _ in range(steps):
        backward(model)
        for p, w, m, acc in zip(model.parameters(), weights, momenta, wide, strict=True):
            assert p.grad is not None
            base = acc if "acc_quant" in how else w
            m.mul_(0.9).add_(how["grad_quant"](p.grad * how.get("grad_scaling", 1.0)).add(base, alpha=1e-3))
            moved = base.add(m, alpha=-0.1)
            acc.copy_(how["acc_quant"](moved) if "acc_quant" in how else moved)
            w.copy_(how["weight_quant"](acc))
            m.copy_(how["momentum_quant"](m))
    return weights


@pytest.mark.parametrize("formats", FORMATS)
def test_a_loop_by_hand_gives_the_same(formats: str) -> None:
    model = network()
    done = run(model, OptimLP(RULES["momentum"](model.parameters()), **functions(formats)))
    assert equal(done, by_hand(formats))
    assert on_grid(model, 5) and not equal(done, numbers(network()))


def _qtorch() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it compiles itself as it is imported
        try:
            parts = importlib.import_module("qtorch.optim"), importlib.import_module("qtorch.quant")
        except Exception as error:  # also of a compiler that is not there
            pytest.skip(f"QPyTorch cannot be imported: {error!r}"[:200])
    return parts[0].OptimLP, parts[1].fixed_point_quantize


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("rule", RULES)
def test_qpytorch_gives_the_same(rule: str, formats: str) -> None:
    theirs, rounding = _qtorch()

    def their_way(wl: int, fl: int) -> Callable[[Tensor], Tensor]:
        return lambda x: rounding(x, wl, fl, rounding="nearest")

    model, twin = network(), network()
    optimizer = OptimLP(RULES[rule](model.parameters()), **functions(formats))
    other = theirs(RULES[rule](twin.parameters()), **functions(formats, their_way))
    for _ in range(8):
        assert equal(run(model, optimizer, 1), run(twin, other, 1))
    for parameter, same in zip(model.parameters(), twin.parameters(), strict=True):
        for name, value in optimizer.state[parameter].items():
            assert torch.equal(value, other.optim.state[same][name])


def _constructed(rule: Any, model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    if rule.__name__ in MATRICES:
        parameters = [p for p in parameters if p.dim() == 2]
    optimizer: torch.optim.Optimizer = rule(parameters)
    for group in optimizer.param_groups:
        group["lr"] = max(group["lr"], 0.1)  # steps of 0.001 would be too small for 12 bits
    return optimizer


def _step(rule: Any, model: nn.Module, optimizer: OptimLP) -> None:
    def closure() -> Tensor:
        loss = backward(model)
        if rule in SPARSE:
            for p in model.parameters():
                assert p.grad is not None
                p.grad = p.grad.to_sparse()
        return loss

    if rule in CLOSURE:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_every_optimizer(rule: Any, formats: str) -> None:
    """Its weights, gradients and momenta are rounded, no tensor is replaced, and a copy resumes to the same bits."""
    model = network()
    for parameter in model.parameters():
        parameter.data.mul_(32).round_().div_(32)
    optimizer = OptimLP(_constructed(rule, model), **functions(formats))
    places = [parameter.data_ptr() for parameter in model.parameters()]
    for _ in range(3):
        _step(rule, model, optimizer)
    assert on_grid(model, 5) and [parameter.data_ptr() for parameter in model.parameters()] == places
    wide = [*optimizer.weight_acc.values()]
    assert all(torch.equal(value * 2.0**12, (value * 2.0**12).round()) for value in wide)
    assert formats == "plain" or any(not torch.equal(w, p) for p, w in optimizer.weight_acc.items())

    twin = network(seed=4)
    twin.load_state_dict(model.state_dict())
    resumed = OptimLP(_constructed(rule, twin), **functions(formats))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        _step(rule, model, optimizer)
        _step(rule, twin, resumed)
    assert equal(numbers(model), numbers(twin))
    assert equal([*optimizer.weight_acc.values()], [*resumed.weight_acc.values()])


def test_momenta_of_every_kind_are_rounded_and_counters_are_not() -> None:
    model = network()
    model.register_parameter("gain", nn.Parameter(torch.tensor(1.0)))  # of the shape of Adam's step
    optimizer = OptimLP(torch.optim.Adam(model.parameters(), amsgrad=True), momentum_quant=lambda x: x * 0 + 2)
    backward(model)
    model.get_parameter("gain").grad = torch.tensor(0.1)
    optimizer.step()
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 1
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(state[name], torch.full_like(parameter, 2.0))


def test_parameters_without_gradients() -> None:
    """They are rounded as the others, and Adam begins their state when a gradient comes, after a resume too."""
    model = network()
    optimizer = OptimLP(RULES["adam"](model.parameters()), **functions("accumulators"))
    backward(model)
    model[0].bias.grad = None
    optimizer.step()
    assert on_grid(model, 5) and model[0].bias not in optimizer.state
    twin = copy.deepcopy(model)
    resumed = OptimLP(RULES["adam"](twin.parameters()), **functions("accumulators"))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin[0].bias in resumed.weight_acc and twin[0].bias not in resumed.state
    assert equal(run(model, optimizer), run(twin, resumed))


def test_stochastic_steps_resume_to_the_same_bits() -> None:
    model = network()
    optimizer = OptimLP(RULES["momentum"](model.parameters()), **functions("accumulators", stochastic))
    run(model, optimizer)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(9)
    through = run(model, optimizer)
    twin = network(seed=5)
    resumed = OptimLP(RULES["momentum"](twin.parameters()), **functions("accumulators", stochastic))
    twin.load_state_dict(weights)
    resumed.load_state_dict(state)
    torch.manual_seed(9)
    assert equal(run(twin, resumed), through)


def test_loading_copies_the_accumulators() -> None:
    model, twin = network(), network()
    optimizer = OptimLP(RULES["sgd"](model.parameters()), **functions("accumulators"))
    run(model, optimizer)
    other = OptimLP(RULES["sgd"](twin.parameters()), **functions("accumulators"))
    other.load_state_dict(optimizer.state_dict())
    before = [value.clone() for value in optimizer.weight_acc.values()]
    run(twin, other)
    assert equal([*optimizer.weight_acc.values()], before)


def test_a_sparse_gradient_is_rounded_after_its_parts_are_added() -> None:
    rows = nn.Embedding(4, 2, sparse=True)
    optimizer = OptimLP(torch.optim.SGD(rows.parameters(), lr=1.0), grad_quant=nearest(8, 0))
    rows.weight.data.zero_()
    (rows(torch.tensor([1, 1, 3])) * 0.4).sum().backward()  # two parts of 0.4 become 1, one becomes 0
    optimizer.step()
    assert rows.weight.tolist() == [[0.0, 0.0], [-1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_go_on_alike(again: Callable[[Any], Any]) -> None:
    rounding = partial(fixed_point_quantize, wl=8, fl=5, rounding="nearest")
    model = network()
    wide = quantizer(FixedPoint(16, 12), forward_rounding="nearest")
    optimizer = OptimLP(RULES["momentum"](model.parameters()), rounding, acc_quant=wide)
    run(model, optimizer)
    twin, other = again((model, optimizer))
    assert equal(run(twin, other), run(model, optimizer))
    assert "weight_acc" in other.state_dict()["state"][0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("formats", FORMATS)
def test_a_closure_gives_the_loss_and_the_same_weights(rule: str, formats: str) -> None:
    model, twin = network(), network()
    optimizer = OptimLP(RULES[rule](model.parameters()), **functions(formats, stochastic))
    other = OptimLP(RULES[rule](twin.parameters()), **functions(formats, stochastic))
    for step in range(4):
        torch.manual_seed(step)
        expected = backward(model)
        optimizer.step()
        torch.manual_seed(step)
        loss = other.step(lambda: backward(twin))
        assert torch.equal(loss, expected) and equal(numbers(model), numbers(twin))


@pytest.mark.parametrize("formats", FORMATS)
def test_every_evaluation_of_lbfgs_sees_rounded_weights(formats: str) -> None:
    model = network()
    rule = torch.optim.LBFGS(model.parameters(), max_iter=6, line_search_fn="strong_wolfe")
    optimizer = OptimLP(rule, **functions(formats))
    seen: list[bool] = []

    def closure() -> Tensor:
        seen.append(on_grid(model, 5))
        return backward(model)

    first = float(optimizer.step(closure))
    assert len(seen) > 3 and all(seen[1:])  # the first weights are those that the model came with
    seen.clear()
    losses = [float(optimizer.step(closure)) for _ in range(4)]
    assert len(seen) > 3 and all(seen) and losses[-1] < first


def test_an_error_in_the_closure_leaves_rounded_weights() -> None:
    model = network()
    optimizer = OptimLP(torch.optim.LBFGS(model.parameters()), **functions("accumulators"))
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("no more")
        return backward(model)

    with pytest.raises(RuntimeError, match="no more"):
        optimizer.step(closure)
    assert on_grid(model, 5)


def test_views_of_the_weights_stay_views() -> None:
    model = network()
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    done = run(model, OptimLP(RULES["adam"](model.parameters()), **functions("accumulators")))
    assert torch.equal(nn.utils.parameters_to_vector(done), flat)


def test_groups_schedules_and_zero_grad() -> None:
    model = network()
    inner = RULES["momentum"](model[0].parameters())
    optimizer = OptimLP(inner, nearest(8, 5))
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})
    assert [group["lr"] for group in inner.param_groups] == [0.1, 0.5]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run(model, optimizer, 1)
    schedule.step()
    assert [group["lr"] for group in inner.param_groups] == [0.05, 0.25]
    inner.load_state_dict(inner.state_dict())  # makes new groups
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    assert on_grid(model, 5)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert isinstance(optimizer, torch.optim.Optimizer) and repr(optimizer).startswith("OptimLP(SGD")


def test_hooks_of_the_outer_optimizer_run() -> None:
    model = network()
    met: list[object] = []
    optimizer = OptimLP(RULES["momentum"](model.parameters()), **functions("accumulators"))
    optimizer.register_step_post_hook(lambda *_: met.append("step"))
    optimizer.register_state_dict_post_hook(lambda _, state: met.append("weight_acc" in state["state"][0]))
    run(model, optimizer, 1)
    optimizer.state_dict()
    assert met == ["step", True]


def test_weights_of_another_optimizer_are_taken_over() -> None:
    """A state without accumulators: they begin anew, with the weights."""
    model = network()
    inner = RULES["momentum"](model.parameters())
    run(model, inner, 2)
    optimizer = OptimLP(RULES["momentum"](model.parameters()), **functions("accumulators"))
    run(model, optimizer, 1)
    assert len(optimizer.weight_acc) == 4
    optimizer.load_state_dict(inner.state_dict())
    assert not optimizer.weight_acc


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optim": torch.optim.SGD}, "wraps an optimizer of torch.optim, got SGD"),
        ({"optim": [1]}, "wraps an optimizer of torch.optim, got list"),
        ({"weight_quant": FixedPoint(8, 4)}, r"weight_quant is a function of a tensor.*got FixedPoint\(wl=8"),
        ({"acc_quant": "nearest"}, "acc_quant is a function of a tensor"),
        ({"grad_scaling": 0.0}, "grad_scaling is a number above 0, got 0.0"),
        ({"grad_scaling": math.inf}, "grad_scaling is a number above 0, got inf"),
        ({"grad_scaling": "2"}, "grad_scaling is a number above 0, got '2'"),
        ({"grad_scaling": 2.0}, "grad_scaling 2.0 needs a grad_quant"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], says: str) -> None:
    arguments = {"optim": torch.optim.SGD(network().parameters()), **change}
    with pytest.raises(ConfigError, match=says):
        OptimLP(**arguments)


def test_what_does_not_fit_later_is_refused() -> None:
    model = network()
    with pytest.raises(ConfigError, match="got OptimLP"):
        OptimLP(OptimLP(torch.optim.SGD(model.parameters())))
    with pytest.raises(ConfigError, match=r"weight_quant returns a tensor of the shape it is given, \(7, 5\); got sh"):
        run(model, OptimLP(torch.optim.SGD(model.parameters()), lambda x: x.flatten()))
    with pytest.raises(ConfigError, match=r"grad_quant returns a tensor .* got NoneType"):
        run(model, OptimLP(torch.optim.SGD(model.parameters()), grad_quant=lambda x: None))  # type: ignore[arg-type, return-value]
    wide = OptimLP(torch.optim.SGD(model.parameters()), **functions("accumulators"))
    run(model, wide, 1)
    with pytest.raises(ConfigError, match="has accumulators, but this OptimLP has no acc_quant"):
        OptimLP(torch.optim.SGD(model.parameters())).load_state_dict(wide.state_dict())
