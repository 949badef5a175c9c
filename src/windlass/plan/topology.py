"""Which rank stands on which host, and which links lie between hosts.

Written as one line:

- ``host:8``: 8 ranks on one host;
- ``switch:4x2``: 4 hosts of 2 ranks behind one switch;
- ``fat-tree:16x4:r4:o2``: 16 hosts of 4 ranks in racks of 4 hosts; a rack's switch has one uplink of half the
  bandwidth of its hosts' cards together (oversubscription 2; ``o1`` if left out), and behind the uplinks stands one
  switch that never blocks;
- ``torus:4x4`` or ``torus:4x4x4``: hosts of one rank, each with a link to its neighbours of every dimension;
- ``ring:8``: a torus of one dimension.

Ranks are numbered host by host.  Links are directed and numbered; their capacity is in units of a host's network
card.  In a tree a message goes up as far as it must and down again; in a torus dimension after dimension, the
shorter way around, upwards if both are as long.  Messages within a host take no link.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from windlass.errors import ConfigError, unknown
from windlass.plan.linkcost import PairClass


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a cable, of `capacity` / `share` network cards."""

    number: int
    source: str
    target: str
    capacity: int = 1
    share: int = 1


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a tree: what is below a cable.

    Attributes:
        name: of what is below.
        ranks: how many ranks are below each cable.
        capacity, share: the cable has the bandwidth of capacity / share network cards.
    """

    name: str
    ranks: int
    capacity: int = 1
    share: int = 1


@dataclass(frozen=True, slots=True)
class Topology:
    """Hosts and links.

    Attributes:
        text: as `parse_topology` reads it.
        size: how many ranks.
        per_host: how many of them are on each host.
        levels: of a tree, from the hosts upwards.
        sides: of a torus.
    """

    text: str
    size: int
    per_host: int
    levels: tuple[Level, ...] = ()
    sides: tuple[int, ...] = ()
    hosts: tuple[tuple[int, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Lists the ranks of each host."""
        starts = range(0, self.size, self.per_host)
        object.__setattr__(self, "hosts", tuple(tuple(range(start, start + self.per_host)) for start in starts))

    def host_of(self, rank: int) -> int:
        """The number of a rank's host."""
        return rank // self.per_host

    def pair_class(self, source: int, target: int) -> PairClass:
        """Whether two ranks share a host."""
        return "host" if self.host_of(source) == self.host_of(target) else "network"

    @property
    def period(self) -> int:
        """Adding this to all ranks' numbers, around, changes nothing in the links between them."""
        return self.levels[-1].ranks if self.levels else math.prod(self.sides[1:])

    @property
    def num_links(self) -> int:
        """How many links there are."""
        return sum(2 * (self.size // level.ranks) for level in self.levels) + 2 * len(self.sides) * self.size

    @property
    def links(self) -> tuple[Link, ...]:
        """All links, by number."""
        return tuple(_tree_links(self)) if self.levels else tuple(_torus_links(self))

    def route(self, source: int, target: int) -> tuple[int, ...]:
        """The numbers of the links that a message takes; none within a host."""
        if self.levels:
            return _tree_route(self, source, target)
        return _torus_route(self, source, target) if self.sides else ()


# --- trees --------------------------------------------------------------------------------------------------


def level_starts(topology: Topology) -> list[int]:
    """The number of each level's first link: cables upwards by number of what is below, then those downwards."""
    starts = [0]
    for level in topology.levels:
        starts.append(starts[-1] + 2 * (topology.size // level.ranks))
    return starts[:-1]


def _tree_links(topology: Topology) -> list[Link]:
    links: list[Link] = []
    for index, level in enumerate(topology.levels):
        above = topology.levels[index + 1] if index + 1 < len(topology.levels) else None
        ends = [
            (f"{level.name} {i}", f"{above.name} {i * level.ranks // above.ranks}" if above else "switch")
            for i in range(topology.size // level.ranks)
        ]
        for source, target in [*ends, *((upper, lower) for lower, upper in ends)]:
            links.append(Link(len(links), source, target, level.capacity, level.share))
    return links


def _tree_route(topology: Topology, source: int, target: int) -> tuple[int, ...]:
    up: list[int] = []
    down: list[int] = []
    for start, level in zip(level_starts(topology), topology.levels, strict=True):
        if source // level.ranks != target // level.ranks:
            up.append(start + source // level.ranks)
            down.append(start + topology.size // level.ranks + target // level.ranks)
    return (*up, *reversed(down))


# --- tori ---------------------------------------------------------------------------------------------------


def _torus_links(topology: Topology) -> list[Link]:
    links: list[Link] = []
    for rank in range(topology.size if topology.sides else 0):
        stride = topology.size
        for side in topology.sides:
            stride //= side
            for way in (1, -1):
                place = rank // stride % side
                neighbour = rank + ((place + way) % side - place) * stride
                links.append(Link(len(links), f"host {rank}", f"host {neighbour}"))
    return links


def _torus_route(topology: Topology, source: int, target: int) -> tuple[int, ...]:
    route: list[int] = []
    at, stride = source, topology.size
    for dimension, side in enumerate(topology.sides):
        stride //= side
        ahead = (target // stride - at // stride) % side
        forward = 2 * ahead <= side
        for _ in range(ahead if forward else side - ahead):
            route.append(2 * (at * len(topology.sides) + dimension) + (not forward))
            place = at // stride % side
            at += ((place + (1 if forward else -1)) % side - place) * stride
    return tuple(route)


# --- text ---------------------------------------------------------------------------------------------------


def host_topology(ranks: int) -> Topology:
    """All ranks on one host."""
    return Topology(f"host:{ranks}", ranks, ranks)


def switch_topology(hosts: int, per_host: int) -> Topology:
    """Hosts behind one switch."""
    text = f"switch:{hosts}x{per_host}"
    return Topology(text, hosts * per_host, per_host, levels=(Level("host", per_host),))


def fat_tree_topology(hosts: int, per_host: int, rack: int, oversubscription: int) -> Topology:
    """Hosts in racks of `rack`, whose uplink has the bandwidth of rack / oversubscription cards."""
    text = f"fat-tree:{hosts}x{per_host}:r{rack}:o{oversubscription}"
    if hosts % rack:
        raise ConfigError(f"topology {text!r}: {hosts} hosts do not fill racks of {rack}")
    levels = (Level("host", per_host), Level("rack", per_host * rack, rack, oversubscription))
    return Topology(text, hosts * per_host, per_host, levels=levels)


def torus_topology(*sides: int) -> Topology:
    """Hosts of one rank, each linked with its neighbours."""
    text = f"ring:{sides[0]}" if len(sides) == 1 else "torus:" + "x".join(map(str, sides))
    return Topology(text, math.prod(sides), 1, sides=sides)


@dataclass(frozen=True, slots=True)
class _Form:
    """How a kind of topology is written, and what builds it from the numbers."""

    pattern: str
    example: str
    build: Callable[[re.Match[str]], Topology]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split("x")]


_FORMS: dict[str, _Form] = {
    "host": _Form(r"(\d+)", "host:8", lambda found: host_topology(int(found[1]))),
    "switch": _Form(r"(\d+)x(\d+)", "switch:4x2", lambda found: switch_topology(int(found[1]), int(found[2]))),
    "fat-tree": _Form(
        r"(\d+)x(\d+):r(\d+)(?::o(\d+))?",
        "fat-tree:16x4:r4:o2 (16 hosts of 4 ranks, racks of 4 hosts, oversubscription 2)",
        lambda found: fat_tree_topology(int(found[1]), int(found[2]), int(found[3]), int(found[4] or 1)),
    ),
    "torus": _Form(r"(\d+(?:x\d+)+)", "torus:4x4", lambda found: torus_topology(*_numbers(found[1]))),
    "ring": _Form(r"(\d+)", "ring:8", lambda found: torus_topology(int(found[1]))),
}

TOPOLOGY_EXAMPLES = ", ".join(form.example.split(" ")[0] for form in _FORMS.values())
"""One of each kind, for help."""


def parse_topology(text: str) -> Topology:
    """A topology from its line.

    >>> parse_topology("switch:2x2").hosts
    ((0, 1), (2, 3))
    >>> parse_topology("fat-tree:16x4:r4:o2").route(0, 63)
    (0, 32, 39, 31)

    Raises:
        ConfigError: no such kind, or numbers that cannot be.
    """
    kind, _, rest = text.strip().partition(":")
    if kind not in _FORMS:
        raise ConfigError(unknown("topology", kind, _FORMS))
    form = _FORMS[kind]
    found = re.fullmatch(form.pattern, rest)
    if found is None:
        raise ConfigError(f"a topology of kind {kind} is written like {form.example}, got {text.strip()!r}")
    if any(number == 0 for number in map(int, re.findall(r"\d+", rest))):
        raise ConfigError(f"topology {text.strip()!r}: every number must be at least 1")
    return form.build(found)
