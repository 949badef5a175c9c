"""Where samples come from, in which order, and how they are changed: sources, order and augmentation.

Nothing here imports PyTorch, so that a command can refuse bad data at once; `windlass.data.serving`, which
makes the batches, does and is imported by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from windlass.data.augment import AUGMENTATIONS, Augment, parse_augment
from windlass.data.cifar import check_cifar10, open_cifar10
from windlass.data.dataset import ArrayImages, Dataset, Images, Split, check_holdout
from windlass.data.digits import check_digits, open_digits
from windlass.data.folder import check_folder, open_folder
from windlass.data.idx import check_idx, open_fashion_mnist, open_mnist
from windlass.data.order import EpochOrder, permute, shard, uniforms
from windlass.data.patches import check_patches, open_patches
from windlass.data.synthetic import check_synthetic, open_synthetic
from windlass.errors import ConfigError, unknown

__all__ = [
    "AUGMENTATIONS",
    "DEFAULT_SOURCE",
    "SOURCES",
    "ArrayImages",
    "Augment",
    "Dataset",
    "EpochOrder",
    "Images",
    "SourceEntry",
    "Split",
    "check_dataset",
    "open_dataset",
    "parse_augment",
    "parse_spec",
    "permute",
    "shard",
    "uniforms",
]

DEFAULT_SOURCE = "digits"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceEntry:
    """A row of `SOURCES`.

    Attributes:
        open: (argument, held-out share) -> the dataset.
        check: the same arguments; raises what `open` would, as far as that can be told quickly.
        needs_path: whether the argument must be given.
        argument: what may follow the colon; empty when nothing may.
        description: one line.
    """

    open: Callable[[str, float], Dataset]
    check: Callable[[str, float], None]
    needs_path: bool
    argument: str
    description: str


SOURCES: dict[str, SourceEntry] = {
    "digits": SourceEntry(
        open=open_digits,
        check=check_digits,
        needs_path=False,
        argument="",
        description="1,797 handwritten digits of 8x8 that come with scikit-learn",
    ),
    "mnist": SourceEntry(
        open=open_mnist,
        check=check_idx,
        needs_path=True,
        argument="PATH",
        description="70,000 handwritten digits of 28x28; PATH holds the IDX files, gzipped or not",
    ),
    "fashion-mnist": SourceEntry(
        open=open_fashion_mnist,
        check=check_idx,
        needs_path=True,
        argument="PATH",
        description="70,000 articles of clothing of 28x28; PATH holds the IDX files, gzipped or not",
    ),
    "cifar10": SourceEntry(
        open=open_cifar10,
        check=check_cifar10,
        needs_path=True,
        argument="PATH",
        description="60,000 colour images of 32x32; PATH holds the binary version",
    ),
    "folder": SourceEntry(
        open=open_folder,
        check=check_folder,
        needs_path=True,
        argument="PATH",
        description="image files in PATH/train/CLASS and PATH/val/CLASS, or in PATH/CLASS",
    ),
    "synthetic": SourceEntry(
        open=open_synthetic,
        check=check_synthetic,
        needs_path=False,
        argument="CxHxW:CLASSES:COUNT",
        description="made-up images that can be learned, 2,048 of 3x32x32 in 10 classes unless told",
    ),
    "patches": SourceEntry(
        open=lambda argument, holdout: open_patches(argument, holdout, open_source=_open),
        check=lambda argument, holdout: check_patches(argument, holdout, check_source=_check),
        needs_path=False,
        argument="SOURCE:HxW:COUNT",
        description="unlabelled patches, 2,048 of 16x16 of made-up natural pictures, or of the images of SOURCE",
    ),
}


def _open(spec: str, holdout: float) -> Dataset:
    return open_dataset(spec, holdout=holdout)


def _check(spec: str, holdout: float) -> None:
    check_dataset(spec, holdout=holdout)


def parse_spec(spec: str) -> tuple[str, str]:
    """Split `NAME` or `NAME:ARGUMENT`; the argument is empty when none is given.

    Raises:
        ConfigError: unknown name, missing path, or an argument for a source that takes none.

    >>> parse_spec("mnist:data/mnist")
    ('mnist', 'data/mnist')
    """
    name, colon, argument = spec.partition(":")
    if name not in SOURCES:
        raise ConfigError(unknown("data source", name, SOURCES))
    entry = SOURCES[name]
    if entry.needs_path and not argument:
        raise ConfigError(f"{name} needs the place of its files: --data {name}:{entry.argument}")
    if colon and not entry.argument:
        raise ConfigError(f"{name} takes no argument, got {spec!r}: --data {name}")
    return name, argument


def open_dataset(spec: str, *, holdout: float = 0.2) -> Dataset:
    """Open the source that `spec` names.

    Args:
        spec: as `parse_spec` reads it.
        holdout: share of the samples kept for testing, where the source has no test samples of its own.

    Raises:
        ConfigError: `spec` or `holdout` does not fit.
        DataError: files missing or damaged; one line names the file, what was found and what is needed.

    >>> dataset = open_dataset("digits")
    >>> len(dataset.train), len(dataset.test), dataset.image_shape
    (1438, 359, (1, 8, 8))
    """
    name, argument = parse_spec(spec)
    check_holdout(holdout)
    return SOURCES[name].open(argument, holdout)


def check_dataset(spec: str, *, holdout: float = 0.2) -> None:
    """Raise the errors of `open_dataset` that can be told from existence, headers and sizes."""
    name, argument = parse_spec(spec)
    check_holdout(holdout)
    SOURCES[name].check(argument, holdout)
