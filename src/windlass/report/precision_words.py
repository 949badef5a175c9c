"""What rounding did to a run, in words: which weights stand still, which numbers are out of range, what helps.

Gupta et al. (ICML 2015), section 4: training in few bits fails where all updates of a weight are rounded to zero, which
nearest rounding does with every update below half a step.  Rows are those of kind ``precision``
(`windlass.runs.tally`), in the order in which they were written; epochs are counted from 1, as elsewhere in the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from windlass.errors import ConfigError
from windlass.plan.number import FLOAT16, MIN_FL, Fixed, NumberFormat, fixed
from windlass.plan.recipe import ROLES, Recipe, parse_recipe, spell_format
from windlass.report import units
from windlass.report.run import finite
from windlass.runs.tally import Row, Tally, read_tallies, saturated_share

HIGH_SATURATION = 0.01
"""A larger share of a tensor's numbers out of range is worth a sentence."""
MANY_NAMES = 6
"""So many are named; of more, how many."""
PARAMETERS = ("weights", "gradients", "updates")
"""Roles whose numbers belong to a parameter, of which the layer's path is the beginning of the name."""
REMEDIES = {
    "weights": "weight decay keeps weights small",
    "activations": "batch normalization keeps activations small",
    "updates": "a lower learning rate keeps updates small",
}


_Key = tuple[int, int, bool, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """Parameters whose updates were all rounded to zero in the same epochs, or were zero since their gradients were.

    Attributes:
        names: of the parameters.
        role: updates or gradients.
        first, last: the epochs, counted from 1.
        lost: how many of the role's numbers were rounded to zero in them.
        number: the role's format.
        rounding: how they were rounded.
        goes_on: whether it lasts to the last row.
    """

    names: tuple[str, ...]
    role: str
    first: int
    last: int
    lost: int
    number: NumberFormat
    rounding: str
    goes_on: bool

    def __str__(self) -> str:
        one = len(self.names) == 1
        which = self.names[0] if one else f"{len(self.names)} parameters ({named(self.names)})"
        when = f"in epoch {self.first}" if self.first == self.last else f"from epoch {self.first} to {self.last}"
        they = "it no longer moves" if one else "they no longer move"
        return f"All {self.lost:,} {self.role} of {which} rounded to zero {when}: {they}."


def epoch_of(row: Row) -> int:
    """The row's epoch, counted from 1; 0 where it has none."""
    epoch = finite(row.get("epoch"))
    return 0 if epoch is None else int(epoch) + 1


def recipe_of(row: Row) -> Recipe | None:
    """The recipe of a row, None where it is not written as one."""
    try:
        return parse_recipe(str(row.get("recipe")))
    except ConfigError:
        return None


def named(names: Sequence[str]) -> str:
    """Names one after the other; of many the first, and how many more."""
    more = f" and {len(names) - MANY_NAMES} more" if len(names) > MANY_NAMES else ""
    return ", ".join(names[:MANY_NAMES]) + more


def loss_of(stall: Stall) -> str:
    """Why updates are lost in a format under a rounding, and what helps."""
    number, step, one = stall.number, stall.number.quantum, stall.role.removesuffix("s")
    at = f"at steps of {power(step)}" if isinstance(number, Fixed) else f"to {number}, from {power(step)} on,"
    match stall.rounding:
        case "nearest":
            return (
                f"Nearest rounding {at} loses every {one} below {power(step / 2)}; "
                "stochastic rounding or more fraction bits help."
            )
        case "floor":
            return (
                f"Rounding down {at} loses every positive {one} below {power(step)}; "
                "stochastic rounding or more fraction bits help."
            )
    return (
        f"Stochastic rounding {at} keeps {stall.role} in expectation, and these were too small and too few for one to "
        "come through; more fraction bits help."
    )


def power(value: float) -> str:
    """A power of two.

    >>> power(0.25), power(1.0), power(8.0)
    ('2^-2', '1', '2^3')
    """
    exponent = value.hex().partition("p")[2]
    return "1" if value == 1 else f"2^{int(exponent)}"


def stalls(rows: Sequence[Row]) -> list[Stall]:
    """The stalls of a run, in the order in which they began; those of the same epochs and format together."""
    courses: dict[str, list[tuple[Row, Tally]]] = {}
    for row in rows:
        tallies = read_tallies(row)
        gradients = {tally.layer: tally for tally in tallies if tally.role == "gradients" and tally.zeroed}
        for tally in tallies:
            if tally.moved is not None:
                lost = gradients.get(tally.layer, tally) if tally.moved == tally.zeroed == 0 else tally
                courses.setdefault(tally.layer, []).append((row, lost))
    groups: dict[_Key, list[tuple[str, list[tuple[Row, Tally]]]]] = {}
    for name, course in courses.items():
        for span, goes_on in _stretches(course):
            last = span[-1][1]
            key = (epoch_of(span[0][0]), epoch_of(span[-1][0]), goes_on, str(last.number), last.role)
            groups.setdefault(key, []).append((name, span))
    return sorted((_stall(key, members) for key, members in groups.items()), key=lambda stall: stall.first)


def _stretches(course: Iterable[tuple[Row, Tally]]) -> Iterator[tuple[list[tuple[Row, Tally]], bool]]:
    """Consecutive rows of one parameter in which it stood still, and whether it still does after the last row."""
    span: list[tuple[Row, Tally]] = []
    for row, tally in course:
        if tally.has_stalled or tally.role == "gradients":
            span.append((row, tally))
        elif span:
            yield span, False
            span = []
    if span:
        yield span, True


def _stall(key: _Key, members: list[tuple[str, list[tuple[Row, Tally]]]]) -> Stall:
    first, last, goes_on, _, role = key
    row, tally = members[0][1][-1]
    recipe = recipe_of(row)
    return Stall(
        names=tuple(name for name, _ in members),
        role=role,
        first=first,
        last=last,
        lost=int(sum(tally.zeroed for _, span in members for _, tally in span if tally.role == role)),
        number=tally.number,
        rounding=recipe.rounding if recipe else "stochastic",
        goes_on=goes_on,
    )


def stalled(rows: Sequence[Row]) -> list[str]:
    """Sentences about parameters whose updates have all been rounded to zero up to the last row.

    >>> entry = {"role": "updates", "layer": "c3.weight", "format": "<6,10>", "elements": 900, "saturated": 0}
    >>> entry |= {"zeroed": 800, "error_sum": 0.1, "moved": 0}
    >>> row = {"kind": "precision", "step": 9, "epoch": 2, "recipe": "updates=<6,10>,rounding=nearest", "rows": [entry]}
    >>> stalled([row])[0].partition(". ")[0]
    'All 800 updates of c3.weight rounded to zero in epoch 3: it no longer moves'
    """
    now = sorted((stall for stall in stalls(rows) if stall.goes_on), key=lambda stall: -len(stall.names))
    rest = [name for stall in now[MANY_NAMES:] for name in stall.names]
    others = [f"So were those of {len(rest)} more parameters ({named(rest)})."] if rest else []
    causes = [loss_of(stall) for stall in now[:MANY_NAMES]]
    said = [
        str(s) if cause in causes[:i] else f"{s} {cause}" for i, (s, cause) in enumerate(zip(now, causes, strict=False))
    ]
    return [*said, *others]


def recovered(rows: Sequence[Row]) -> list[str]:
    """A sentence about parameters that stood still for one row or more and move again."""
    past = [stall for stall in stalls(rows) if not stall.goes_on]
    if not past:
        return []
    names = list(dict.fromkeys(name for stall in past for name in stall.names))
    first, last = min(stall.first for stall in past), max(stall.last for stall in past)
    when = f"in epoch {first}" if first == last else f"for a time from epoch {first} to {last}"
    return [
        f"All updates of {named(names)} rounded to zero {when}; then updates came through again. {loss_of(past[-1])}"
    ]


def new_stalls(rows: Sequence[Row]) -> list[str]:
    """`stalled` for parameters that stand still since the last row: said after every row, each is said once.

    The last two rows are looked at.
    """
    before = {name for stall in stalls(rows[-2:-1]) for name in stall.names}
    last = [row | {"rows": _without(row.get("rows"), before)} for row in map(dict, rows[-1:])]
    return stalled(last)


def _without(entries: object, names: set[str]) -> list[object]:
    """The entries of all layers but these."""
    found = entries if isinstance(entries, list) else []
    return [entry for entry in found if not (isinstance(entry, dict) and entry.get("layer") in names)]


def latest(rows: Iterable[Row]) -> dict[tuple[str, str], tuple[Row, Tally]]:
    """The last tally of every role and layer, with its row."""
    found: dict[tuple[str, str], tuple[Row, Tally]] = {}
    for row in rows:
        found |= {(tally.role, tally.layer): (row, tally) for tally in read_tallies(row)}
    return found


def saturating(rows: Sequence[Row]) -> list[str]:
    """Sentences about tensors of which more than `HIGH_SATURATION` is out of range or was once, by role and format."""
    now: dict[tuple[str, str], list[tuple[float, Row, Tally]]] = {}
    once: dict[tuple[str, str], list[tuple[float, Row, Tally]]] = {}
    worst = _worst(rows)
    for key, (row, tally) in latest(rows).items():
        share = saturated_share([tally])
        if share > HIGH_SATURATION:
            now.setdefault((tally.role, str(tally.number)), []).append((share, row, tally))
        elif key in worst:
            once.setdefault((tally.role, str(worst[key][2].number)), []).append(worst[key])
    return [*map(_out_of_range, now.values()), *map(_was_out_of_range, once.values())]


def _worst(rows: Sequence[Row]) -> dict[tuple[str, str], tuple[float, Row, Tally]]:
    """Where most of a tensor was out of range, for those of which more than `HIGH_SATURATION` was."""
    found: dict[tuple[str, str], tuple[float, Row, Tally]] = {}
    for row in rows:
        for tally in read_tallies(row):
            key, share = (tally.role, tally.layer), saturated_share([tally])
            if share > (found[key][0] if key in found else HIGH_SATURATION):
                found[key] = share, row, tally
    return found


def _out_of_range(group: list[tuple[float, Row, Tally]]) -> str:
    """Tensors of one role and format that are out of range, the worst first."""
    group.sort(key=lambda item: -item[0])
    _, row, tally = group[0]
    shares = [f"{units.percent(share)} of {tally.layer}" for share, _, tally in group]
    shares[0] = shares[0].replace("% of", f"% of the {tally.role} of", 1)
    remedy = _remedy(row, [tally for *_, tally in group])
    return f"Out of range in epoch {epoch_of(row)}: {named(shares)}. {_range(tally)}. {remedy}"


def _was_out_of_range(group: list[tuple[float, Row, Tally]]) -> str:
    """Tensors of one role and format that were out of range, and fit now."""
    shares = [f"{units.percent(share)} of {tally.layer} in epoch {epoch_of(row)}" for share, row, tally in group]
    tally = group[0][2]
    return f"Of the {tally.role} were out of range: {named(shares)}. {_range(tally)}; they fit now."


def _range(tally: Tally) -> str:
    return f"{spell_format(tally.number)} holds {tally.number.lowest:.6g} to {tally.number.highest:.6g}"


def _remedy(row: Row, tallies: Sequence[Tally]) -> str:
    """What would bring the numbers of one role into range.

    A format is that of the recipe, in which errors are those of a sample's own loss.
    """
    recipe, role, layer = recipe_of(row), tallies[0].role, tallies[0].layer
    path = layer.rpartition(".")[0] if role in PARAMETERS else layer
    number = recipe.number(role, path) if recipe and role in ROLES else tallies[0].number
    keys = [f"{path}.{role}"] if path else []
    keys += [role] if len(tallies) > 1 or not path else []
    ways = [REMEDIES[role]] if role in REMEDIES else []
    if isinstance(number, Fixed) and number.fl > MIN_FL:
        wider = spell_format(fixed(number.wl, number.fl - 1, symmetric=number.symmetric))
        ways.insert(0, f"{' or '.join(f'{key}={wider}' for key in keys)} doubles the range")
    elif number == FLOAT16:
        ways.insert(0, f"{' or '.join(f'{key}=bfloat16' for key in keys)} has a wider range")
    return f"What helps: {'; '.join(ways)}." if ways else "A wider range helps."
