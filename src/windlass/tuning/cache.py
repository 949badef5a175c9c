"""Measured times on disk, so that a machine measures each convolution once.

One JSON file per fingerprint of the machine, in ``$XDG_CACHE_HOME/windlass/convolution`` or
``~/.cache/windlass/convolution``.  It is replaced as a whole, and merged with what other processes have written
meanwhile under a lock.  A file that is damaged, or cannot be written, costs one warning and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from windlass.tuning.cost import Machine

try:
    import fcntl
except ImportError:  # not on this system: two processes may then lose each other's newest times
    fcntl = None  # type: ignore[assignment]

SCHEMA = "windlass-convolution/1"

Times = dict[str, dict[str, dict[str, float]]]
"""Seconds by the case's key, direction and algorithm."""

Warn = Callable[[str], None]


def cache_folder() -> Path:
    """Where measured times are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "windlass" / "convolution"


@dataclass
class TimesCache:
    """The times of one machine.

    Args:
        fingerprint: what the times depend on beside the shapes; names the file.
        warn: takes a line for a person.
        folder: where the file is; None keeps times in memory only.
    """

    fingerprint: Mapping[str, object]
    warn: Warn
    folder: Path | None
    machine: Machine | None = None
    times: Times = field(default_factory=dict)
    _new: Times = field(default_factory=dict)
    _warned: bool = False

    def __post_init__(self) -> None:
        """Reads the file."""
        self.machine, self.times = self._read()

    @property
    def path(self) -> Path | None:
        """The file."""
        digest = hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{digest}.json" if self.folder is not None else None

    def get(self, key: str, direction: str) -> dict[str, float]:
        """Seconds by algorithm; empty where nothing was measured."""
        return dict(self.times.get(key, {}).get(direction, {}))

    def put(self, key: str, direction: str, seconds: Mapping[str, float]) -> None:
        """Keeps what one run measured, side by side; older times of the same algorithms are replaced."""
        for times in (self.times, self._new):
            times.setdefault(key, {}).setdefault(direction, {}).update(seconds)

    def save(self) -> None:
        """Writes what is new, beside what other processes have written."""
        path = self.path
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                machine, times = self._read()
                _merge(times, self._new)
                _replace(path, self._to_text(self.machine or machine, times))
        except OSError as error:
            self._complain(f"measured times are not kept: cannot write {path}: {error.strerror or error}")
            return
        self._new = {}

    def _to_text(self, machine: Machine | None, times: Times) -> str:
        speed = {"peak_flops": machine.peak_flops, "bytes_per_s": machine.bytes_per_s} if machine else None
        content = {"schema": SCHEMA, "fingerprint": self.fingerprint, "machine": speed, "times": times}
        return json.dumps(content, indent=1) + "\n"

    def _read(self) -> tuple[Machine | None, Times]:
        path = self.path
        if path is None:
            return None, {}
        try:
            content = json.loads(path.read_text())
            return _machine(content, self.fingerprint), _times(content)
        except FileNotFoundError:
            return None, {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._complain(f"{path} is damaged and will be written anew ({type(error).__name__}: {_line(error)})")
            return None, {}

    def _complain(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            self.warn(message)


def _machine(content: Mapping[str, object], fingerprint: Mapping[str, object]) -> Machine | None:
    if content["schema"] != SCHEMA:
        raise ValueError(f"schema {content['schema']!r}")
    speed, threads = content["machine"], fingerprint.get("threads", 1)
    if speed is None:
        return None
    if not isinstance(speed, dict) or not isinstance(threads, int):
        raise ValueError("machine")
    return Machine(_positive(speed["peak_flops"]), _positive(speed["bytes_per_s"]), threads)


def _times(content: Mapping[str, object]) -> Times:
    table = content["times"]
    if not isinstance(table, dict):
        raise ValueError("times")
    return {
        key: {
            direction: {name: _positive(value) for name, value in seconds.items()}
            for direction, seconds in directions.items()
        }
        for key, directions in table.items()
    }


def _positive(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is no time or speed")
    return float(value)


def _merge(times: Times, new: Times) -> None:
    for key, directions in new.items():
        for direction, seconds in directions.items():
            times.setdefault(key, {}).setdefault(direction, {}).update(seconds)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:80]


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone with the file; without a lock where the file system has none."""
    with path.open("a") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
