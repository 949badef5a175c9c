"""Handwritten digits, 1,797 images of 8 × 8, which come with scikit-learn: real data without a download.

They are the test set of *Optical recognition of handwritten digits* (Alpaydin and Kaynak, UCI, 1998), with
17 grey levels.  The file is read from scikit-learn's folder without importing scikit-learn, which would
take longer.
"""

from __future__ import annotations

import gzip
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from windlass.data.dataset import Dataset, array_dataset, check_labels, holdout_ids
from windlass.errors import DataError

CLASS_NAMES = tuple("0123456789")


def open_digits(argument: str, holdout: float) -> Dataset:
    """The digits with grey levels scaled to 0..255; a share is held out."""
    path = digits_path()
    rows = read_rows(path) if path.is_file() else _load_with_sklearn()
    labels = rows[:, 64].astype(np.int64)
    check_labels(labels, 10, place=str(path))
    x_NCHW = np.rint(rows[:, :64] * (255.0 / 16.0)).astype(np.uint8).reshape(-1, 1, 8, 8)
    train, test = holdout_ids(len(labels), holdout, place="digits")
    return array_dataset(
        "digits", (x_NCHW[train], labels[train]), (x_NCHW[test], labels[test]), class_names=CLASS_NAMES
    )


def check_digits(argument: str, holdout: float) -> None:
    """Only that scikit-learn is there."""
    digits_path()


def digits_path() -> Path:
    """Where scikit-learn keeps the file; it may be absent in some builds.

    Raises:
        DataError: scikit-learn is not installed.
    """
    spec = find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"


def read_rows(path: Path) -> NDArray[np.float64]:
    """The file's rows: 64 grey levels of 0..16 and the label.

    Raises:
        DataError: the file cannot be read or has another form.
    """
    try:
        with gzip.open(path, "rt", encoding="ascii") as lines:
            rows = np.loadtxt(lines, delimiter=",", ndmin=2)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: not a readable table of digits ({error})") from error
    if rows.shape[1] != 65 or rows[:, :64].min() < 0 or rows[:, :64].max() > 16:
        raise DataError(f"{path}: needs rows of 64 grey levels 0..16 and a label, found {rows.shape[1]} columns")
    return rows


def _load_with_sklearn() -> NDArray[np.float64]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.float64)
