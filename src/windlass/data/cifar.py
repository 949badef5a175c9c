"""CIFAR-10 in its binary version: 3,073-byte records, a label and 1,024 bytes each of red, green and blue.

Krizhevsky, *Learning multiple layers of features from tiny images*, 2009.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from windlass.data.dataset import Dataset, array_dataset, check_labels
from windlass.errors import DataError

RECORD_BYTES = 1 + 3 * 32 * 32
SUBFOLDER = "cifar-10-batches-bin"
TRAIN_NAMES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_NAME = "test_batch.bin"
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def open_cifar10(argument: str, holdout: float) -> Dataset:
    """The five training files and the test file of the folder `argument`; nothing is held out."""
    *train_paths, test_path = batch_paths(Path(argument).expanduser())
    train = [read_batch(path) for path in train_paths]
    images = np.concatenate([x for x, _ in train])
    labels = np.concatenate([y for _, y in train])
    return array_dataset("cifar10", (images, labels), read_batch(test_path), class_names=CLASS_NAMES)


def check_cifar10(argument: str, holdout: float) -> None:
    """Existence and sizes; labels are checked when the files are read."""
    batch_paths(Path(argument).expanduser())


def batch_paths(folder: Path) -> list[Path]:
    """The five training files and the test file, of whole records.

    Raises:
        DataError: folder or files missing, or of a wrong size.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    base = folder / SUBFOLDER if (folder / SUBFOLDER).is_dir() else folder
    paths = [base / name for name in (*TRAIN_NAMES, TEST_NAME)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        hint = "" if base != folder else f" (nor is there a folder {SUBFOLDER})"
        raise DataError(f"{base}: CIFAR-10, binary version, lacks {', '.join(missing)}{hint}")
    for path in paths:
        _check_size(path, path.stat().st_size)
    return paths


def read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images N, 3, 32, 32 and labels N of one file.

    Raises:
        DataError: unreadable, not whole records, or a label outside 0..9.
    """
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    _check_size(path, content.size)
    records = content.reshape(-1, RECORD_BYTES)
    labels = records[:, 0].astype(np.int64)
    check_labels(labels, 10, place=str(path))
    return np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32), labels


def _check_size(path: Path, num_bytes: int) -> None:
    if num_bytes == 0 or num_bytes % RECORD_BYTES:
        raise DataError(f"{path}: needs whole records of {RECORD_BYTES} bytes, found {num_bytes} bytes")
