"""Checkpoints: equality, every kind of damage, full disks, rotation."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from windlass.errors import ConfigError, DataError, WriteError
from windlass.runs import checkpoint as checkpoint_module
from windlass.runs import files as files_module
from windlass.runs.checkpoint import (
    MANIFEST,
    STATE,
    WEIGHTS,
    damage,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    rotate,
    write_checkpoint,
)

FILES = (WEIGHTS, STATE, MANIFEST)
Tensors = dict[str, torch.Tensor]


def tensors(seed: int = 0, size: int = 6) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(size, generator=generator), "b": torch.randn(2, generator=generator)}


def save(folder: Path, step: int, **metrics: float) -> Path:
    manifest = {"step": step, "metrics": metrics, "network": "small"}
    return write_checkpoint(folder, weights=tensors(step), state={"s": torch.ones(3)}, manifest=manifest)


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def resaved(folder: Path, found: Tensors) -> Tensors:
    path = write_checkpoint(folder, weights=found, state={}, manifest={"step": 1})
    assert damage(path) is None
    return read_checkpoint(path).weights


# --- equality ---------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    manifest = {
        "step": 123,
        "progress": {"epoch": 2, "loss_sum": 0.1 + 0.2, "best": None},
        "metrics": {"test_loss": 1e-17, "none": math.inf},
        "network": "größe",
    }
    path = write_checkpoint(tmp_path / "run" / "checkpoints", weights=tensors(), state=tensors(1), manifest=manifest)
    assert path == tmp_path / "run" / "checkpoints" / "step-00000123"
    found = read_checkpoint(find_checkpoint(path.parent))
    assert found.path == path and found.step == 123
    for wrote, read in ((tensors(), found.weights), (tensors(1), found.state)):
        assert wrote.keys() == read.keys()
        assert all(torch.equal(wrote[key], read[key]) for key in wrote)
    assert {key: found.manifest[key] for key in manifest} == manifest
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert hidden(path.parent) == []


STRANGE: dict[str, torch.Tensor] = {
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "channels_last": torch.arange(48.0).reshape(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
    "strided": torch.arange(10.0)[::3],
    "expanded": torch.tensor([3.0]).expand(5),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 3),
    "bool": torch.tensor([True, False]),
    "half": torch.tensor([1.5], dtype=torch.float16),
    "bfloat16": torch.tensor([1.5], dtype=torch.bfloat16),
    "double": torch.tensor([0.1], dtype=torch.float64),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "special": torch.tensor([math.inf, -0.0, 1e-45]),
    "learned": torch.ones(2, requires_grad=True),
}


@pytest.mark.parametrize("name", STRANGE)
def test_every_kind_of_tensor_comes_back_equal(tmp_path: Path, name: str) -> None:
    wrote = STRANGE[name]
    read = resaved(tmp_path, {name: wrote})[name]
    assert read.dtype == wrote.dtype and read.shape == wrote.shape and torch.equal(read, wrote)
    assert torch.equal(read.signbit(), wrote.signbit())
    assert not read.requires_grad


def test_tied_and_overlapping_tensors_come_back_equal_and_apart(tmp_path: Path) -> None:
    flat = torch.arange(10.0)
    read = resaved(tmp_path, {"a": flat[:6], "b": flat[4:], "c": flat, "again": flat})
    assert torch.equal(read["a"], flat[:6]) and torch.equal(read["b"], flat[4:])
    assert torch.equal(read["c"], flat) and torch.equal(read["again"], flat)
    read["c"].zero_()
    assert torch.equal(read["again"], flat)


# --- damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("bit", [0, 5, 7])
def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path, name: str, bit: int) -> None:
    file = save(tmp_path, 2, test_loss=0.5) / name
    good = file.read_bytes()
    meaning = json.loads(good) if name == MANIFEST else None
    for place in range(0, len(good), 3):
        spoiled = bytearray(good)
        spoiled[place] ^= 1 << bit
        file.write_bytes(spoiled)
        problem = damage(file.parent)
        if problem is None:  # JSON that says the same (1e5 and 1E5) is no damage
            assert name == MANIFEST and json.loads(bytes(spoiled)) == meaning
        else:
            assert name in problem
    file.write_bytes(good)
    assert damage(file.parent) is None


@pytest.mark.parametrize("name", FILES)
def test_the_previous_good_checkpoint_is_offered(tmp_path: Path, name: str) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for step in (2, 4):  # the newest, and one that must not be offered in its place
        file = tmp_path / f"step-0000000{step}" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 16
        file.write_bytes(data)
    with pytest.raises(DataError) as caught:
        find_checkpoint(tmp_path)
    line = str(caught.value)
    assert caught.value.exit_code == 3
    assert line.startswith("checkpoint step-00000004 is damaged: ") and name in line
    assert line.endswith("the newest undamaged checkpoint is step-00000003: add --resume-from step-00000003")
    assert find_checkpoint(tmp_path, "step-00000003") == tmp_path / "step-00000003"
    with pytest.raises(DataError, match=r"checkpoint step-00000002 is damaged: .* is step-00000003"):
        find_checkpoint(tmp_path, "step-00000002")


@pytest.mark.parametrize("name", FILES)
def test_truncated_lengthened_empty_and_missing_files_are_noticed(tmp_path: Path, name: str) -> None:
    file = save(tmp_path, 1) / name
    good = file.read_bytes()
    for size in (0, 1, len(good) // 2, len(good) - 2):
        file.write_bytes(good[:size])
        problem = damage(file.parent)
        assert problem is not None and name in problem
        if name != MANIFEST:
            assert problem.endswith(f"has {size} bytes instead of {len(good)}")
    file.write_bytes(good + b"x")
    assert damage(file.parent) is not None
    file.unlink()
    assert damage(file.parent) == f"{file} is missing"
    with pytest.raises(DataError, match=r"is damaged: .* is missing; no other is whole"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "3", '{"crc32": 3}', '{"crc32": "0", "files": 3}', "{"])
def test_a_manifest_of_nonsense_is_damage_not_a_crash(tmp_path: Path, text: str) -> None:
    file = save(tmp_path, 1) / MANIFEST
    file.write_text(text)
    problem = damage(file.parent)
    assert problem is not None and MANIFEST in problem


def test_a_folder_in_the_place_of_a_file_is_damage(tmp_path: Path) -> None:
    file = save(tmp_path, 1) / WEIGHTS
    file.unlink()
    file.mkdir()
    assert damage(file.parent) is not None


# --- finding ----------------------------------------------------------------------------------------------


def test_the_newest_is_found_and_others_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step, test_loss=step)
    rotate(tmp_path, keep_last=3, keep_best=1, metric="test_loss", lower=True)
    assert find_checkpoint(tmp_path).name == "step-00000100"
    assert find_checkpoint(tmp_path, "last").name == "step-00000100"
    assert find_checkpoint(tmp_path, "best").name == "step-00000009"
    assert find_checkpoint(tmp_path, "step-00000010").name == "step-00000010"
    with pytest.raises(ConfigError, match=r"unknown checkpoint 'step-0000001'; did you mean 'step-00000010'"):
        find_checkpoint(tmp_path, "step-0000001")


def test_where_there_is_none_it_is_a_data_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="there is no checkpoint to resume from"):
            find_checkpoint(folder)


# --- full disks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", FILES)
def test_a_full_disk_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save(tmp_path, 1)
    write = files_module.write_durably

    def half(path: Path, data: bytes) -> None:
        if path.name != failing:
            return write(path, data)
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint_module, "write_durably", half)
    for step in (2, 1):  # a new one, and the same again
        with pytest.raises(WriteError) as caught:
            save(tmp_path, step)
        assert caught.value.exit_code == 5
        line = str(caught.value)
        assert f"step-0000000{step}: No space left on device; step-00000001 is whole" in line
        assert names(tmp_path) == ["step-00000001"] and hidden(tmp_path) == []
        assert damage(tmp_path / "step-00000001") is None
        assert torch.equal(read_checkpoint(tmp_path / "step-00000001").weights["w"], tensors(1)["w"])


LIMITED = """
import resource, sys, torch
from pathlib import Path
from windlass.errors import WriteError
from windlass.runs.checkpoint import write_checkpoint

folder, one = Path(sys.argv[1]), {"w": torch.ones(16)}
write_checkpoint(folder, weights=one, state=one, manifest={"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
large = {"w": torch.ones(10_000)}
try:
    write_checkpoint(folder, weights=one, state=large, manifest={"step": 2})
except WriteError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_limit_of_the_kernel_is_a_write_error_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 5, done.stderr
    assert "step-00000002: File too large; step-00000001 is whole" in done.stdout
    assert names(tmp_path) == ["step-00000001"] and hidden(tmp_path) == []
    assert damage(tmp_path / "step-00000001") is None


def test_a_folder_that_cannot_be_made_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot write checkpoint .*: Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_links_that_cannot_be_made_are_a_write_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "last").mkdir()  # a folder is not replaced by a link
    with pytest.raises(WriteError, match=f"^cannot write {tmp_path / 'last'}: "):
        rotate(tmp_path, keep_last=1, keep_best=0, metric="test_loss", lower=True)


# --- the same step again ----------------------------------------------------------------------------------


def test_the_same_step_again_replaces_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".step-00000001.old").mkdir()  # left by a crash between two renames
    (tmp_path / ".step-00000001.old" / MANIFEST).write_text("{}")
    path = write_checkpoint(tmp_path, weights={"w": torch.zeros(1)}, state={}, manifest={"step": 1})
    assert damage(path) is None and torch.equal(read_checkpoint(path).weights["w"], torch.zeros(1))
    assert names(tmp_path) == ["step-00000001"] and hidden(tmp_path) == []


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(str(os.getpid())):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(WriteError, match="Input/output error; step-00000001 is whole"):
        save(tmp_path, 1)
    assert damage(tmp_path / "step-00000001") is None and hidden(tmp_path) == []


# --- rotation ---------------------------------------------------------------------------------------------

VALUES = {1: 0.5, 2: 0.9, 3: 0.2, 4: 0.7, 5: 0.6, 6: 0.65}
ROTATIONS: list[tuple[int, int, bool, list[int], int]] = [
    # keep_last, keep_best, lower is better, what stays, the best
    (1, 0, False, [6], 2),
    (2, 1, False, [2, 5, 6], 2),
    (2, 1, True, [3, 5, 6], 3),
    (1, 3, False, [2, 4, 6], 2),
    (1, 2, True, [1, 3, 6], 3),
    (3, 1, False, [2, 4, 5, 6], 2),
    (9, 9, True, [1, 2, 3, 4, 5, 6], 3),
]


@pytest.mark.parametrize(("keep_last", "keep_best", "lower", "stays", "best"), ROTATIONS)
def test_the_newest_and_the_best_stay(
    tmp_path: Path, keep_last: int, keep_best: int, lower: bool, stays: list[int], best: int
) -> None:
    for step, value in VALUES.items():
        save(tmp_path, step, m=value)
    found = rotate(tmp_path, keep_last=keep_last, keep_best=keep_best, metric="m", lower=lower)
    assert found == tmp_path / f"step-0000000{best}"
    assert names(tmp_path) == [f"step-0000000{step}" for step in stays]
    assert (tmp_path / "last").readlink() == Path("step-00000006")
    assert (tmp_path / "best").is_symlink() == (keep_best > 0)
    if keep_best:
        assert (tmp_path / "best").readlink() == Path(f"step-0000000{best}")
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("lower", [False, True])
def test_rotation_after_every_write_keeps_the_same_as_one_at_the_end(tmp_path: Path, lower: bool) -> None:
    for step, value in VALUES.items():
        save(tmp_path, step, m=value)
        rotate(tmp_path, keep_last=2, keep_best=1, metric="m", lower=lower)
    assert names(tmp_path) == [f"step-0000000{step}" for step in ([3, 5, 6] if lower else [2, 5, 6])]


def test_the_earlier_of_two_equals_is_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, m=0.5)
    for lower in (False, True):
        assert rotate(tmp_path, keep_last=3, keep_best=1, metric="m", lower=lower) == tmp_path / "step-00000001"


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("place", range(4))
def test_a_checkpoint_without_the_metric_or_with_nan_is_never_the_best(tmp_path: Path, lower: bool, place: int) -> None:
    values: list[dict[str, Any]] = [{"m": 0.5}, {"m": 0.7}, {"m": 0.6}]
    values.insert(place, {"m": math.nan})
    values.insert(0, {})
    for step, metrics in enumerate(values):
        save(tmp_path, step, **metrics)
    best = rotate(tmp_path, keep_last=9, keep_best=1, metric="m", lower=lower)
    assert best is not None
    assert values[int(best.name.removeprefix("step-"))] == {"m": 0.5 if lower else 0.7}


def test_without_any_metric_there_is_no_best(tmp_path: Path) -> None:
    assert rotate(tmp_path, keep_last=1, keep_best=1, metric="m", lower=True) is None
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert rotate(tmp_path, keep_last=1, keep_best=1, metric="m", lower=True) is None
    assert names(tmp_path) == ["step-00000002"] and not (tmp_path / "best").exists()


def test_a_checkpoint_with_an_unreadable_manifest_is_no_best(tmp_path: Path) -> None:
    save(tmp_path, 1, m=0.1)
    (tmp_path / "step-00000001" / MANIFEST).write_text("{")
    save(tmp_path, 2, m=0.5)
    save(tmp_path, 3, m=0.6)
    assert rotate(tmp_path, keep_last=1, keep_best=1, metric="m", lower=True) == tmp_path / "step-00000002"
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
