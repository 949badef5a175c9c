"""The schedules that were measured best on a cluster, on disk: size × ranks × topology → schedule, segments.

One JSON file for each number of ranks, topology and fingerprint of the hosts, in
``$XDG_CACHE_HOME/windlass/collective`` or ``~/.cache/windlass/collective``, replaced as a whole under a lock.  A file
that is damaged costs one warning, and the cost model chooses instead.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from windlass.errors import ConfigError, WriteError, unknown
from windlass.plan.collective import SCHEDULES, Schedule, make_schedule
from windlass.plan.linkcost import Profile, profile_from_mapping
from windlass.plan.pick import LIBRARY, SHARED
from windlass.tuning.cache import Warn, _locked, _replace, cache_folder

SCHEMA = "windlass-collective/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """The best of a range of sizes.

    Attributes:
        collective: what is done.
        from_bytes, to_bytes: sizes from the first up to, but without, the second; None: to the largest.
        schedule: a name in `SCHEDULES`, "library", or "shared" (`plan.pick`).
        pieces: chunks of a pipelined tree.
        inner: the schedule between hosts of a hierarchical one.
        segment_bytes: into what messages are cut; 0: not at all.
        measured_s: seconds by schedule, of all that were tried.
    """

    collective: str
    from_bytes: int
    to_bytes: int | None
    schedule: str
    pieces: int = 8
    inner: str = "ring"
    segment_bytes: int = 0
    measured_s: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        if self.collective not in SCHEDULES:
            raise ConfigError(unknown("collective", self.collective, SCHEDULES))
        names = [*SCHEDULES[self.collective], LIBRARY, *([SHARED] if self.collective == "allreduce" else [])]
        if self.schedule not in names:
            raise ConfigError(unknown(f"schedule of {self.collective}", self.schedule, names))
        if self.from_bytes < 0 or (self.to_bytes is not None and self.to_bytes <= self.from_bytes):
            raise ConfigError(f"sizes from {self.from_bytes} to {self.to_bytes} are no range")
        if any(not 0 < seconds < math.inf for seconds in self.measured_s.values()):
            raise ConfigError(f"measured times must be above 0, got {dict(self.measured_s)}")

    def holds(self, num_bytes: int) -> bool:
        """Whether a size falls into the range."""
        return self.from_bytes <= num_bytes and (self.to_bytes is None or num_bytes < self.to_bytes)

    def build(self, ranks: int, hosts: Sequence[Sequence[int]] = (), root: int = 0) -> Schedule | None:
        """The schedule; None for the library's own."""
        if self.schedule == LIBRARY:
            return None
        name = "direct" if self.schedule == SHARED else self.schedule
        return make_schedule(self.collective, name, ranks, root=root, pieces=self.pieces, hosts=hosts, inner=self.inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTable:
    """What was measured on one cluster.

    Attributes:
        fingerprint: names the hosts (`fingerprint_of`).
        date: of measuring, ISO 8601.
        versions: of what sends the messages, by name.
        topology: as `parse_topology` reads it.
        ranks: how many.
        profile: the measured costs of links.
        rows: by collective and size.
    """

    fingerprint: str
    date: str
    versions: Mapping[str, str]
    topology: str
    ranks: int
    profile: Profile
    rows: tuple[TableRow, ...]

    def lookup(self, collective: str, num_bytes: int) -> TableRow | None:
        """The row for a size; None: nothing was measured."""
        return next((row for row in self.rows if row.collective == collective and row.holds(num_bytes)), None)

    def to_mapping(self) -> dict[str, Any]:
        """As plain mappings, for JSON and YAML."""
        return {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "date": self.date,
            "versions": dict(self.versions),
            "topology": self.topology,
            "ranks": self.ranks,
            "profile": self.profile.to_mapping(),
            "rows": [_row_to_mapping(row) for row in self.rows],
        }


def table_from_mapping(content: Mapping[str, Any]) -> CollectiveTable:
    """A table from what `CollectiveTable.to_mapping` returns.

    Raises:
        ConfigError, KeyError, TypeError, ValueError: it is damaged.
    """
    if content["schema"] != SCHEMA:
        raise ValueError(f"schema {content['schema']!r}")
    return CollectiveTable(
        fingerprint=str(content["fingerprint"]),
        date=str(content["date"]),
        versions={str(name): str(version) for name, version in content["versions"].items()},
        topology=str(content["topology"]),
        ranks=int(content["ranks"]),
        profile=profile_from_mapping(content["profile"]),
        rows=tuple(_row_from_mapping(row) for row in content["rows"]),
    )


def fingerprint_of(facts: Mapping[str, object]) -> str:
    """A short name for what measured times depend on, such as hosts, processors and cores.

    >>> fingerprint_of({"cpu": "a", "cores": 2}) == fingerprint_of({"cores": 2, "cpu": "a"})
    True
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def table_folder() -> Path:
    """Where tables are kept."""
    return cache_folder().parent / "collective"


def table_path(*, ranks: int, topology: str, fingerprint: str, folder: Path | None = None) -> Path:
    """The file of one table."""
    name = fingerprint_of({"ranks": ranks, "topology": topology, "hosts": fingerprint})
    return (folder or table_folder()) / f"{name}.json"


def save_table(table: CollectiveTable, *, folder: Path | None = None) -> Path:
    """Writes a table in place of the one of the same ranks, topology and hosts; returns its file.

    Raises:
        WriteError: it cannot be written.
    """
    path = table_path(ranks=table.ranks, topology=table.topology, fingerprint=table.fingerprint, folder=folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            _replace(path, json.dumps(table.to_mapping(), indent=1) + "\n")
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def load_table(
    *, ranks: int, topology: str, fingerprint: str, warn: Warn, folder: Path | None = None
) -> CollectiveTable | None:
    """The table of these ranks, topology and hosts; None if there is none, or, after a warning, if it is damaged."""
    path = table_path(ranks=ranks, topology=topology, fingerprint=fingerprint, folder=folder)
    try:
        table = table_from_mapping(json.loads(path.read_text()))
        if (table.ranks, table.topology, table.fingerprint) != (ranks, topology, fingerprint):
            raise ValueError("it is of other ranks, topology or hosts")
    except FileNotFoundError:
        return None
    except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        line = " ".join(str(error).split())[:80]
        warn(f"{path} is damaged and is not used ({type(error).__name__}: {line}); the cost model chooses")
        return None
    return table


def _row_to_mapping(row: TableRow) -> dict[str, Any]:
    names = ("collective", "from_bytes", "to_bytes", "schedule", "pieces", "inner", "segment_bytes")
    return {name: getattr(row, name) for name in names} | {"measured_s": dict(row.measured_s)}


def _row_from_mapping(content: Mapping[str, Any]) -> TableRow:
    last = content["to_bytes"]
    return TableRow(
        collective=str(content["collective"]),
        from_bytes=int(content["from_bytes"]),
        to_bytes=None if last is None else int(last),
        schedule=str(content["schedule"]),
        pieces=int(content["pieces"]),
        inner=str(content["inner"]),
        segment_bytes=int(content["segment_bytes"]),
        measured_s={str(name): float(seconds) for name, seconds in content["measured_s"].items()},
    )
