"""A recipe: in which format every kind of number of a training run is kept, and how it is rounded.

Gupta et al., "Deep Learning with Limited Numerical Precision" (ICML 2015): weights, layer outputs, back-propagated
errors, weight gradients and weight updates are fixed point, each rounded once, after its sum was made in a wide
accumulator.
`ROLES` names those kinds.  Written in one line, as the plan's lever ``number_format`` holds it:

    fixed16
    fixed16,errors=<4,12>,rounding=nearest
    fixed16,conv1.activations=<8,8>,fc*.weights=<4,12>
    fixed16,late=0.8:+4            after 80 % of the run every fixed-point format gets 4 more fraction bits
    fixed16,exchange=16bit         gradients travel between workers as they are kept
    weights=<2,14>,updates=<2,14>  what is not named stays float32

Errors are kept as those of each sample's own loss, as in the paper: where the loss is the mean over a batch, FL grows
by log2 of the batch (``error_scale=batch``), so that a format means the same for every batch; ``error_scale=1``
leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase

from windlass.errors import ConfigError, unknown
from windlass.plan.convolution import ACCURACIES
from windlass.plan.number import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    MAX_FL,
    Fixed,
    NumberFormat,
    Rounding,
    check_rounding,
    fixed,
    parse_format,
)

ROLES = ("weights", "activations", "errors", "gradients", "updates")
"""Kinds of numbers: weights and biases; outputs of layers; gradients of outputs; gradients of weights; what an update
adds to weights."""
CONVOLVED = ("activations", "errors", "gradients")
"""Kinds of numbers that convolutions compute."""
EXCHANGES = ("float32", "16bit")
"""How gradients travel between workers: as they are, or as they are kept; they are summed in 32 bits either way."""
BATCH = "batch"
DISTURBANCE = 1 / 8
"""Share of a format's step by which an algorithm of convolution may be wrong before the rounding that follows."""
DIRECT_ERROR = 3e-7
"""Relative error of direct convolution in float32 (docs/convolution.md)."""


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """Another format for the layers whose paths match a pattern.

    Attributes:
        pattern: of a layer's path, with ``*`` and ``?``.
        role: one of `ROLES`.
        number: the format.
    """

    pattern: str
    role: str
    number: NumberFormat

    def names(self, path: str) -> bool:
        """Whether this is a layer that is meant, or a parameter of one."""
        paths = [path] if self.role in ("activations", "errors") else [path, path.rpartition(".")[0]]
        return any(fnmatchcase(found, self.pattern) for found in paths)

    def __str__(self) -> str:
        return f"{self.pattern}.{self.role}={spell_format(self.number)}"


@dataclass(frozen=True, slots=True)
class Late:
    """What changes late in a run.

    Attributes:
        at: share of the run's epochs that are done by then.
        bits: so many more fraction bits for every fixed-point format.
    """

    at: float
    bits: int

    def __str__(self) -> str:
        return f"late={self.at:g}:+{self.bits}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The format of every role; float32 is left as it is.

    Attributes:
        weights, activations, errors, gradients, updates: see `ROLES`.
        rounding: "stochastic", "nearest" or "floor", in training; evaluation rounds to nearest.
        layers: what differs in some layers; the last that matches counts.
        late: wider formats late in the run, in the order of time.
        error_scale: "batch", or a power of two by which errors are multiplied before they are rounded.
        exchange: one of `EXCHANGES`.

    >>> recipe = parse_recipe("fixed16,late=0.8:+4")
    >>> str(recipe.number("weights", "conv1", 0.0)), str(recipe.number("weights", "conv1", 0.8))
    ('fixed(16,14)', 'fixed(20,18)')
    """

    weights: NumberFormat = FLOAT32
    activations: NumberFormat = FLOAT32
    errors: NumberFormat = FLOAT32
    gradients: NumberFormat = FLOAT32
    updates: NumberFormat = FLOAT32
    rounding: Rounding = "stochastic"
    layers: tuple[LayerFormat, ...] = ()
    late: tuple[Late, ...] = ()
    error_scale: str | int = BATCH
    exchange: str = "float32"

    def __post_init__(self) -> None:
        for name in ROLES:
            object.__setattr__(self, name, parse_format(getattr(self, name)))
        check_rounding(self.rounding)
        if self.exchange not in EXCHANGES:
            raise ConfigError(unknown("exchange", self.exchange, EXCHANGES))
        self._check_exchange()
        if self.error_scale != BATCH and not _is_power_of_two(self.error_scale):
            raise ConfigError(f"error_scale: needs 'batch' or a power of two from 1 on, got {self.error_scale!r}")
        for entry in self.layers:
            if entry.role not in ROLES:
                raise ConfigError(unknown("role", entry.role, ROLES))
        self._check_late()

    def _check_exchange(self) -> None:
        if self.exchange == "float32":
            return
        if self.gradients.bits != 16:
            raise ConfigError(f"exchange=16bit: gradients are {self.gradients}, which is not kept in 16 bits")
        if any(entry.role == "gradients" for entry in self.layers):
            raise ConfigError("exchange=16bit: gradients of all layers travel together, so they have one format")
        if self.late and isinstance(self.gradients, Fixed):
            raise ConfigError("exchange=16bit: late formats would have more than 16 bits")

    def _check_late(self) -> None:
        times = [entry.at for entry in self.late]
        if not all(0 < at < 1 for at in times) or sorted(set(times)) != times:
            raise ConfigError(f"late: needs growing shares of the run between 0 and 1, got {times}")
        if any(entry.bits < 1 for entry in self.late):
            raise ConfigError("late: needs a number of fraction bits of at least 1 to add")
        if self.late and not any(isinstance(number, Fixed) for number in self._formats()):
            raise ConfigError("late: adds fraction bits to fixed-point formats, and there is none")
        for number in self._formats():
            for entry in self.late:
                _wider(number, entry.bits)

    def _formats(self) -> Iterator[NumberFormat]:
        yield from (getattr(self, role) for role in ROLES)
        yield from (entry.number for entry in self.layers)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is rounded."""
        return all(number == FLOAT32 for number in self._formats())

    def number(self, role: str, layer: str, share: float = 0.0) -> NumberFormat:
        """The format of a role in a layer after this share of the run."""
        found: NumberFormat = getattr(self, role)
        for entry in self.layers:
            if entry.role == role and entry.names(layer):
                found = entry.number
        bits = [entry.bits for entry in self.late if share >= entry.at]
        return _wider(found, bits[-1]) if bits else found

    def error_number(self, layer: str, share: float, batch: int) -> NumberFormat:
        """The format of errors of a mean loss over so many samples."""
        number = self.number("errors", layer, share)
        if not isinstance(number, Fixed):
            return number
        times = batch if self.error_scale == BATCH else int(self.error_scale)
        return fixed(number.wl, min(MAX_FL, number.fl + round(math.log2(max(1, times)))), symmetric=number.symmetric)

    def check_layers(self, layers: list[str]) -> None:
        """Refuses what names no layer of these.

        Raises:
            ConfigError: names the pattern, and layers that are near.
        """
        for entry in self.layers:
            if not any(fnmatchcase(layer, entry.pattern) for layer in layers):
                raise ConfigError(f"number format {entry}: {unknown('layer', entry.pattern, layers)}")

    def error_factor(self) -> float:
        """How many times direct convolution's relative error is still small against every step that follows.

        An algorithm whose error at the end of the range is at most `DISTURBANCE` of a step changes the chance with
        which a number is rounded up by no more than that, and does not shift what is expected.
        """
        factors = [math.inf]
        results = [getattr(self, role) for role in CONVOLVED]
        results += [entry.number for entry in self.layers if entry.role in CONVOLVED]
        for number in results:
            for late in (0, *(entry.bits for entry in self.late)):
                wide = _wider(number, late)
                if isinstance(wide, Fixed):
                    factors.append(DISTURBANCE * wide.quantum / max(abs(wide.lowest), wide.highest) / DIRECT_ERROR)
                elif wide != FLOAT32:
                    factors.append(DISTURBANCE * math.ldexp(1.0, -wide.man) / DIRECT_ERROR)
        return min(factors)

    def accuracy(self, asked: str) -> tuple[str, str]:
        """The accuracy of convolutions (`plan.convolution.ACCURACIES`) that both a person and the formats allow; why.

        >>> parse_recipe("fixed16").accuracy("fast")[0], parse_recipe("float16").accuracy("fast")[0]
        ('standard', 'fast')
        """
        factor = self.error_factor()
        if ACCURACIES[asked] <= factor:
            return asked, f"errors of up to {factor:.3g} times direct convolution's are below {DISTURBANCE:g} of a step"
        found = max((name for name in ACCURACIES if ACCURACIES[name] <= factor), key=ACCURACIES.__getitem__)
        return found, (
            f"accuracy {found} instead of {asked}: errors of more than {factor:.3g} times direct convolution's would "
            f"exceed {DISTURBANCE:g} of a step of the number format"
        )

    def __str__(self) -> str:
        """As `parse_recipe` reads it: the nearest preset and what differs."""
        texts = [self._against(name, preset) for name, preset in PRESETS.items() if name != "float32"]
        return min([self._against("", PRESETS["float32"]), *texts], key=lambda parts: (len(parts[1]), len(parts[0])))[0]

    def _against(self, name: str, preset: Recipe) -> tuple[str, list[str]]:
        changed = [
            f"{role}={spell_format(getattr(self, role))}"
            for role in ROLES
            if getattr(self, role) != getattr(preset, role)
        ]
        changed += [
            f"{key}={getattr(self, key)}"
            for key in ("rounding", "error_scale", "exchange")
            if getattr(self, key) != getattr(preset, key)
        ]
        changed += [str(entry) for entry in (*self.layers, *self.late)]
        return ",".join(([name] if name else []) + changed) or "float32", changed


def spell_format(number: NumberFormat) -> str:
    """As short as it can be written.

    >>> spell_format(fixed(16, 12)), spell_format(FLOAT16)
    ('<4,12>', 'float16')
    """
    return f"<{number.il},{number.fl}>" if isinstance(number, Fixed) and not number.symmetric else str(number)


def _wider(number: NumberFormat, bits: int) -> NumberFormat:
    return replace(number, wl=number.wl + bits, fl=number.fl + bits) if isinstance(number, Fixed) else number


def _is_power_of_two(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and value & value - 1 == 0


def _all_in(number: NumberFormat) -> Recipe:
    return Recipe(**dict.fromkeys(ROLES, number))  # type: ignore[arg-type]


PRESETS: dict[str, Recipe] = {
    "float32": Recipe(),
    "fixed16": replace(_all_in(fixed(16, 14)), activations=fixed(16, 10)),
    "float16": _all_in(FLOAT16),
    "bfloat16": _all_in(BFLOAT16),
}
"""Recipes by name.  ``fixed16`` is the paper's for its convolutional network: ⟨2,14⟩, layer outputs ⟨6,10⟩."""


def parse_recipe(text: str | Recipe) -> Recipe:
    """A recipe from its line; a recipe stays itself.

    Raises:
        ConfigError: names what cannot be read, and what is possible there.

    >>> str(parse_recipe("fixed16, errors=<4,12>, rounding=nearest"))
    'fixed16,errors=<4,12>,rounding=nearest'
    """
    if isinstance(text, Recipe):
        return text
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"a number format is text such as 'fixed16' or 'fixed16,errors=<4,12>', got {text!r}")
    recipe = PRESETS["float32"]
    for index, part in enumerate(_parts(text)):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            if index or key not in PRESETS:
                raise ConfigError(f"number format {text!r}: {unknown('recipe', key, PRESETS)}, or ROLE=FORMAT")
            recipe = PRESETS[key]
            continue
        try:
            recipe = _changed(recipe, key, value)
        except ConfigError as error:
            raise ConfigError(f"number format {text!r}: {error}") from None
    return recipe


def _parts(text: str) -> Iterator[str]:
    """The text cut at commas that stand outside brackets."""
    depth, start = 0, 0
    for at, sign in enumerate(text):
        depth += (sign in "<(⟨") - (sign in ">)⟩")
        if sign == "," and not depth:
            yield text[start:at]
            start = at + 1
    yield text[start:]


def _changed(recipe: Recipe, key: str, value: str) -> Recipe:
    pattern, dot, role = key.rpartition(".")
    if dot:
        if role not in ROLES:
            raise ConfigError(unknown("role", role, ROLES))
        if not pattern:
            raise ConfigError(f"{key}: needs a layer before the point, such as conv1{key}")
        return replace(recipe, layers=(*recipe.layers, LayerFormat(pattern, role, parse_format(value))))
    if key in ROLES:
        return _with(recipe, key, parse_format(value))
    if key == "late":
        at, _, bits = value.partition(":")
        try:
            return replace(recipe, late=(*recipe.late, Late(float(at), int(bits.removeprefix("+")))))
        except ValueError:
            raise ConfigError(f"late: needs SHARE:+BITS such as late=0.8:+4, got {value!r}") from None
    if key == "error_scale":
        return _with(recipe, key, int(value) if value.isdigit() else value)
    if key in ("rounding", "exchange"):
        return _with(recipe, key, value)
    known = [field.name for field in fields(Recipe) if field.name != "layers"]
    raise ConfigError(unknown("role or setting", key, known))


def _with(recipe: Recipe, key: str, value: object) -> Recipe:
    return replace(recipe, **{key: value})  # type: ignore[arg-type]
