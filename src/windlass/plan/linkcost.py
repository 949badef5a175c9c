"""What messages and additions cost, in integers: latency and bandwidth by size, overhead, and speed of reduction.

A message of n bytes takes overhead + alpha(n) + ceil(n ps_per_byte / 1000) + overhead nanoseconds; alpha and
ps_per_byte are those of the segment of sizes that n falls into (Hockney's model by segments, as in SimGrid; the
overhead is LogGP's o).  There are two classes of pairs: ranks of one host, and ranks of different hosts.
Integers make sums exact, whatever their order: closed forms and simulations agree to the nanosecond.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from windlass.errors import ConfigError, unknown

PairClass = Literal["host", "network"]
PAIR_CLASSES: tuple[PairClass, ...] = ("host", "network")


@dataclass(frozen=True, slots=True)
class Segment:
    """Messages of at least `from_bytes`, up to the next segment: latency, and picoseconds for each byte."""

    from_bytes: int
    alpha_ns: int
    ps_per_byte: int


@dataclass(frozen=True, slots=True)
class LinkCost:
    """What a message between two ranks costs.

    Attributes:
        segments: by size, the first from 0 bytes.
        overhead_ns: what sender and receiver each spend on a message, whatever its size.
    """

    segments: tuple[Segment, ...]
    overhead_ns: int = 0

    def __post_init__(self) -> None:
        """Refuses what is no cost."""
        starts = [segment.from_bytes for segment in self.segments]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ConfigError(f"segments of a link begin at 0 bytes and rise, got {starts}")
        _whole("overhead_ns", self.overhead_ns)
        for segment in self.segments:
            _whole("alpha_ns", segment.alpha_ns)
            _whole("ps_per_byte", segment.ps_per_byte)

    def segment(self, num_bytes: int) -> Segment:
        """The segment of messages of this size."""
        return next(each for each in reversed(self.segments) if each.from_bytes <= num_bytes)

    def transfer_ns(self, num_bytes: int) -> int:
        """Latency and bytes of a message, without the overheads of its two sides."""
        segment = self.segment(num_bytes)
        return segment.alpha_ns + to_ns(num_bytes, segment.ps_per_byte)

    def message_ns(self, num_bytes: int) -> int:
        """A message from one rank's call to the other's return."""
        return 2 * self.overhead_ns + self.transfer_ns(num_bytes)

    def to_mapping(self) -> dict[str, Any]:
        """As plain numbers."""
        names = ("from_bytes", "alpha_ns", "ps_per_byte")
        rows = [{name: getattr(segment, name) for name in names} for segment in self.segments]
        return {"overhead_ns": self.overhead_ns, "segments": rows}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The costs of a cluster.

    Attributes:
        host: between ranks of one host.
        network: between ranks of different hosts; its bandwidth is that of a host's network card.
        gamma_ps_per_byte: adding what arrived, per byte of it.
        source: where the figures come from.
    """

    host: LinkCost
    network: LinkCost
    gamma_ps_per_byte: int = 0
    source: str = "given"

    def __post_init__(self) -> None:
        """Refuses what is no cost."""
        _whole("gamma_ps_per_byte", self.gamma_ps_per_byte)

    def link(self, pair_class: PairClass) -> LinkCost:
        """The cost of messages between ranks of this class."""
        return self.host if pair_class == "host" else self.network

    def reduction_ns(self, num_bytes: int) -> int:
        """Adding so many bytes."""
        return to_ns(num_bytes, self.gamma_ps_per_byte)

    def to_mapping(self) -> dict[str, Any]:
        """As plain mappings and numbers, for YAML and JSON."""
        return {
            "host": self.host.to_mapping(),
            "network": self.network.to_mapping(),
            "gamma_ps_per_byte": self.gamma_ps_per_byte,
            "source": self.source,
        }


def profile_from_mapping(content: Mapping[str, Any]) -> Profile:
    """A profile from what `Profile.to_mapping` returns.

    Raises:
        ConfigError: something is missing, unknown or no whole number.
    """
    return Profile(
        host=_link(_field(content, "host", "a profile")),
        network=_link(_field(content, "network", "a profile")),
        gamma_ps_per_byte=_whole("gamma_ps_per_byte", content.get("gamma_ps_per_byte", 0)),
        source=str(content.get("source", "given")),
    )


def constant_cost(*, latency_ns: int, bits_per_s: int, overhead_ns: int = 0) -> LinkCost:
    """One latency and one bandwidth for all sizes.

    >>> constant_cost(latency_ns=20_000, bits_per_s=10**10).message_ns(1000)
    20800
    """
    if bits_per_s < 1:
        raise ConfigError(f"a bandwidth must be above 0, got {bits_per_s} bit/s")
    return LinkCost((Segment(0, latency_ns, -(-8 * 10**12 // bits_per_s)),), overhead_ns)


def to_ns(num_bytes: int, ps_per_byte: int) -> int:
    """Nanoseconds, rounded up."""
    return -(-num_bytes * ps_per_byte // 1000)


def default_profile(name: str = "ethernet-10g") -> Profile:
    """An assumed profile by name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in DEFAULT_PROFILES:
        raise ConfigError(unknown("profile", name, DEFAULT_PROFILES))
    return DEFAULT_PROFILES[name]


def changed_network(
    profile: Profile, *, latency_ns: int | None = None, bits_per_s: int | None = None, overhead_ns: int | None = None
) -> Profile:
    """The same with another network, of one latency and bandwidth for all sizes; None keeps the first segment's."""
    if latency_ns is None and bits_per_s is None and overhead_ns is None:
        return profile
    first = profile.network.segments[0]
    latency = first.alpha_ns if latency_ns is None else latency_ns
    overhead = profile.network.overhead_ns if overhead_ns is None else overhead_ns
    if bits_per_s is None:
        network = LinkCost((Segment(0, latency, first.ps_per_byte),), overhead)
    else:
        network = constant_cost(latency_ns=latency, bits_per_s=bits_per_s, overhead_ns=overhead)
    return replace(profile, network=network, source=f"{profile.source}; network as given")


def _link(content: Mapping[str, Any]) -> LinkCost:
    rows = _field(content, "segments", "a link")
    if not isinstance(rows, list | tuple):
        raise ConfigError(f"segments of a link are a list, got {rows!r}")
    names = ("from_bytes", "alpha_ns", "ps_per_byte")
    segments = tuple(Segment(*(_whole(name, _field(row, name, "a segment")) for name in names)) for row in rows)
    return LinkCost(segments, _whole("overhead_ns", content.get("overhead_ns", 0)))


def _field(content: Mapping[str, Any], name: str, what: str) -> Any:
    if not isinstance(content, Mapping) or name not in content:
        raise ConfigError(f"{what} needs {name}, got {content!r}")
    return content[name]


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} must be a whole number of at least 0, got {value!r}")
    return value


_SHARED_MEMORY = LinkCost((Segment(0, 500, 200), Segment(1 << 16, 2_000, 100)), overhead_ns=200)

DEFAULT_PROFILES: dict[str, Profile] = {
    "ethernet-10g": Profile(
        host=_SHARED_MEMORY,
        network=LinkCost((Segment(0, 15_000, 800), Segment(1 << 16, 30_000, 800)), overhead_ns=2_000),
        gamma_ps_per_byte=100,
        source="assumed: 10 Gbit/s Ethernet, TCP; shared memory of 10 GB/s",
    ),
    "loopback": Profile(
        host=_SHARED_MEMORY,
        network=LinkCost((Segment(0, 8_000, 300), Segment(1 << 16, 15_000, 300)), overhead_ns=2_000),
        gamma_ps_per_byte=100,
        source="assumed: TCP within one machine, about 3 GB/s; shared memory of 10 GB/s",
    ),
}
"""Where nothing was measured.  All figures are assumptions: round numbers of the right size, no measurements."""
