"""Which algorithm sums a buffer of some size: what a plan, a person or a chooser says, in one short text.

``library`` is the MPI library's own, ``shared`` goes through memory that the ranks of a host share, every other
name is a schedule of `plan.collective`; ``pipelined-tree:16`` cuts into 16 pieces, ``hierarchical:ring`` names the
schedule between hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from windlass.errors import ConfigError, unknown
from windlass.plan.collective import SCHEDULES, Schedule, Send, make_schedule
from windlass.plan.sizes import format_bytes, parse_bytes

LIBRARY, SHARED = "library", "shared"
ALLREDUCE_NAMES: tuple[str, ...] = (LIBRARY, SHARED, *SCHEDULES["allreduce"])
"""Names of everything that can sum a buffer."""
ORDERED = (SHARED, *(name for name, algorithm in SCHEDULES["allreduce"].items() if algorithm.ordered))
"""Those that add in the order of ranks, whatever the size: they all return the same bits."""


@dataclass(frozen=True, slots=True)
class Pick:
    """An algorithm of allreduce with its parameters.

    Attributes:
        algorithm: one of `ALLREDUCE_NAMES`.
        pieces: chunks of a pipelined tree.
        inner: schedule between hosts of a hierarchical one.
        segment_bytes: longer messages travel in segments of so many bytes, so that adding overlaps; 0: whole.
    """

    algorithm: str
    pieces: int = 8
    inner: str = "ring"
    segment_bytes: int = 0

    @classmethod
    def parse(cls, text: str) -> Pick:
        """Reads what `str` writes.

        Raises:
            ConfigError: no such algorithm, or not such a parameter.

        >>> Pick.parse("pipelined-tree:16").pieces, str(Pick("hierarchical", inner="rabenseifner"))
        (16, 'hierarchical:rabenseifner')
        """
        name, _, parameter = text.partition(":")
        if name not in ALLREDUCE_NAMES:
            raise ConfigError(unknown("allreduce algorithm", name, ALLREDUCE_NAMES))
        if not parameter:
            return cls(name)
        if name == "pipelined-tree" and parameter.isdigit() and int(parameter) > 0:
            return cls(name, pieces=int(parameter))
        if name == "hierarchical":
            return cls(name, inner=cls._inner(parameter))
        raise ConfigError(f"allreduce algorithm {text!r}: {parameter!r} is not a parameter of {name}")

    @staticmethod
    def _inner(name: str) -> str:
        known = [other for other in SCHEDULES["allreduce"] if other != "hierarchical"]
        if name not in known:
            raise ConfigError(unknown("schedule between hosts", name, known))
        return name

    def __str__(self) -> str:
        """As a plan and a person write it."""
        if self.algorithm == "pipelined-tree":
            return f"{self.algorithm}:{self.pieces}"
        return f"{self.algorithm}:{self.inner}" if self.algorithm == "hierarchical" else self.algorithm

    def schedule(self, size: int, hosts: Sequence[Sequence[int]] = ()) -> Schedule:
        """The schedule for so many ranks on these hosts; that of ``shared`` is ``direct``."""
        name = "direct" if self.algorithm == SHARED else self.algorithm
        return make_schedule("allreduce", name, size, pieces=self.pieces, hosts=hosts, inner=self.inner)

    def bytes_sent(self, rank: int, num_bytes: int, itemsize: int, size: int, hosts: Sequence[Sequence[int]]) -> int:
        """What a rank sends of a buffer, or with ``shared`` writes into shared memory; 0 where only the library knows.

        With shared memory that is the others' slices of its own, and its slice of the sum: the buffer once.
        """
        if size == 1 or self.algorithm == LIBRARY:
            return 0
        return (
            num_bytes if self.algorithm == SHARED else sent_bytes(self.schedule(size, hosts), rank, num_bytes, itemsize)
        )


def sent_bytes(schedule: Schedule, rank: int, num_bytes: int, itemsize: int) -> int:
    """Bytes that a rank sends when the schedule runs on a buffer of so many."""
    bounds = schedule.bounds(num_bytes // itemsize)
    sends = [message for step in schedule.steps(rank) for message in step if isinstance(message, Send)]
    return itemsize * sum(bounds[chunk + 1] - bounds[chunk] for send in sends for chunk in send.chunks)


AUTO = "auto"
"""The chooser decides, by size."""


@dataclass(frozen=True, slots=True)
class Picks:
    """Algorithms by size class, as the plan's lever ``allreduce`` holds them.

    Attributes:
        rows: (greatest number of bytes, algorithm), ascending; the last one's limit is 0: whatever is larger.
            Empty: the chooser decides.
    """

    rows: tuple[tuple[int, Pick], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Picks:
        """Reads ``auto``, one algorithm, or several with the sizes up to which they are used.

        Raises:
            ConfigError: what cannot be read, sizes that do not grow, or a last algorithm with a limit.

        >>> picks = Picks.parse("library..8KiB,shared")
        >>> str(picks.of(1024)), str(picks.of(1 << 20)), str(picks)
        ('library', 'shared', 'library..8KiB,shared')
        """
        if text == AUTO:
            return cls()
        rows: list[tuple[int, Pick]] = []
        for part in text.split(","):
            name, dots, limit = part.strip().partition("..")
            rows.append((parse_bytes(limit) if dots else 0, Pick.parse(name)))
        limits = [limit for limit, _ in rows]
        if limits[-1] or 0 in limits[:-1] or sorted(set(limits[:-1])) != limits[:-1]:
            raise ConfigError(
                f"allreduce {text!r}: needs growing sizes and a last one without, as in library..8KiB,ring"
            )
        return cls(tuple(rows))

    def of(self, num_bytes: int) -> Pick | None:
        """The algorithm for a buffer; None: the chooser's."""
        for limit, pick in self.rows:
            if num_bytes <= limit or not limit:
                return pick
        return None

    def __str__(self) -> str:
        """As `parse` reads it."""
        return ",".join(f"{pick}..{format_bytes(limit)}" if limit else str(pick) for limit, pick in self.rows) or AUTO
