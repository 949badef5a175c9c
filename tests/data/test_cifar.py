from pathlib import Path

import numpy as np
import pytest

from windlass.data import check_dataset, open_dataset
from windlass.data.cifar import RECORD_BYTES, SUBFOLDER, TEST_NAME, TRAIN_NAMES
from windlass.errors import DataError


def write_batches(folder: Path, *, n: int = 4) -> None:
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate((*TRAIN_NAMES, TEST_NAME)):
        records = np.random.default_rng(seed).integers(0, 256, (n, RECORD_BYTES), dtype=np.uint8)
        records[:, 0] = (np.arange(n) + seed) % 10
        (folder / name).write_bytes(records.tobytes())


@pytest.mark.parametrize("subfolder", ["", SUBFOLDER])
def test_batches_are_joined_in_order(tmp_path: Path, subfolder: str) -> None:
    write_batches(tmp_path / subfolder)
    check_dataset(f"cifar10:{tmp_path}")
    dataset = open_dataset(f"cifar10:{tmp_path}")
    assert (len(dataset.train), len(dataset.test)) == (20, 4)
    assert dataset.image_shape == (3, 32, 32)
    assert dataset.train.labels.tolist() == [(i + seed) % 10 for seed in range(5) for i in range(4)]
    second = np.frombuffer((tmp_path / subfolder / TRAIN_NAMES[1]).read_bytes(), dtype=np.uint8)
    image = dataset.train.images.gather(np.array([4]))[0]
    for channel in range(3):  # the red plane first, row by row
        plane = second[1 + 1024 * channel : 1 + 1024 * (channel + 1)]
        assert np.array_equal(image[channel].ravel(), plane)
    pixels = dataset.train.images.gather(np.arange(20)) / 255
    # Float64 sums over 20,480 numbers below 1: the error stays far below 1e-10.
    assert dataset.mean == pytest.approx(pixels.mean(axis=(0, 2, 3)), abs=1e-10)
    assert dataset.std == pytest.approx(pixels.std(axis=(0, 2, 3)), abs=1e-10)


def test_sizes_and_absences_are_told(tmp_path: Path) -> None:
    write_batches(tmp_path)
    path = tmp_path / TRAIN_NAMES[2]
    for content in (path.read_bytes()[:-1], b""):
        path.write_bytes(content)
        for act in (open_dataset, check_dataset):
            with pytest.raises(DataError, match=rf"{path.name}: .*3073 bytes, found {len(content)} bytes"):
                act(f"cifar10:{tmp_path}")
    path.unlink()
    (tmp_path / TEST_NAME).unlink()
    with pytest.raises(DataError, match=rf"lacks {path.name}, {TEST_NAME} \(nor is there .*{SUBFOLDER}\)"):
        check_dataset(f"cifar10:{tmp_path}")
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        check_dataset(f"cifar10:{tmp_path / 'nowhere'}")


def test_a_label_outside_the_classes_is_told(tmp_path: Path) -> None:
    write_batches(tmp_path)
    path = tmp_path / TEST_NAME
    content = bytearray(path.read_bytes())
    content[2 * RECORD_BYTES] = 10
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"test_batch\.bin: labels must lie in 0..9, found 10 at sample 2"):
        open_dataset(f"cifar10:{tmp_path}")
