"""How a number is stored: fixed point ⟨IL, FL⟩ and short floating point, as data.

Gupta et al., "Deep Learning with Limited Numerical Precision" (ICML 2015), section 3: ⟨IL, FL⟩ has IL integer bits, the
sign among them, and FL fraction bits, WL = IL + FL bits in all.  Its numbers are k · 2^-FL for the whole numbers k from
-2^(WL-1) to 2^(WL-1) - 1, the codes.  FL may be negative (steps above 1) and may exceed WL (all numbers are small).

What is out of range saturates, whatever the format; NaN stays NaN.  How numbers are rounded is one of `ROUNDINGS`:

- ``stochastic``: away from zero with the probability of the share that is cut off, so that the expectation is kept;
- ``nearest``: to the nearest, ties to the even code;
- ``floor``: downwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from windlass.errors import ConfigError, unknown

Rounding: TypeAlias = Literal["stochastic", "nearest", "floor"]
ROUNDINGS: tuple[Rounding, ...] = ("stochastic", "nearest", "floor")

MAX_WL = 24
"""Codes of so many bits are exact in float32, in which numbers are computed."""
MIN_FL, MAX_FL = -100, 126
"""So that 2^FL, 2^-FL and the ends of the range are normal numbers of float32."""
STORAGE_BITS = (8, 16, 32)
"""Widths of the integers that hold codes."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Fixed point of `wl` bits, `fl` of them behind the point.

    >>> number = fixed(16, 12)
    >>> number.lowest, number.highest, number.quantum == 2**-12, number.storage
    (-8.0, 7.999755859375, True, 'int16')

    Attributes:
        wl: bits in all, 1 to 24.
        fl: bits behind the point, -100 to 126.
        symmetric: whether the lowest code is left out, so that the range is symmetric about 0.
    """

    wl: int
    fl: int
    symmetric: bool = False

    def __post_init__(self) -> None:
        for what, value, low, high in (("WL", self.wl, 1, MAX_WL), ("FL", self.fl, MIN_FL, MAX_FL)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{what} of a fixed-point format is a whole number, got {value!r}")
            if not low <= value <= high:
                raise ConfigError(f"{what} of a fixed-point format is {low} to {high}, got {value} in {self}")

    @property
    def il(self) -> int:
        """Bits before the point, the sign among them."""
        return self.wl - self.fl

    @property
    def quantum(self) -> float:
        """The step from one number to the next."""
        return math.ldexp(1.0, -self.fl)

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        high = (1 << self.wl - 1) - 1
        return (-high if self.symmetric else -high - 1), high

    @property
    def lowest(self) -> float:
        """The lowest number."""
        return math.ldexp(self.codes[0], -self.fl)

    @property
    def highest(self) -> float:
        """The highest number."""
        return math.ldexp(self.codes[1], -self.fl)

    @property
    def storage(self) -> str:
        """The smallest type that holds a code."""
        return "int8" if self.wl <= 8 else "int16" if self.wl <= 16 else "int32"

    @property
    def bits(self) -> int:
        """Bits of a number in storage."""
        return int(self.storage.removeprefix("int"))

    def __str__(self) -> str:
        return f"fixed({self.wl},{self.fl}{',symmetric' if self.symmetric else ''})"


@dataclass(frozen=True, slots=True)
class Floating:
    """Floating point: a sign, `exp` bits of exponent, `man` bits behind the leading one; subnormal numbers too.

    >>> FLOAT16.highest, FLOAT16.quantum == 2**-24, FLOAT16.storage
    (65504.0, True, 'float16')
    """

    name: str
    exp: int
    man: int

    @property
    def min_exponent(self) -> int:
        """Of the smallest normal number."""
        return 2 - (1 << self.exp - 1)

    @property
    def quantum(self) -> float:
        """The smallest number above zero; the step at magnitude 2^e is 2^(e - man)."""
        return math.ldexp(1.0, self.min_exponent - self.man)

    @property
    def highest(self) -> float:
        """The highest number; larger ones, and infinity, become it."""
        return math.ldexp(2.0 - math.ldexp(1.0, -self.man), 1 - self.min_exponent)

    @property
    def lowest(self) -> float:
        """The lowest number."""
        return -self.highest

    @property
    def storage(self) -> str:
        """The type that holds a number."""
        return self.name

    @property
    def bits(self) -> int:
        """Bits of a number in storage."""
        return 1 + self.exp + self.man

    def __str__(self) -> str:
        return self.name


NumberFormat: TypeAlias = Fixed | Floating

FLOAT16 = Floating("float16", 5, 10)
BFLOAT16 = Floating("bfloat16", 8, 7)
FLOAT32 = Floating("float32", 8, 23)
FLOATS = {number.name: number for number in (FLOAT16, BFLOAT16, FLOAT32)}

_WRITTEN: tuple[tuple[re.Pattern[str], Callable[[int, int], Fixed]], ...] = (
    (re.compile(r"[<⟨](-?\d+),(-?\d+)[>⟩]"), lambda il, fl: Fixed(il + fl, fl)),
    (re.compile(r"fixed\((-?\d+),(-?\d+)\)"), lambda wl, fl: Fixed(wl, fl)),
    (re.compile(r"fixed\((-?\d+),(-?\d+),symmetric\)"), lambda wl, fl: Fixed(wl, fl, symmetric=True)),
)


def fixed(wl: int, fl: int, *, symmetric: bool = False) -> Fixed:
    """Fixed point of `wl` bits, `fl` of them behind the point: ⟨wl - fl, fl⟩."""
    return Fixed(wl, fl, symmetric)


def parse_format(text: str | NumberFormat) -> NumberFormat:
    """A format from how it is written; a format stays itself.

    >>> parse_format("<4,12>"), parse_format("fixed(16,12)") == fixed(16, 12)
    (Fixed(wl=16, fl=12, symmetric=False), True)

    Raises:
        ConfigError: nothing is written so.
    """
    if isinstance(text, Fixed | Floating):
        return text
    if not isinstance(text, str):
        raise ConfigError(f"a number format is text such as '<4,12>' or windlass.precision.fixed(16, 12), got {text!r}")
    written = re.sub(r"\s", "", text).lower()
    for pattern, make in _WRITTEN:
        found = pattern.fullmatch(written)
        if found:
            return make(*map(int, found.groups()))
    if written not in FLOATS:
        raise ConfigError(
            unknown("number format", text, [*FLOATS, "<IL,FL>", "fixed(WL,FL)", "fixed(WL,FL,symmetric)"])
        )
    return FLOATS[written]


def check_rounding(name: str) -> Rounding:
    """`name`, if a rounding is called so."""
    for rounding in ROUNDINGS:
        if rounding == name:
            return rounding
    raise ConfigError(unknown("rounding", str(name), ROUNDINGS))


@dataclass(frozen=True, slots=True)
class Key:
    """What the random numbers of one stochastic rounding depend on, besides an element's position.

    Attributes:
        seed: of the run, 64 bits.
        stream: which tensor or role, 32 bits.
        step: of the run, 32 bits.
    """

    seed: int
    stream: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        for what, bits in (("seed", 64), ("stream", 32), ("step", 32)):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**bits:
                raise ConfigError(f"{what} of a rounding key is a whole number from 0 to 2^{bits} - 1, got {value!r}")

    @property
    def words(self) -> tuple[int, int, int, int]:
        """Seed (low half, high half), stream, step: 32 bits each."""
        return self.seed & 0xFFFFFFFF, self.seed >> 32, self.stream, self.step
