"""What a training step costs under a recipe: beside float32 and QPyTorch, interleaved in one process.

A step is forward, loss, backward and the optimizer's step, SGD with momentum, on the same weights and images.
QPyTorch is used as its examples do: a `Quantizer` with fixed point in both directions after every convolution, linear
layer, normalisation, pooling and activation (here every module without modules of its own but those that compute
nothing), and `OptimLP` with quantisers of weights, gradients and momentum.  It simulates: nothing is stored in 16 bits.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from windlass.bench.conv import quartiles
from windlass.networks import NETWORKS, build_network
from windlass.plan.number import Fixed
from windlass.plan.recipe import Recipe, parse_recipe
from windlass.precision import apply

FLOAT32 = "float32"
QPYTORCH = "QPyTorch"
QPYTORCH_EVERY = 3
"""QPyTorch takes part in every third turn only, since its steps are long."""
COMPUTES_NOTHING = (nn.Identity, nn.Flatten, nn.Dropout)
WARM_UP = 2
"""Turns that are not counted; QPyTorch takes part in the first."""
TURN_S = 0.05
"""A turn has as many steps as float32 makes in this time, one at least: as in training, one finds the caches as the one
before has left them."""
Step = Callable[[], float]

SIZES: dict[str, tuple[tuple[int, int], ...]] = {"lenet5": ((32, 64), (32, 256)), "resnet18": ((32, 64), (224, 8))}
"""Of a network: sides of its images, and the images of a step.  Others: their own size, 8 images."""
OTHER_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CostCase:
    """A network with the images of a step."""

    network: str
    batch: int
    size: int
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"{self.network}, {self.batch}×{NETWORKS[self.network].in_channels}×{self.size}×{self.size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRow:
    """One way to make a step.

    Attributes:
        case: which network and images.
        by: the recipe, float32, or QPyTorch.
        turns: measured.
        seconds, low_s, high_s: of a step: median and quartiles.
        times_float32, times_low, times_high: a step's time over float32's in the same turn: median and quartiles.
        first_loss, last_loss: so that it is seen to train.
    """

    case: str
    by: str
    turns: int
    seconds: float
    low_s: float
    high_s: float
    times_float32: float
    times_low: float
    times_high: float
    first_loss: float
    last_loss: float


def cost_cases(networks: Sequence[str], *, batch: int | None, layout: str) -> list[CostCase]:
    """What is measured of these networks; a `batch` is taken at every size once."""
    cases = []
    for name in networks:
        entry = NETWORKS[name]
        known = SIZES.get(name, ((entry.default_size, OTHER_BATCH),))
        chosen = known if batch is None else dict.fromkeys((size, batch) for size, _ in known)
        cases += [CostCase(network=name, batch=images, size=size, layout=layout) for size, images in chosen]
    return cases


def num_steps(cases: Sequence[CostCase], turns: int) -> int:
    """Steps of all ways together, those that warm up among them."""
    return len(cases) * (2 * (turns + WARM_UP) + 1 + -(-turns // QPYTORCH_EVERY))


def bench_cost(
    cases: Sequence[CostCase], recipe: str, *, turns: int, on_turn: Callable[[str], None]
) -> tuple[list[CostRow], list[str]]:
    """Measures on PyTorch's threads, in turns, each beginning with another way.

    Returns:
        The rows, and what is missing and why.
    """
    rows: list[CostRow] = []
    notes: list[str] = []
    for case in cases:
        steps, missing = _steps(case, recipe)
        notes += [note for note in missing if note not in notes]
        seconds, losses = _measure(case, steps, turns=turns, on_turn=on_turn)
        rows += [_row(case, by, seconds, losses[by]) for by in steps]
    return rows, notes


def _measure(
    case: CostCase, steps: dict[str, Step], *, turns: int, on_turn: Callable[[str], None]
) -> tuple[dict[str, dict[int, float]], dict[str, list[float]]]:
    """Seconds by way and turn, and losses by way."""
    seconds: dict[str, dict[int, float]] = {by: {} for by in steps}
    losses: dict[str, list[float]] = {by: [] for by in steps}
    names = list(steps)
    repeats = told = 1
    for turn in range(-WARM_UP, turns):
        first = turn % len(names)
        for by in names[first:] + names[:first]:
            if by == QPYTORCH and turn > -WARM_UP and turn % QPYTORCH_EVERY:
                continue
            on_turn(f"{case}, {by}")
            started = time.perf_counter()
            losses[by] += [steps[by]() for _ in range(repeats)]
            taken = (time.perf_counter() - started) / repeats
            if turn >= 0:
                seconds[by][turn] = taken
            elif turn == -1 and by == FLOAT32:
                told = max(1, round(TURN_S / taken))
        repeats = told if turn == -1 else repeats
    return seconds, losses


def _row(case: CostCase, by: str, seconds: dict[str, dict[int, float]], losses: Sequence[float]) -> CostRow:
    mine, plain = seconds[by], seconds[FLOAT32]
    low, median, high = quartiles(list(mine.values()))
    times_low, times, times_high = quartiles([taken / plain[turn] for turn, taken in mine.items()])
    return CostRow(
        case=str(case),
        by=by,
        turns=len(mine),
        seconds=median,
        low_s=low,
        high_s=high,
        times_float32=times,
        times_low=times_low,
        times_high=times_high,
        first_loss=losses[0],
        last_loss=losses[-1],
    )


def _steps(case: CostCase, recipe: str) -> tuple[dict[str, Step], list[str]]:
    """A training step by every way, and what is missing."""
    steps = {FLOAT32: make_step(case), str(parse_recipe(recipe)): make_step(case, recipe=recipe)}
    try:
        steps[QPYTORCH] = make_qpytorch_step(case, parse_recipe(recipe))
    except Exception as error:  # whatever a package that compiles at import may raise
        return steps, [f"{QPYTORCH}: not here ({type(error).__name__}: {str(error).splitlines()[0][:100]})"]
    return steps, []


def make_step(case: CostCase, *, recipe: str | None = None) -> Step:
    """The textbook training step, under a recipe if one is given; returns its loss."""
    model, images, labels = _training(case)
    optimizer = _optimizer(model)
    if recipe is not None:
        apply(model, optimizer, recipe, seed=0)
    return _step(model, optimizer, images, labels)


def make_qpytorch_step(case: CostCase, recipe: Recipe) -> Step:
    """The same step with QPyTorch's quantisers, in the fixed-point formats of a recipe."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        qtorch, quant = import_module("qtorch"), import_module("qtorch.quant")
        low_precision = import_module("qtorch.optim").OptimLP

    def number(found: object) -> Any:
        assert isinstance(found, Fixed)
        return qtorch.FixedPoint(found.wl, found.fl)

    model, images, labels = _training(case)
    errors = recipe.error_number("", 0.0, case.batch)
    for module in model.modules():
        if not any(module.children()) and not isinstance(module, COMPUTES_NOTHING):
            quantizer = quant.Quantizer(number(recipe.activations), number(errors), "stochastic", "stochastic")
            module.register_forward_hook(lambda module, inputs, output, quantizer=quantizer: quantizer(output))
    of_weights, of_gradients, of_momentum = (
        quant.quantizer(forward_number=number(found), forward_rounding="stochastic")
        for found in (recipe.weights, recipe.gradients, recipe.updates)
    )
    optimizer = low_precision(
        _optimizer(model), weight_quant=of_weights, grad_quant=of_gradients, momentum_quant=of_momentum
    )
    return _step(model, optimizer, images, labels)


def _training(case: CostCase) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, images and labels: the same for every way."""
    torch.manual_seed(0)
    entry = NETWORKS[case.network]
    model = build_network(
        case.network, num_classes=entry.num_classes, in_channels=entry.in_channels, image_size=case.size
    )
    images = torch.randn(case.batch, entry.in_channels, case.size, case.size)
    labels = torch.randint(entry.num_classes, (case.batch,))
    if case.layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    return model.train(), images, labels


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Step:
    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return step


def rows_to_json(rows: Sequence[CostRow], machine: dict[str, Any], *, recipe: str, notes: Sequence[str]) -> str:
    """The results with the machine, as JSON."""
    found = {"machine": machine, "recipe": recipe, "rows": [asdict(row) for row in rows], "notes": list(notes)}
    return json.dumps(found, indent=1) + "\n"
