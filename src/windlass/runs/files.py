"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from windlass.errors import WriteError


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file and returns when it is on the disk.  Not atomic: for files in a folder still unnamed."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` as a whole: another process sees the old text or the new one.

    Raises:
        WriteError: it could not be written; the old file stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_durably(temporary, text.encode())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from None


def sync_folder(folder: Path) -> None:
    """Makes names made or changed in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_yaml(mapping: Any) -> str:
    """YAML as a person writes it: in the order given, nothing on one line but short lists."""
    text: str = yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    return text


def to_json(value: Any) -> str:
    """JSON for a person's eyes."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
