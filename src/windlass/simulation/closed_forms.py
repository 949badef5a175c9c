"""The time of a schedule as a formula, where there is one: every pair its own link, all of one class.

With m(n) = alpha(n) + 2o + n beta for a message, h(n) = 2o + n beta for its time on a port, and g(n) for adding n
bytes; p ranks, n bytes, b = ceil(n / p), the longest chunk:

- ring:                     (p-1) (2 m(b) + g(b))
- direct:                   2 alpha + (p-1) (2 h(b) + g(b))
- naive:                    2 alpha + (p-1) (2 h(n) + g(n))
- recursive doubling:       log2 p (m(n) + g(n)); with ranks that stand aside see `_doubling_aside`
- Rabenseifner:             sum over d = 1, 2, 4, ... of 2 m(S_d) + g(S_d), S_d the bytes of the first d chunks;
                            with ranks that stand aside also 2 m(n) + g(n), if all chunks are alike
- binomial tree:            ceil(log2 p) (2 m(n) + g(n)) at most, less where the tree is not full: `_up`, `_down`
- Bruck, pairwise:          if all chunks are alike
- hierarchical:             the sum of its three stages, if all chunks are alike

Sources: Thakur, Rabenseifner, Gropp, IJHPCA 2005; Patarasuk, Yuan, JPDC 2009; the overhead is LogGP's.  Uneven
chunks differ by a byte, and the longest ones make the longest path, as long as both cost by the same segment.
There is no formula where they do not, for the pipelined tree, and for what is scattered and gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from windlass.plan.collective import SCHEDULES, Schedule, Setting, cut
from windlass.plan.linkcost import LinkCost, PairClass, Profile, to_ns


def closed_form_ns(
    schedule: Schedule, num_bytes: int, profile: Profile, *, pair_class: PairClass = "network"
) -> int | None:
    """The time by formula; None where there is none.

    Args:
        schedule: what is run; its hosts count for a hierarchical one only, whose inner pairs are of the network.
        num_bytes: of the buffer; of an all-to-all, what one rank sends in all.
        profile: what messages cost.
        pair_class: that of all pairs.
    """
    if schedule.size == 1:
        return 0
    hosts = schedule.setting.hosts
    if schedule.algorithm != "hierarchical" and pair_class == "network" and any(len(host) > 1 for host in hosts):
        return None
    return _form(schedule.collective, schedule.algorithm, schedule.setting, num_bytes, _Costs(profile, pair_class))


def _form(collective: str, algorithm: str, setting: Setting, num_bytes: int, costs: _Costs) -> int | None:
    form = _FORMS.get((collective, algorithm))
    return form(setting, num_bytes, costs) if form is not None else None


@dataclass(frozen=True, slots=True)
class _Costs:
    """The parts of a message's time."""

    profile: Profile
    pair_class: PairClass

    @property
    def link(self) -> LinkCost:
        return self.profile.link(self.pair_class)

    def alpha(self, num_bytes: int) -> int:
        return self.link.segment(num_bytes).alpha_ns

    def hold(self, num_bytes: int) -> int:
        return 2 * self.link.overhead_ns + to_ns(num_bytes, self.link.segment(num_bytes).ps_per_byte)

    def message(self, num_bytes: int) -> int:
        return self.link.message_ns(num_bytes)

    def adding(self, num_bytes: int) -> int:
        return self.profile.reduction_ns(num_bytes)

    def same_segment(self, few: int, many: int) -> bool:
        return self.link.segment(few) == self.link.segment(many)

    def longest(self, num_bytes: int, parts: int) -> int | None:
        """The longest of so many chunks, if the shortest costs by the same segment."""
        few, many = num_bytes // parts, -(-num_bytes // parts)
        return many if self.same_segment(few, many) else None


# --- flat ---------------------------------------------------------------------------------------------------


def _ring_part(adds: bool) -> Callable[[Setting, int, _Costs], int | None]:
    def form(setting: Setting, num_bytes: int, costs: _Costs) -> int | None:
        chunk = costs.longest(num_bytes, setting.size)
        if chunk is None:
            return None
        return (setting.size - 1) * (costs.message(chunk) + adds * costs.adding(chunk))

    return form


def _direct_part(adds: bool) -> Callable[[Setting, int, _Costs], int | None]:
    def form(setting: Setting, num_bytes: int, costs: _Costs) -> int | None:
        chunk = costs.longest(num_bytes, setting.size)
        if chunk is None:
            return None
        return costs.alpha(chunk) + (setting.size - 1) * (costs.hold(chunk) + adds * costs.adding(chunk))

    return form


def _naive(setting: Setting, num_bytes: int, costs: _Costs) -> int:
    each = 2 * costs.hold(num_bytes) + costs.adding(num_bytes)
    return 2 * costs.alpha(num_bytes) + (setting.size - 1) * each


def _bruck_allgather(setting: Setting, num_bytes: int, costs: _Costs) -> int | None:
    if num_bytes % setting.size:
        return None
    chunk, size = num_bytes // setting.size, setting.size
    return sum(costs.message(min(distance, size - distance) * chunk) for distance in _powers(size))


def _pairwise(setting: Setting, num_bytes: int, costs: _Costs) -> int | None:
    if num_bytes % setting.size:
        return None
    return (setting.size - 1) * costs.message(num_bytes // setting.size)


def _bruck_alltoall(setting: Setting, num_bytes: int, costs: _Costs) -> int | None:
    if num_bytes % setting.size:
        return None
    block, size = num_bytes // setting.size, setting.size
    blocks = (sum(1 for way in range(size) if way & distance) for distance in _powers(size))
    return sum(costs.message(count * block) for count in blocks)


# --- recursive doubling and halving -------------------------------------------------------------------------


def _recursive_doubling(setting: Setting, num_bytes: int, costs: _Costs) -> int:
    depth = setting.size.bit_length() - 1
    step = costs.message(num_bytes) + costs.adding(num_bytes)
    rest = setting.size - (1 << depth)
    return depth * step if not rest else _doubling_aside(depth, rest, num_bytes, costs)


def _doubling_aside(depth: int, rest: int, num_bytes: int, costs: _Costs) -> int:
    """Some ranks stand aside: the longest of three paths through the steps.

    A path goes on to the partner, m + g, or stays with the rank, whose port is busy for h + g.  From a rank that
    serves another, a path that goes on in all steps ends with one that serves none; to end with one that does, so
    that the result is still to be handed out, it stays in all but as many steps as numbers below `rest` have bits.
    """
    alpha, busy = costs.alpha(num_bytes), costs.hold(num_bytes) + costs.adding(num_bytes)
    hand_out, bits = costs.message(num_bytes), (rest - 1).bit_length()
    on_all_the_way = (depth + 1) * (busy + alpha)
    served_to_served = (depth + 1) * busy + (1 + bits) * alpha + hand_out
    unserved_to_served = depth * (busy + alpha) + hand_out
    return max(on_all_the_way, served_to_served, unserved_to_served)


def _halves(setting: Setting, num_bytes: int, costs: _Costs) -> list[int] | None:
    """The longest that are exchanged in each step; None where shorter ones cost by another segment."""
    depth = setting.size.bit_length() - 1
    if setting.size != 1 << depth and num_bytes % (1 << depth):
        return None
    bounds = cut(num_bytes, 1 << depth)
    longest = [bounds[distance] for distance in _powers(1 << depth)]
    shortest = [num_bytes - bounds[-1 - distance] for distance in _powers(1 << depth)]
    pairs = zip(shortest, longest, strict=True)
    return longest if all(costs.same_segment(few, many) for few, many in pairs) else None


def _rabenseifner(setting: Setting, num_bytes: int, costs: _Costs) -> int | None:
    halves = _halves(setting, num_bytes, costs)
    if halves is None:
        return None
    aside = 2 * costs.message(num_bytes) + costs.adding(num_bytes) if not _is_power(setting.size) else 0
    return aside + sum(2 * costs.message(half) + costs.adding(half) for half in halves)


def _halving_part(adds: bool) -> Callable[[Setting, int, _Costs], int | None]:
    def form(setting: Setting, num_bytes: int, costs: _Costs) -> int | None:
        halves = _halves(setting, num_bytes, costs) if _is_power(setting.size) else None
        if halves is None:
            return None
        return sum(costs.message(half) + adds * costs.adding(half) for half in halves)

    return form


# --- trees --------------------------------------------------------------------------------------------------


def _up(size: int, alpha: int, busy: int) -> int:
    """Until the root of a binomial tree has all: its last child, of a tree perhaps not full, comes last."""
    if size == 1:
        return 0
    last = (size - 1).bit_length() - 1
    return busy + max(last * (busy + alpha), _up(size - (1 << last), alpha, busy) + alpha)


def _down(size: int, alpha: int, busy: int) -> int:
    """Until all of a binomial tree have it: its first child is of a tree perhaps not full, the others are full."""
    if size == 1:
        return 0
    first = (size - 1).bit_length() - 1
    to_first = busy + alpha + _down(size - (1 << first), alpha, busy)
    to_second = 2 * busy + alpha + (first - 1) * (busy + alpha) if first else 0
    return max(to_first, to_second)


def _binomial_reduce(setting: Setting, num_bytes: int, costs: _Costs) -> int:
    return _up(setting.size, costs.alpha(num_bytes), costs.hold(num_bytes) + costs.adding(num_bytes))


def _binomial_broadcast(setting: Setting, num_bytes: int, costs: _Costs) -> int:
    return _down(setting.size, costs.alpha(num_bytes), costs.hold(num_bytes))


# --- sums ---------------------------------------------------------------------------------------------------


def _sum(*parts: int | None) -> int | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _hierarchical(setting: Setting, num_bytes: int, costs: _Costs) -> int | None:
    hosts = setting.all_hosts
    width = len(hosts[0])
    inner = Setting(len(hosts), pieces=setting.pieces)
    chunks = width * SCHEDULES["allreduce"][setting.inner].chunks(inner)
    if len({len(host) for host in hosts}) > 1 or num_bytes % chunks:
        return None
    near = _Costs(costs.profile, "host")
    within = Setting(width)
    between = _form("allreduce", setting.inner, inner, num_bytes // width, costs) if len(hosts) > 1 else 0
    around = _sum(_direct_part(True)(within, num_bytes, near), _direct_part(False)(within, num_bytes, near))
    return _sum(around if width > 1 else 0, between)


def _is_power(size: int) -> bool:
    return size & (size - 1) == 0


def _powers(limit: int) -> list[int]:
    return [1 << i for i in range((limit - 1).bit_length())]


_FORMS: dict[tuple[str, str], Callable[[Setting, int, _Costs], int | None]] = {
    ("allreduce", "naive"): _naive,
    ("allreduce", "direct"): lambda *at: _sum(_direct_part(True)(*at), _direct_part(False)(*at)),
    ("allreduce", "ring"): lambda *at: _sum(_ring_part(True)(*at), _ring_part(False)(*at)),
    ("allreduce", "recursive-doubling"): _recursive_doubling,
    ("allreduce", "rabenseifner"): _rabenseifner,
    ("allreduce", "binomial"): lambda *at: _binomial_reduce(*at) + _binomial_broadcast(*at),
    ("allreduce", "hierarchical"): _hierarchical,
    ("reduce_scatter", "direct"): _direct_part(True),
    ("reduce_scatter", "ring"): _ring_part(True),
    ("reduce_scatter", "recursive-halving"): _halving_part(True),
    ("allgather", "direct"): _direct_part(False),
    ("allgather", "ring"): _ring_part(False),
    ("allgather", "recursive-doubling"): _halving_part(False),
    ("allgather", "bruck"): _bruck_allgather,
    ("broadcast", "binomial"): _binomial_broadcast,
    ("reduce", "binomial"): _binomial_reduce,
    ("alltoall", "pairwise"): _pairwise,
    ("alltoall", "bruck"): _bruck_alltoall,
}
