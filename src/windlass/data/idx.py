"""MNIST and Fashion-MNIST in their own file format, IDX, plain or gzipped.

The format (LeCun, Cortes and Burges, *The MNIST database*): a big-endian magic number 0x000008dd, where 08
says unsigned bytes and dd is the number of dimensions; the dimensions, 32 bits each; the bytes, last
dimension fastest.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from math import prod
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from windlass.data.dataset import Dataset, array_dataset, check_labels, holdout_ids
from windlass.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"

CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
        "ankle boot",
    ),
}  # fmt: skip

Pair: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.int64]]


def open_mnist(argument: str, holdout: float) -> Dataset:
    """Handwritten digits (LeCun et al., Proc. IEEE 86, 1998) from the folder `argument`."""
    return _open("mnist", argument, holdout)


def open_fashion_mnist(argument: str, holdout: float) -> Dataset:
    """Articles of clothing (Xiao, Rasul and Vollgraf, arXiv:1708.07747) from the folder `argument`."""
    return _open("fashion-mnist", argument, holdout)


def check_idx(argument: str, holdout: float) -> None:
    """Read every file once: a gzipped length shows only when unpacked, which takes a fraction of a second."""
    train, test = read_pairs(Path(argument).expanduser())
    if train is None or test is None:
        present = train or test
        assert present is not None
        holdout_ids(len(present[1]), holdout, place=argument)


def _open(name: str, argument: str, holdout: float) -> Dataset:
    folder = Path(argument).expanduser()
    train, test = read_pairs(folder)
    if train is None or test is None:
        present = train or test
        assert present is not None
        train_ids, test_ids = holdout_ids(len(present[1]), holdout, place=str(folder))
        train, test = ((present[0][ids], present[1][ids]) for ids in (train_ids, test_ids))
    return array_dataset(name, train, test, class_names=CLASS_NAMES[name])


def read_pairs(folder: Path) -> tuple[Pair | None, Pair | None]:
    """The `train` and the `t10k` pair of images N, 1, H, W and labels; None for a pair that is not there.

    Raises:
        DataError: neither is there, one is incomplete, or a file is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    train, test = read_pair(folder, "train"), read_pair(folder, "t10k")
    if train is None and test is None:
        names = ", ".join(f"{prefix}-images-idx3-ubyte" for prefix in ("train", "t10k"))
        raise DataError(f"{folder}: no IDX files; looked for {names} (also with .idx3, also with .gz)")
    if train is not None and test is not None and train[0].shape[1:] != test[0].shape[1:]:
        sizes = " and ".join(f"{x.shape[2]}x{x.shape[3]}" for x, _ in (train, test))
        raise DataError(f"{folder}: training and test images must have one size, found {sizes}")
    return train, test


def read_pair(folder: Path, prefix: str) -> Pair | None:
    """Images N, 1, H, W and labels N of one pair of files; None when neither file is there."""
    images_path = _find(folder, f"{prefix}-images", 3)
    labels_path = _find(folder, f"{prefix}-labels", 1)
    if images_path is None and labels_path is None:
        return None
    if images_path is None or labels_path is None:
        kind, num_dims = ("images", 3) if images_path is None else ("labels", 1)
        names = ", ".join(_names(f"{prefix}-{kind}", num_dims))
        raise DataError(f"{folder}: {images_path or labels_path} has no {kind}; looked for {names}")
    images = read_idx(images_path, num_dims=3)
    labels = read_idx(labels_path, num_dims=1).astype(np.int64)
    if len(images) != len(labels):
        raise DataError(f"{labels_path}: needs one label for each of {len(images)} images, found {len(labels)}")
    if images.size == 0:
        raise DataError(f"{images_path}: no images, its dimensions are {'x'.join(map(str, images.shape))}")
    check_labels(labels, 10, place=str(labels_path))
    return images[:, None], labels


def _names(stem: str, num_dims: int) -> list[str]:
    return [f"{stem}{dot}idx{num_dims}-ubyte{end}" for dot in "-." for end in ("", ".gz")]


def _find(folder: Path, stem: str, num_dims: int) -> Path | None:
    paths = (folder / name for name in _names(stem, num_dims))
    return next((path for path in paths if path.is_file()), None)


def read_idx(path: Path, *, num_dims: int) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes, read-only.

    Raises:
        DataError: unreadable, not gzip though named so, another magic number, too short or too long.
    """
    content = _read_bytes(path)
    header_bytes = 4 + 4 * num_dims
    if len(content) >= 4:
        magic, needed = int.from_bytes(content[:4], "big"), 0x0800 + num_dims
        if magic != needed:
            raise DataError(f"{path}: needs magic number 0x{needed:08x}, found 0x{magic:08x}")
    if len(content) < header_bytes:
        raise DataError(f"{path}: truncated, needs a header of {header_bytes} bytes, found {len(content)} bytes")
    shape = struct.unpack_from(f">{num_dims}I", content, 4)
    num_bytes = header_bytes + prod(shape)
    if len(content) != num_bytes:
        what = "truncated" if len(content) < num_bytes else "too long"
        dims = "x".join(map(str, shape))
        raise DataError(f"{path}: {what}, {dims} needs {num_bytes} bytes, found {len(content)}")
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    """All bytes of a file, unpacked when it is gzip; up to the break of a stream that breaks off."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start == GZIP_MAGIC:
            return _unpack(path)
        if path.suffix == ".gz":
            raise DataError(f"{path}: not gzip, needs to begin with 0x1f8b, found 0x{start.hex()}")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _unpack(path: Path) -> bytes:
    """Unpacked bytes; a stream that breaks off is left to the caller, who knows how many were needed."""
    content = bytearray()
    try:
        with gzip.open(path) as file:
            while piece := file.read(1 << 20):
                content += piece
    except EOFError:
        return bytes(content)
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip stream after {len(content)} unpacked bytes ({error})") from error
    return bytes(content)
