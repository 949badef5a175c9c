"""The run folder: where it is, what stands in it beside metrics and checkpoints."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from windlass.errors import ConfigError, WriteError
from windlass.plan.graph import Graph
from windlass.plan.plan import Plan
from windlass.runs.files import to_json, to_yaml, write_atomically


def choose_folder(out: str, *, network: str, source: str, resume: bool) -> Path:
    """The run folder that `out` means; empty for the next free ``runs/NETWORK-DATA-NNN``.

    Raises:
        ConfigError: the folder holds something already and the run does not resume.
        WriteError: the folder cannot even be looked at.
    """
    if not out:
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{network}-{source.split(':')[0]}")
        number = 1
        while Path(f"runs/{stem}-{number:03d}").exists():
            number += 1
        return Path(f"runs/{stem}-{number:03d}")
    folder = Path(out)
    try:
        is_file = folder.exists() and not folder.is_dir()
        is_occupied = folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise WriteError(f"cannot write {folder}: {error.strerror or error}") from None
    if is_file:
        raise ConfigError(f"--out {folder}: is a file, not a folder")
    if not resume and is_occupied:
        raise ConfigError(f"--out {folder}: is not empty; add --resume to go on with the run in it, or name another")
    return folder


def check_writable(folder: Path) -> None:
    """Refuses early a run folder that could not be made or written.

    Raises:
        WriteError: names the folder and what is in the way.
    """
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise WriteError(f"cannot write {folder}: {parent} is not a folder that may be written")


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that `folder` is or will be on."""
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free


def write_folder(
    folder: Path, *, config: Mapping[str, Any], plan: Plan, graph: Graph, machine: Mapping[str, Any]
) -> None:
    """Makes the run folder with everything that is known before the first step.

    Raises:
        WriteError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot make {folder}: {error.strerror}") from None
    write_atomically(folder / "config.yaml", to_yaml(config))
    write_atomically(folder / "plan.yaml", to_yaml(plan.to_mapping()))
    write_atomically(folder / "graph.json", to_json(dataclasses.asdict(graph)))
    write_atomically(folder / "machine.json", to_json(machine))


def describe_machine(*, hosts: list[str], threads: int, versions: Mapping[str, str]) -> dict[str, Any]:
    """What the run ran on, for the report."""
    return {
        "host": platform.node(),
        "hosts": ", ".join(dict.fromkeys(hosts)),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads_per_rank": threads,
        "memory_bytes": memory_bytes("MemTotal"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **versions,
        "commit": _commit(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def memory_bytes(name: str) -> int:
    """A line of ``/proc/meminfo`` (``MemTotal``, ``MemAvailable``) in bytes; 0 where there is none."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor()


def _commit() -> str:
    """The commit of the working folder, as a run is usually started from the user's own project."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
