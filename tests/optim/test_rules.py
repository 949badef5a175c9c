"""Every update rule against PyTorch's own plain (not fused) optimizer, and what each rule refuses."""

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

from windlass.errors import ConfigError
from windlass.optim.build import build_optimizer, set_learning_rate
from windlass.optim.rules import UPDATE_RULES, UpdateRule

OTHERS = ("name", "scaling", "base_batch")
HYPER_PARAMETERS = [field.name for field in fields(UpdateRule) if field.name not in OTHERS]
SET = {
    "lr": 0.02, "momentum": 0.7, "dampening": 0.25, "weight_decay": 0.03,
    "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "lr_decay": 0.1,
}  # fmt: skip
"""A value for every hyper-parameter that no rule has as its default."""


def rule_of(name: str, **numbers: Any) -> UpdateRule:
    return UpdateRule(name=name, **numbers)


def set_by_hand(name: str) -> UpdateRule:
    return rule_of(name, **{key: SET[key] for key in UPDATE_RULES[name].defaults})


def plain_optimizer(rule: UpdateRule, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Written out rule by rule, so that a wrong row of the table cannot agree with itself."""
    h = rule.hyper_parameters()
    options = {"fused": False, "foreach": False}
    lr, decay = h["lr"], h["weight_decay"]
    match rule.name:
        case "sgd":
            return torch.optim.SGD(parameters, lr, weight_decay=decay, **options)
        case "momentum":
            momentum, dampening = h["momentum"], h["dampening"]
            return torch.optim.SGD(parameters, lr, momentum, dampening, weight_decay=decay, **options)
        case "nesterov":
            return torch.optim.SGD(parameters, lr, h["momentum"], weight_decay=decay, nesterov=True, **options)
        case "adagrad":
            return torch.optim.Adagrad(parameters, lr, h["lr_decay"], decay, eps=h["eps"], **options)
        case "adam":
            betas = (h["beta1"], h["beta2"])
            return torch.optim.Adam(parameters, lr, betas, h["eps"], weight_decay=decay, **options)
        case "adamw":
            betas = (h["beta1"], h["beta2"])
            return torch.optim.AdamW(parameters, lr, betas, h["eps"], weight_decay=decay, **options)
    raise AssertionError(f"no plain optimizer for {rule.name}: write it here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("name", UPDATE_RULES)
def test_five_steps_are_those_of_pytorchs_plain_optimizer(name: str, by_hand: bool, dtype: torch.dtype) -> None:
    rule = set_by_hand(name) if by_hand else UpdateRule(name=name)
    generator = torch.Generator().manual_seed(1)
    starts = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((7, 3), (5,), (1,))]
    ours = [nn.Parameter(start.clone()) for start in starts]
    theirs = [nn.Parameter(start.clone()) for start in starts]
    optimizer, plain = build_optimizer(rule, ours), plain_optimizer(rule, theirs)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=dtype)
            b.grad = a.grad.clone()
        optimizer.step()
        plain.step()
    # A step is at most 16 roundings of numbers no larger than the parameter (|w| < 4) or the update; the two
    # implementations may round in another order: 5 steps · 16 · eps · 4.  In float64 nothing but rounding hides
    # below that.
    tolerance = 5 * 16 * torch.finfo(dtype).eps * 4
    for a, b, start in zip(ours, theirs, starts, strict=True):
        assert (a - b).abs().max() <= tolerance
        assert (a - start).abs().max() > 10 * tolerance


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_every_rule_runs_fused(name: str) -> None:
    optimizer = build_optimizer(UpdateRule(name=name), [nn.Parameter(torch.zeros(2))])
    assert optimizer.defaults["fused"] is True


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_the_learning_rate_can_be_set(name: str) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(UpdateRule(name=name), [parameter])
    set_learning_rate(optimizer, 0.0)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert parameter.tolist() == [1.0, 1.0, 1.0]
    set_learning_rate(optimizer, 0.5)
    optimizer.step()
    assert (parameter < 1).all()


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_what_is_set_by_hand_overrides_the_default_and_nothing_else(name: str) -> None:
    defaults = UPDATE_RULES[name].defaults
    assert UpdateRule(name=name).hyper_parameters() == defaults
    for key in defaults:
        rule = rule_of(name, **{key: SET[key]})
        assert rule.hyper_parameters() == defaults | {key: SET[key]}
    assert UpdateRule(name=name, lr=0.5).base_lr == 0.5
    assert UpdateRule(name=name).base_lr == defaults["lr"]


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_a_hyper_parameter_that_a_rule_does_not_have_is_refused_with_those_it_has(name: str) -> None:
    accepted = UPDATE_RULES[name].defaults
    for key in set(HYPER_PARAMETERS) - set(accepted):
        with pytest.raises(ConfigError) as caught:
            rule_of(name, **{key: SET[key]})
        assert str(caught.value) == f"update.{key}: {name} has no {key}; it has: {', '.join(accepted)}"


@pytest.mark.parametrize("name", UPDATE_RULES)
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_negative_and_non_finite_numbers_are_refused(name: str, value: float) -> None:
    for key in UPDATE_RULES[name].defaults:
        with pytest.raises(ConfigError, match=f"^update.{key}: needs a finite number of at least 0, got"):
            rule_of(name, **{key: value})


@pytest.mark.parametrize(("name", "key"), [("momentum", "momentum"), ("adam", "beta1"), ("adamw", "beta2")])
def test_shares_of_the_past_stay_below_one(name: str, key: str) -> None:
    rule_of(name, **{key: 0.999999})
    with pytest.raises(ConfigError, match=f"^update.{key}: needs a number below 1, got 1"):
        rule_of(name, **{key: 1.0})


def test_dampening_may_be_one_but_nesterov_needs_momentum() -> None:
    UpdateRule(name="momentum", dampening=1.0)
    UpdateRule(name="momentum", momentum=0.0)
    with pytest.raises(ConfigError, match=r"^update\.momentum: nesterov needs a number above 0"):
        UpdateRule(name="nesterov", momentum=0.0)  # PyTorch would raise a ValueError in the middle of a run


def test_an_unknown_rule_is_refused_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"^update\.name: unknown update rule 'adm'; did you mean 'adam'"):
        UpdateRule(name="adm")


def test_scaling_by_root_is_krizhevskys_example_and_forgets_as_much() -> None:
    """Section 4: from 128 to 1024 with ε = 0.01, w = 0.0005 gives ε' = √8 * 0.01, w' = 0.0014141."""
    rule = UpdateRule(lr=0.01, weight_decay=0.0005, scaling="sqrt").for_batch(1024)
    assert rule.base_lr == pytest.approx(math.sqrt(8) * 0.01)
    decay = rule.hyper_parameters()["weight_decay"]
    assert decay == pytest.approx(0.0014142, abs=5e-8)
    assert 1 - rule.base_lr * decay == pytest.approx((1 - 0.01 * 0.0005) ** 8, rel=1e-12)
    assert rule.for_batch(1024) == rule, "a rule is scaled once"


def test_linear_scaling_leaves_the_decay_and_none_both() -> None:
    linear = UpdateRule(name="adamw", lr=0.01, weight_decay=0.0005, scaling="linear", base_batch=64).for_batch(32)
    assert linear.hyper_parameters() == UpdateRule(name="adamw", lr=0.005, weight_decay=0.0005).hyper_parameters()
    plain = UpdateRule(lr=0.01)
    assert plain.for_batch(1024).hyper_parameters() == plain.hyper_parameters()


@pytest.mark.parametrize(("lr", "decay"), [(0.0, 0.1), (0.1, 0.0), (2.0, 0.5), (3.0, 0.5)])
def test_scaling_by_root_at_its_ends(lr: float, decay: float) -> None:
    rule = UpdateRule(lr=lr, weight_decay=decay, scaling="sqrt", base_batch=1).for_batch(4)
    ends = {(0.0, 0.1): 2 * decay, (0.1, 0.0): 0.0, (2.0, 0.5): 1 / 4.0, (3.0, 0.5): 1 / 6.0}
    assert rule.hyper_parameters()["weight_decay"] == pytest.approx(ends[lr, decay])


def test_unknown_scalings_and_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"update.scaling: unknown scaling 'root'; did you mean 'sqrt'|linear"):
        UpdateRule(scaling="root")
    with pytest.raises(ConfigError, match=r"update.base_batch: needs a number of at least 1, got 0"):
        UpdateRule(base_batch=0)
