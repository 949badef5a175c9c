"""A folder of image files, one subfolder per class.

Two layouts: PATH/train/CLASS/* with PATH/val or PATH/test beside it, or PATH/CLASS/* (or a lonely
PATH/train), of which a share is held out.  Classes are numbered in the order of their names.  Files are
decoded when asked for; their names lie packed in one block of bytes, because a Python object per sample
costs gigabytes for millions of files, once for every process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from windlass.data.dataset import Dataset, Split, hold_out, holdout_ids
from windlass.data.decode import Box, Resize, centre_square, decode_file, resize_with_pillow
from windlass.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Place: TypeAlias = Callable[[int, int, int], Box]
"""(index in the batch, height, width) -> the box of that image to use."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedNames:
    """File names as one block of bytes; name i ends at ends[i]."""

    blob: bytes
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.blob[start : int(self.ends[index])])


def pack_names(names: Iterable[str]) -> PackedNames:
    """Pack `names`.

    >>> pack_names(["cat/1.jpg", "dog/2.jpg"])[1]
    'dog/2.jpg'
    """
    encoded = [os.fsencode(name) for name in names]
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    return PackedNames(b"".join(encoded), ends)


@dataclass(frozen=True, slots=True, eq=False)
class FolderImages:
    """Images in files: image i is root/names[ids[i]]."""

    root: Path
    names: PackedNames
    ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / self.names[int(self.ids[index])]

    def gather(
        self,
        ids: NDArray[np.int64],
        *,
        size: int | None = None,
        place: Place | None = None,
        resize: Resize = resize_with_pillow,
    ) -> NDArray[np.uint8]:
        """The images `ids`, decoded, cut and scaled: N, 3, size, size.

        Args:
            ids: numbers of images.
            size: rows and columns of the result.
            place: chooses the box to cut from an image at its full resolution; else the centre square.
            resize: scales that box.

        Raises:
            DataError: a file is missing or cannot be decoded; it is named.
        """
        if size is None:
            raise ValueError("images of varied sizes need a size")
        x_NCHW = np.empty((len(ids), 3, size, size), dtype=np.uint8)
        for i, index in enumerate(ids.tolist()):
            x_HWC = decode_file(self.path(index))
            height, width = x_HWC.shape[:2]
            box = centre_square(height, width) if place is None else place(i, height, width)
            x_NCHW[i] = resize(x_HWC, box, size)
        return x_NCHW

    def take(self, ids: NDArray[np.int64]) -> FolderImages:
        """Only the images `ids`."""
        return replace(self, ids=self.ids[ids])


def open_folder(argument: str, holdout: float) -> Dataset:
    """The image folder `argument`; mean and std are ImageNet's, since measuring would decode everything."""
    train_root, test_root = split_roots(Path(argument).expanduser())
    class_names = class_folders(train_root)
    train = list_images(train_root, class_names)
    if test_root is None:
        train, test = hold_out(train, holdout, place=str(train_root))
    else:
        test = list_images(test_root, class_folders(test_root), known=class_names)
    return Dataset(
        name="folder",
        train=train,
        test=test,
        num_classes=len(class_names),
        class_names=class_names,
        image_shape=(3, 0, 0),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def check_folder(argument: str, holdout: float) -> None:
    """The layout, and that every class has an image; no file is opened."""
    train_root, test_root = split_roots(Path(argument).expanduser())
    class_names = class_folders(train_root)
    num_images = sum(len(image_names(train_root / name)) for name in class_names)
    if test_root is None:
        holdout_ids(num_images, holdout, place=str(train_root))
    else:
        list_images(test_root, class_folders(test_root), known=class_names)


def split_roots(root: Path) -> tuple[Path, Path | None]:
    """Folders that hold the classes for training and for testing; None when samples are to be held out.

    Raises:
        DataError: no such folder.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    if not (root / "train").is_dir():
        return root, None
    tests = (root / name for name in ("val", "test"))
    return root / "train", next((path for path in tests if path.is_dir()), None)


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the class folders in `root`, sorted; hidden ones are skipped.

    Raises:
        DataError: there are none.
    """
    names = sorted(entry.name for entry in _visible(root) if entry.is_dir())
    if not names:
        raise DataError(f"{root}: no images; needs one folder per class, as in {root / 'CLASS' / 'image.jpg'}")
    return tuple(names)


def image_names(folder: Path) -> list[str]:
    """Names of the image files in a class folder, sorted.

    Raises:
        DataError: there are none.
    """
    images = (entry for entry in _visible(folder) if entry.name.lower().endswith(SUFFIXES))
    names = sorted(entry.name for entry in images if entry.is_file())
    if not names:
        raise DataError(f"{folder}: no images in this class folder; looked for *{', *'.join(SUFFIXES)}")
    return names


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, without hidden entries."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error})") from error


def list_images(root: Path, class_names: Sequence[str], *, known: Sequence[str] | None = None) -> Split:
    """All images of the class folders in `root`; labels count in `known`, or in `class_names` without it.

    Raises:
        DataError: a class folder is empty or not among `known`.
    """
    numbers = {name: label for label, name in enumerate(class_names if known is None else known)}
    strangers = [name for name in class_names if name not in numbers]
    if strangers:
        raise DataError(f"{root}: classes without training images: {', '.join(strangers)}")
    listed = {name: image_names(root / name) for name in class_names}
    names = pack_names(f"{folder}/{file}" for folder, files in listed.items() for file in files)
    labels = np.repeat([numbers[name] for name in listed], [len(files) for files in listed.values()])
    return Split(FolderImages(root, names, np.arange(len(names))), labels.astype(np.int64))
