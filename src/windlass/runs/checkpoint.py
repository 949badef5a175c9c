"""Checkpoints: what a run needs to go on, written so that a crash or a full disk leaves the last one whole.

A checkpoint is a folder ``checkpoints/step-00000123`` with ``weights.safetensors`` (the module's state dict),
``state.safetensors`` (optimizer, every rank's buffers and random states) and ``manifest.json`` (position,
seed, metrics, and size and crc32 of each file).  It is written under a temporary name, synced, and renamed.
Safetensors does not notice a flipped bit, so every file is checked against its crc32 before it is used.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from windlass.errors import ConfigError, DataError, WriteError, unknown
from windlass.runs.files import sync_folder, to_json, write_durably

WEIGHTS = "weights.safetensors"
STATE = "state.safetensors"
MANIFEST = "manifest.json"
SCHEMA = "windlass-checkpoint/1"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What was read from a checkpoint: tensors by name, and the manifest."""

    path: Path
    weights: Tensors
    state: Tensors
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        return int(self.manifest["step"])


def write_checkpoint(folder: Path, *, weights: Tensors, state: Tensors, manifest: Mapping[str, Any]) -> Path:
    """Writes ``step-…`` into `folder`, whole or not at all, and returns its path.

    Args:
        folder: the run's ``checkpoints`` folder.
        weights: the module's state dict.
        state: everything else that is a tensor.
        manifest: ``step`` and whatever else is needed to go on; JSON.

    Raises:
        WriteError: the disk is full or the folder cannot be written; what was there before still is.
    """
    name = f"step-{manifest['step']:08d}"
    temporary, final = folder / f".{name}.{os.getpid()}", folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        files = {}
        for file, tensors in ((WEIGHTS, weights), (STATE, state)):
            # Copies: tensors that share memory (views of one flat tensor) are not for safetensors.
            data = safetensors.torch.save(
                {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
            )
            write_durably(temporary / file, data)
            files[file] = {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
        body = {"schema": SCHEMA, **manifest, "files": files}
        write_durably(temporary / MANIFEST, to_json(body | {"crc32": _manifest_crc(body)}).encode())
        sync_folder(temporary)
        _replace(temporary, final)
        sync_folder(folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        whole = newest_whole(folder)
        stands = f"; {whole.name} is whole" if whole else ""
        reason = getattr(error, "strerror", None) or error
        raise WriteError(f"cannot write checkpoint {final}: {reason}{stands}") from None
    return final


def _replace(temporary: Path, final: Path) -> None:
    """Renames a folder, moving aside one of that name: the same step comes again after some resumes."""
    aside = final.with_name(f".{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)  # a crash may have left one
    if final.exists():
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, damaged ones among them."""
    return sorted(path for path in folder.glob("step-[0-9]*") if path.is_dir() and not path.is_symlink())


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, or None."""
    try:
        body = json.loads((path / MANIFEST).read_bytes())
        crc = body.pop("crc32")
        if crc != _manifest_crc(body):
            return f"{path / MANIFEST} does not match its own crc32"
        for name, entry in body["files"].items():
            data = (path / name).read_bytes()
            if len(data) != entry["bytes"]:
                return f"{path / name} has {len(data)} bytes instead of {entry['bytes']}"
            found = f"{zlib.crc32(data):08x}"
            if found != entry["crc32"]:
                return f"{path / name} has crc32 {found} instead of {entry['crc32']}"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path / MANIFEST} cannot be read ({error})"
    return None


def find_checkpoint(folder: Path, name: str = "") -> Path:
    """The checkpoint to go on from: the newest, or the one called `name` (``best``, ``last``, ``step-…``).

    Raises:
        ConfigError: there is no checkpoint of that name.
        DataError: it is damaged, or there is none at all; the newest undamaged one is named.
    """
    present = list_checkpoints(folder)
    if not present:
        raise DataError(f"{folder}: there is no checkpoint to resume from")
    path = (folder / name).resolve() if name else present[-1]
    if name and not path.is_dir():
        choices = [*(p.name for p in present), "best", "last"]
        raise ConfigError(f"{folder}: {unknown('checkpoint', name, choices)}")
    problem = damage(path)
    if problem is None:
        return path
    good = newest_whole(folder)
    offer = (
        f"the newest undamaged checkpoint is {good.name}: add --resume-from {good.name}"
        if good
        else "no other is whole"
    )
    raise DataError(f"checkpoint {path.name} is damaged: {problem}; {offer}")


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint that `find_checkpoint` or `damage` has passed."""
    return Checkpoint(
        path,
        safetensors.torch.load_file(path / WEIGHTS),
        safetensors.torch.load_file(path / STATE),
        json.loads((path / MANIFEST).read_bytes()),
    )


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is not damaged."""
    return next((path for path in reversed(list_checkpoints(folder)) if damage(path) is None), None)


def set_aside_later(folder: Path, step: int) -> list[Path]:
    """Renames checkpoints of later steps to ``abandoned-step-…``, when a run goes on from an earlier one.

    They are another future of the run: as the newest they would take the place of what comes now.
    """
    later = [path for path in list_checkpoints(folder) if int(path.name.removeprefix("step-")) > step]
    for path in later:
        aside = path.with_name(f"abandoned-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return later


def rotate(folder: Path, *, keep_last: int, keep_best: int, metric: str, lower: bool) -> Path | None:
    """Removes what is neither among the newest nor the best, points ``last`` and ``best``, returns the best.

    Args:
        folder: the run's ``checkpoints`` folder.
        keep_last: how many of the newest stay.
        keep_best: how many of the best by `metric` stay besides.
        metric: a key of the manifests' ``metrics``; a checkpoint without it, or with NaN, is never the best.
        lower: whether a lower value is better.

    Raises:
        WriteError: ``last`` or ``best`` cannot be written.
    """
    present = list_checkpoints(folder)
    rated = [(value, path) for path in present if (value := _metric(path, metric)) is not None]
    ranked = [path for _, path in sorted(rated, key=lambda row: (row[0] if lower else -row[0], row[1].name))]
    kept = {*present[-keep_last:], *ranked[:keep_best]}
    for path in present:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    if present:
        _point(folder / "last", present[-1])
    if ranked and keep_best:
        _point(folder / "best", ranked[0])
    else:
        (folder / "best").unlink(missing_ok=True)
    return ranked[0] if ranked else None


def _metric(path: Path, name: str) -> float | None:
    try:
        value = json.loads((path / MANIFEST).read_bytes())["metrics"].get(name)
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return None if value is None or math.isnan(value) else float(value)


def _point(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        temporary.replace(link)
    except OSError as error:
        raise WriteError(f"cannot write {link}: {error.strerror or error}") from None


def _manifest_crc(body: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
