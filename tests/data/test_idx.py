import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from windlass.data import check_dataset, open_dataset
from windlass.errors import DataError

REAL = Path(os.environ.get("WINDLASS_TEST_DATA", "")) / "mnist"
needs_mnist = pytest.mark.skipif(
    not (REAL / "t10k-images-idx3-ubyte.gz").is_file(),
    reason="WINDLASS_TEST_DATA names no folder with mnist/t10k-images-idx3-ubyte.gz",
)


def idx(array: NDArray[np.uint8], *, magic: int | None = None) -> bytes:
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.tobytes()


def write_pair(folder: Path, prefix: str, *, n: int = 20, dot: str = "-", zipped: bool = False) -> None:
    rng = np.random.default_rng(n)
    contents = {
        f"{prefix}-images{dot}idx3-ubyte": idx(rng.integers(0, 256, (n, 6, 5), dtype=np.uint8)),
        f"{prefix}-labels{dot}idx1-ubyte": idx((np.arange(n) % 10).astype(np.uint8)),
    }
    for name, content in contents.items():
        path = folder / (name + ".gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("zipped", [False, True])
def test_both_pairs_are_read_under_all_names(tmp_path: Path, name: str, dot: str, zipped: bool) -> None:
    write_pair(tmp_path, "train", n=30, dot=dot, zipped=zipped)
    write_pair(tmp_path, "t10k", n=12, dot=dot, zipped=zipped)
    spec = f"{name}:{tmp_path}"
    check_dataset(spec)
    dataset = open_dataset(spec)
    assert dataset.name == name
    assert (len(dataset.train), len(dataset.test)) == (30, 12)
    assert dataset.image_shape == (1, 6, 5)
    assert len(dataset.class_names) == dataset.num_classes == 10
    expected = np.random.default_rng(30).integers(0, 256, (30, 6, 5), dtype=np.uint8)
    ids = np.array([3, 29, 3])
    assert np.array_equal(dataset.train.images.gather(ids)[:, 0], expected[ids])
    assert np.array_equal(dataset.train.labels, np.arange(30) % 10)
    # Both sums run over 900 numbers below 1 in float64: their error is far below 1e-12.
    assert dataset.mean == pytest.approx([expected.mean() / 255], abs=1e-12)
    assert dataset.std == pytest.approx([expected.std() / 255], abs=1e-12)


@pytest.mark.parametrize("prefix", ["t10k", "train"])
def test_a_single_pair_is_cut_in_two(tmp_path: Path, prefix: str) -> None:
    write_pair(tmp_path, prefix, n=20)
    dataset = open_dataset(f"mnist:{tmp_path}", holdout=0.25)
    assert (len(dataset.train), len(dataset.test)) == (15, 5)
    everything = np.concatenate([dataset.train.images.gather(np.arange(15)), dataset.test.images.gather(np.arange(5))])
    original = np.random.default_rng(20).integers(0, 256, (20, 6, 5), dtype=np.uint8)
    assert {image.tobytes() for image in everything} == {image.tobytes() for image in original}


def change(path: Path, alter: Callable[[bytes], bytes]) -> None:
    """Alter the content of a file, inside its gzip wrapper if it has one."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(alter(gzip.decompress(content))))
    else:
        path.write_bytes(alter(content))


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "truncated": ("images", lambda b: b[:-7], "truncated, 20x6x5 needs 616 bytes, found 609"),
    "too long": ("images", lambda b: b + b"xy", "too long, 20x6x5 needs 616 bytes, found 618"),
    "header cut": ("images", lambda b: b[:9], "truncated, needs a header of 16 bytes, found 9"),
    "empty": ("images", lambda b: b"", "truncated, needs a header of 16 bytes, found 0"),
    "magic": (
        "images",
        lambda b: b"\x00\x00\x08\x01" + b[4:],
        "needs magic number 0x00000803, found 0x00000801",
    ),
    "label": ("labels", lambda b: b[:-2] + b"\x0a\xff", "labels must lie in 0..9, found 10 at sample 18"),
    "counts": (
        "labels",
        lambda b: idx(np.zeros(19, np.uint8)),
        "needs one label for each of 20 images, found 19",
    ),
    "none": ("images", lambda b: idx(np.zeros((0, 6, 5), np.uint8)), "needs one label for each of 0 images"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_with_the_file_by_opening_and_by_checking(tmp_path: Path, damage: str, zipped: bool) -> None:
    write_pair(tmp_path, "train", zipped=zipped)
    write_pair(tmp_path, "t10k", zipped=zipped)
    kind, alter, message = DAMAGES[damage]
    path = next(tmp_path.glob(f"train-{kind}*"))
    change(path, alter)
    told = path if damage != "none" else next(tmp_path.glob("train-labels*"))
    for act in (open_dataset, check_dataset):
        with pytest.raises(DataError) as caught:
            act(f"mnist:{tmp_path}")
        assert str(told) in str(caught.value)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_no_images_at_all(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((0, 6, 5), np.uint8)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(0, np.uint8)))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: no images, its dimensions are 0x6x5"):
        open_dataset(f"mnist:{tmp_path}")


def test_missing_folder_and_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        open_dataset(f"mnist:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match=r"looked for train-images-idx3-ubyte, t10k-images-idx3-ubyte"):
        open_dataset(f"mnist:{tmp_path}")
    write_pair(tmp_path, "train")
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"has no labels; looked for train-labels-idx1-ubyte, .*\.gz"):
        open_dataset(f"mnist:{tmp_path}")


def test_gzip_that_is_not_and_gzip_that_breaks_off(tmp_path: Path) -> None:
    write_pair(tmp_path, "train", zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"images-idx3-ubyte\.gz: truncated, .*needs (616|a header)"):
        open_dataset(f"mnist:{tmp_path}")
    path.write_bytes(whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:])  # a bit of the checksum
    with pytest.raises(DataError, match=r"damaged gzip stream"):
        open_dataset(f"mnist:{tmp_path}")
    path.write_bytes(b"<html>not here</html>")
    with pytest.raises(DataError, match=r"not gzip, needs to begin with 0x1f8b, found 0x3c68"):
        open_dataset(f"mnist:{tmp_path}")


def test_gzip_is_recognised_by_content(tmp_path: Path) -> None:
    write_pair(tmp_path, "train", zipped=True)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_suffix(""))
    assert len(open_dataset(f"mnist:{tmp_path}").train) == 16


def test_pairs_of_different_sizes_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, "train")
    write_pair(tmp_path, "t10k")
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((20, 7, 5), np.uint8)))
    with pytest.raises(DataError, match=r"must have one size, found 6x5 and 7x5"):
        open_dataset(f"mnist:{tmp_path}")


def test_one_sample_cannot_be_cut_in_two(tmp_path: Path) -> None:
    write_pair(tmp_path, "train", n=1)
    for act in (open_dataset, check_dataset):
        with pytest.raises(DataError, match=r"at least 2 samples to hold some out for testing, found 1"):
            act(f"mnist:{tmp_path}")


@needs_mnist
def test_real_mnist_is_cut_into_8000_and_2000() -> None:
    check_dataset(f"mnist:{REAL}")
    dataset = open_dataset(f"mnist:{REAL}")
    assert (len(dataset.train), len(dataset.test)) == (8000, 2000)
    assert dataset.image_shape == (1, 28, 28)
    # The t10k labels: 980 zeros, 1135 ones, ...
    counts = np.bincount(np.concatenate([dataset.train.labels, dataset.test.labels]))
    assert counts.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    # A share of 0.2 of 892 or more has a deviation below 14 of a mean of 178 or more; five of them.
    assert np.abs(np.bincount(dataset.test.labels) - 0.2 * counts).max() < 70
    # The usual mean of MNIST is 0.1307 and its deviation 0.3081.
    assert dataset.mean[0] == pytest.approx(0.1307, abs=0.005)
    assert dataset.std[0] == pytest.approx(0.3081, abs=0.005)
