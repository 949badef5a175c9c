"""Files that are whole or not there."""

import errno
import os
from pathlib import Path

import pytest
import yaml

from windlass.errors import WriteError
from windlass.runs import files as files_module
from windlass.runs.files import sync_folder, to_json, to_yaml, write_atomically, write_durably


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "long and old")
    write_atomically(path, "nëw")
    assert path.read_bytes() == "nëw".encode()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def half(target: Path, data: bytes) -> None:
        target.write_bytes(data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files_module, "write_durably", half)
    with pytest.raises(WriteError, match=rf"^cannot write {path}: No space left on device$"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_missing_folder_is_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="No such file or directory"):
        write_atomically(tmp_path / "missing" / "a.txt", "x")


def test_durable_writes_hold_every_byte_and_folders_can_be_synced(tmp_path: Path) -> None:
    data = bytes(range(256)) * 100
    write_durably(tmp_path / "a", data)
    sync_folder(tmp_path)
    assert (tmp_path / "a").read_bytes() == data
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")


def test_yaml_keeps_the_order_and_the_letters() -> None:
    mapping = {"z": 1, "a": {"ü": [1, 2, 3]}, "m": "yes", "float": 1e-10}
    text = to_yaml(mapping)
    assert yaml.safe_load(text) == mapping and list(yaml.safe_load(text)) == list(mapping)
    assert "ü: [1, 2, 3]" in text


def test_json_keeps_the_letters_and_ends_its_line() -> None:
    assert to_json({"ü": [1]}) == '{\n "ü": [\n  1\n ]\n}\n'
