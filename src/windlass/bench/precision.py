"""Gupta et al.'s experiment: training in fixed point of 16 bits, rounded to nearest or stochastically.

S. Gupta, A. Agrawal, K. Gopalakrishnan, P. Narayanan, "Deep Learning with Limited Numerical Precision" (ICML 2015):
networks for MNIST are trained in float32 and in WL = 16 bits with several numbers FL of fraction bits.  Weights,
errors, weight gradients and updates are kept as ⟨16 - FL, FL⟩, and no float32 copy of the weights exists.  Layer
outputs are ⟨6,10⟩, as in the paper's convolutional network; those of the fully connected one have fewer fraction bits
where its weights do, ⟨8,8⟩ beside ⟨8,8⟩.  They have no more, since their range does not allow it: in ⟨2,14⟩, -2 to 2,
its outputs saturate, and training breaks off at the second or third epoch under stochastic rounding too.

The convolutional network is trained as in the paper: learning rate 0.1, times 0.95 after each epoch, momentum 0.9,
weight decay 5e-4.  Its weights begin with a deviation of 0.02: with the 0.01 of the fully connected network float32
itself does not leave the beginning in one of four seeds on 8,000 samples.  The fully connected network has plain SGD
with the rate 0.1.  Minibatches are of 100, biases begin with 0, pixels are in [0, 1].

Errors are those of each sample's own loss (`windlass.plan.recipe`); the momentum is the optimizer's and stays float32.
All ways of a seed begin with the same weights and see the same samples in the same order.

What is here needs no PyTorch: the ways, their recipes, and rows made of results.  `precision_run` trains,
`precision_pool` puts the runs on cores.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from windlass.errors import ConfigError, unknown
from windlass.plan.number import ROUNDINGS, Fixed, Rounding, check_rounding, fixed
from windlass.plan.recipe import PRESETS, Recipe

WL = 16
"""Bits of a number, in all ways but float32."""
FLS = range(1, WL)
"""Fraction bits that leave the sign and need a point."""
FLOAT32 = "float32"
TOLERANCE = 0.3
"""Percentage points of test error by which a way counts as good as float32."""
STALLED = 0.95
"""A run whose training loss is in the end still above this share of guessing's, the logarithm of the number of classes,
has learned nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperNetwork:
    """A network of the paper with its training.

    Attributes:
        title: what it is made of.
        learning_rate, decay: of the first epoch, and what it is multiplied by after each.
        momentum, weight_decay: of SGD.
        weight_deviation: of the normal distribution from which weights are drawn.
        epochs: of a run, where nothing else is said.
        num_seeds: of each way, where nothing else is said: the more the runs scatter, the more.
        min_size: side of the smallest image it takes.
        output_fl: fraction bits of layer outputs, at most; the integer bits are the rest of 16.
        outputs_follow: whether layer outputs have no more fraction bits than weights.
    """

    title: str
    learning_rate: float
    decay: float
    momentum: float
    weight_decay: float
    weight_deviation: float
    epochs: int
    num_seeds: int
    min_size: int
    output_fl: int = 10
    outputs_follow: bool

    def outputs(self, fl: int) -> Fixed:
        """The format of layer outputs where weights have `fl` fraction bits."""
        return fixed(WL, min(fl, self.output_fl) if self.outputs_follow else self.output_fl)


PAPER_NETWORKS: dict[str, PaperNetwork] = {
    "dnn": PaperNetwork(
        title="pixels, 1000 ReLU, 1000 ReLU, classes",
        learning_rate=0.1,
        decay=1.0,
        momentum=0.0,
        weight_decay=0.0,
        weight_deviation=0.01,
        epochs=15,
        num_seeds=3,
        min_size=1,
        outputs_follow=True,
    ),
    "cnn": PaperNetwork(
        title="conv 5×5 to 8 and to 16 maps, each with ReLU and 2×2 max-pool, 128 ReLU, classes",
        learning_rate=0.1,
        decay=0.95,
        momentum=0.9,
        weight_decay=5e-4,
        weight_deviation=0.02,
        epochs=20,
        num_seeds=5,
        min_size=16,
        outputs_follow=False,
    ),
}


@dataclass(frozen=True, slots=True)
class Way:
    """How numbers are kept: float32, or WL = 16 with `fl` fraction bits, rounded so.

    >>> str(Way()), str(Way(12, "nearest"))
    ('float32', 'nearest, FL 12')
    """

    fl: int | None = None
    rounding: Rounding = "stochastic"

    def recipe(self, network: str) -> Recipe:
        """The formats of a network's training."""
        if self.fl is None:
            return PRESETS[FLOAT32]
        number = fixed(WL, self.fl)
        return Recipe(
            weights=number,
            activations=PAPER_NETWORKS[network].outputs(self.fl),
            errors=number,
            gradients=number,
            updates=number,
            rounding=self.rounding,
        )

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands among the others: float32, then rounding after rounding, many fraction bits first."""
        return (-1, 0) if self.fl is None else (ROUNDINGS.index(self.rounding), -self.fl)

    def __str__(self) -> str:
        return FLOAT32 if self.fl is None else f"{self.rounding}, FL {self.fl}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What is trained.

    Attributes:
        data: a source of images, as `windlass.data.open_dataset` reads it.
        networks: keys of `PAPER_NETWORKS`.
        fls: fraction bits, 1 to 15.
        roundings: "stochastic", "nearest" or "floor".
        num_seeds: runs of each way, of the seeds 0, 1, ...; None: each network's own.
        epochs: of each run; None: each network's own.
        batch: samples of a step.
    """

    data: str
    networks: tuple[str, ...] = tuple(PAPER_NETWORKS)
    fls: tuple[int, ...] = (14, 12, 10, 8)
    roundings: tuple[Rounding, ...] = ("stochastic", "nearest")
    num_seeds: int | None = None
    epochs: int | None = None
    batch: int = 100

    def __post_init__(self) -> None:
        for name in self.networks:
            if name not in PAPER_NETWORKS:
                raise ConfigError(unknown("network of the paper", name, PAPER_NETWORKS))
        for fl in self.fls:
            if fl not in FLS:
                raise ConfigError(f"FL of {WL} bits is {FLS.start} to {FLS.stop - 1} here, got {fl}")
        for rounding in self.roundings:
            check_rounding(rounding)
        for what, value in (("seeds", self.num_seeds), ("epochs", self.epochs), ("batch", self.batch)):
            if value is not None and value < 1:
                raise ConfigError(f"{what}: needs at least 1, got {value}")

    def ways(self) -> list[Way]:
        """float32 first, then every rounding with every FL."""
        return [Way(), *(Way(fl, rounding) for rounding in self.roundings for fl in self.fls)]

    def epochs_of(self, network: str) -> int:
        """Epochs of a run of this network."""
        return PAPER_NETWORKS[network].epochs if self.epochs is None else self.epochs

    def seeds_of(self, network: str) -> range:
        """Seeds of this network's runs."""
        return range(PAPER_NETWORKS[network].num_seeds if self.num_seeds is None else self.num_seeds)

    def runs(self) -> list[Run]:
        """Every run, seed after seed, so that a broken experiment has something of everything."""
        found = [
            Run(network=network, way=way, seed=seed, epochs=self.epochs_of(network))
            for network in self.networks
            for way in self.ways()
            for seed in self.seeds_of(network)
        ]
        return sorted(found, key=lambda run: run.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run."""

    network: str
    way: Way
    seed: int
    epochs: int

    def __str__(self) -> str:
        return f"{self.network}, {self.way}, seed {self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What is known after an epoch.

    Attributes:
        epoch: from 1.
        test_error: percent of the test samples that are taken for another class, rounded to nearest.
        train_loss: mean over the epoch's steps.
        zeroed: of the updates that were not zero, the share that rounding made zero in this epoch; None in float32.
        moved: of all updates, the share that was not zero after rounding.
        still: parameters of which no element moved in this epoch.
        num_parameters: how many parameters (tensors) there are.
        saturated: share of layer outputs that were out of range.
    """

    epoch: int
    test_error: float
    train_loss: float
    zeroed: float | None = None
    moved: float | None = None
    still: tuple[str, ...] = ()
    num_parameters: int = 0
    saturated: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run."""

    run: Run
    points: tuple[Point, ...]
    num_classes: int
    seconds: float

    @property
    def has_stalled(self) -> bool:
        """Whether it has learned nothing; in the paper because updates all round to zero."""
        return self.points[-1].train_loss > STALLED * math.log(self.num_classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionRow:
    """One way of one network over its finished seeds.

    Attributes:
        network, way, recipe: which; the recipe as the plan's lever holds it.
        seeds: whose runs are finished.
        test_error, low, high: after the last epoch, percent: mean, least and most over the seeds.
        difference: mean minus float32's over the same seeds, in percentage points; None while there are none.
        standard_error: of the difference, from its scatter over the seeds; None for fewer than two.
        train_loss: mean over the seeds, of the last epoch.
        zeroed, moved: as a `Point`'s, of the last epoch, mean over the seeds.
        still: parameters of which no element moved in the last epoch, in the worst seed.
        stalled: seeds whose runs have stalled.
        num_parameters: how many parameters there are.
        verdict: in words.
        seconds: of a run, median.
    """

    network: str
    way: str
    recipe: str
    seeds: tuple[int, ...]
    test_error: float
    low: float
    high: float
    difference: float | None
    standard_error: float | None
    train_loss: float
    zeroed: float | None
    moved: float | None
    still: int
    stalled: tuple[int, ...]
    num_parameters: int
    verdict: str
    seconds: float


def rows_of(results: Sequence[RunResult]) -> list[PrecisionRow]:
    """A row for each network and way that has finished runs, in the order of the experiment."""
    groups: dict[tuple[str, Way], list[RunResult]] = {}
    for result in results:
        groups.setdefault((result.run.network, result.run.way), []).append(result)
    rows = []
    for network, way in sorted(groups, key=lambda group: (list(PAPER_NETWORKS).index(group[0]), group[1].place)):
        mine = sorted(groups[network, way], key=lambda result: result.run.seed)
        rows.append(_row(mine, groups.get((network, Way()), [])))
    return rows


def _row(mine: Sequence[RunResult], plain: Sequence[RunResult]) -> PrecisionRow:
    run, last = mine[0].run, [result.points[-1] for result in mine]
    errors = [point.test_error for point in last]
    theirs = {result.run.seed: result.points[-1].test_error for result in plain}
    differences = [
        point.test_error - theirs[one.run.seed] for one, point in zip(mine, last, strict=True) if one.run.seed in theirs
    ]
    difference = statistics.fmean(differences) if differences else None
    stalled = tuple(result.run.seed for result in mine if result.has_stalled)
    return PrecisionRow(
        network=run.network,
        way=str(run.way),
        recipe=str(run.way.recipe(run.network)),
        seeds=tuple(result.run.seed for result in mine),
        test_error=statistics.fmean(errors),
        low=min(errors),
        high=max(errors),
        difference=difference,
        standard_error=None if run.way.fl is None else _standard_error(differences),
        train_loss=statistics.fmean(point.train_loss for point in last),
        zeroed=_mean([point.zeroed for point in last]),
        moved=_mean([point.moved for point in last]),
        still=max(len(point.still) for point in last),
        stalled=stalled,
        num_parameters=last[0].num_parameters,
        verdict="" if run.way.fl is None else verdict(difference, num_stalled=len(stalled), num_seeds=len(mine)),
        seconds=statistics.median(result.seconds for result in mine),
    )


def verdict(difference: float | None, *, num_stalled: int, num_seeds: int) -> str:
    """What became of a way, in words.

    >>> verdict(0.2, num_stalled=0, num_seeds=3), verdict(1.25, num_stalled=0, num_seeds=3)
    ('within 0.3 points', 'worse by 1.25 points')
    >>> verdict(86.0, num_stalled=3, num_seeds=3), verdict(28.7, num_stalled=1, num_seeds=3)
    ('stalls', 'stalls with 1 of 3 seeds')
    """
    if difference is None:
        return ""
    if difference < -TOLERANCE:
        return f"better by {-difference:.2f} points"
    if difference <= TOLERANCE + 1e-9:
        return f"within {TOLERANCE:g} points"
    if num_stalled:
        return "stalls" if num_stalled == num_seeds else f"stalls with {num_stalled} of {num_seeds} seeds"
    return f"worse by {difference:.2f} points"


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def results_to_json(results: Sequence[RunResult], experiment: Experiment, machine: dict[str, Any]) -> str:
    """The finished runs with every epoch, and the rows made of them, as JSON."""
    found = {
        "machine": machine,
        "experiment": asdict(experiment),
        "recipes": {
            network: {str(way): str(way.recipe(network)) for way in experiment.ways()}
            for network in experiment.networks
        },
        "rows": [asdict(row) for row in rows_of(results)],
        "runs": [
            {
                "network": result.run.network,
                "way": str(result.run.way),
                "fl": result.run.way.fl,
                "rounding": None if result.run.way.fl is None else result.run.way.rounding,
                "seed": result.run.seed,
                "num_classes": result.num_classes,
                "seconds": result.seconds,
                "points": [asdict(point) for point in result.points],
            }
            for result in results
        ],
    }
    return json.dumps(found, indent=1) + "\n"
