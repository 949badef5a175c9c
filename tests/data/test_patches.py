import numpy as np
import pytest
from numpy.typing import NDArray

from windlass.data import Dataset, check_dataset, open_dataset
from windlass.data.patches import CONTRAST, cut, dead_leaves, enlarged, parse_patches, whitened
from windlass.data.serving import BatchServer
from windlass.errors import ConfigError


def all_of(dataset: Dataset) -> NDArray[np.uint8]:
    return dataset.train.images.gather(np.arange(len(dataset.train)))


def test_made_up_patches() -> None:
    dataset = open_dataset("patches")
    assert (dataset.name, len(dataset.train), len(dataset.test)) == ("patches", 1638, 410)
    assert (dataset.num_classes, dataset.class_names, dataset.image_shape) == (1, ("patch",), (1, 16, 16))
    assert not dataset.train.labels.any() and not dataset.test.labels.any()
    x = all_of(dataset)
    assert x.shape == (1638, 1, 16, 16) and x.dtype == np.uint8
    assert len(np.unique(x.reshape(len(x), -1), axis=0)) > 1500, "patches are of places of their own; few meet again"
    assert np.array_equal(x, all_of(open_dataset("patches"))), "and always the same"


def test_patches_are_whitened_one_by_one() -> None:
    x = all_of(open_dataset("patches:16x16:300")).astype(float)
    means, deviations = x.mean((1, 2, 3)), x.std((1, 2, 3))
    assert np.abs(np.median(means) - 128) < 1
    assert CONTRAST * 0.8 < np.median(deviations) < CONTRAST * 1.05


def test_whitening_takes_brightness_and_contrast_off() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 100, (5, 1, 12, 12), dtype=np.uint8)
    plain, changed = whitened(x).astype(int), whitened(2 * x + 30).astype(int)
    # Variances of 833 and 3333 grey levels, each plus 100: the deviations differ by 4 %, and rounding adds 1.
    assert np.abs(plain - changed).max() <= 0.05 * 128 + 1
    assert (whitened(np.full((1, 1, 4, 4), 77, dtype=np.uint8)) == 128).all(), "an empty patch stays empty"


def test_patches_of_another_sources_images() -> None:
    dataset = open_dataset("patches:digits:16x16")
    assert (len(dataset.train), len(dataset.test), dataset.image_shape) == (1438, 359, (1, 16, 16))
    digits = open_dataset("digits").train.images.gather(np.arange(3))
    expected = whitened(digits.repeat(2, axis=2).repeat(2, axis=3))
    assert np.array_equal(dataset.train.images.gather(np.arange(3)), expected)
    colour = open_dataset("patches:synthetic:3x32x32:10:50:8x12:500")
    assert (len(colour.train), len(colour.test), colour.image_shape) == (400, 100, (3, 8, 12))


def test_patches_to_test_by_are_of_other_images() -> None:
    source, patches = open_dataset("synthetic:1x8x8:2:40"), open_dataset("patches:synthetic:1x8x8:2:40:8x8")
    test = patches.test.images.gather(np.arange(len(patches.test)))
    assert np.array_equal(test, whitened(source.test.images.gather(np.arange(len(source.test)))))


def test_cutting() -> None:
    numbers = np.arange(200)
    x = np.broadcast_to(np.arange(30, dtype=np.uint8).reshape(1, 1, 5, 6), (200, 1, 5, 6))
    patches = cut(x, numbers, (4, 3))
    tops = patches[:, 0, 0, 0]
    assert set(tops.tolist()) == {0, 1, 2, 3, 6, 7, 8, 9}, "every place is met"
    offsets = np.arange(4)[:, None] * 6 + np.arange(3)
    assert np.array_equal(patches[:, 0], tops[:, None, None] + offsets)


def test_small_images_are_enlarged_by_whole_factors() -> None:
    x = np.arange(6, dtype=np.uint8).reshape(1, 1, 2, 3)
    assert enlarged(x, (2, 3)) is x
    assert enlarged(x, (3, 3)).shape == (1, 1, 4, 6)
    assert enlarged(x, (3, 3))[0, 0, :2, :2].tolist() == [[0, 0], [0, 0]]


def test_dead_leaves_look_natural() -> None:
    """Their amplitude spectrum falls about as 1/f: a straight line on logarithmic axes with a slope near -1."""
    pictures = dead_leaves(8, 128)[:, 0].astype(float)
    spectrum = np.abs(np.fft.fft2(pictures - pictures.mean((1, 2), keepdims=True))).mean(0)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    bands = [(0.03 * 2**k, 0.03 * 2 ** (k + 1)) for k in range(4)]
    means = [spectrum[(f >= low) & (f < high)].mean() for low, high in bands]
    slope = np.polyfit(np.log([low for low, _ in bands]), np.log(means), 1)[0]
    assert -1.8 < slope < -0.8


def test_patches_are_served() -> None:
    dataset = open_dataset("patches:digits:8x8")
    server = BatchServer(dataset.train, dataset=dataset, batch=256, image_size=8)
    batch = server.fetch(0, 0)
    assert batch.images.shape == (256, 1, 8, 8)
    assert abs(float(batch.images.mean())) < 0.05 and abs(float(batch.images.std()) - 1) < 0.1
    assert not batch.labels.any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("patches:big", "patches are asked for as patches:16x16.* got patches:big"),
        ("patches:1x16", "at least 2x2 pixels, got 1x16"),
        ("patches:16x16:1", "count of at least 2 is needed"),
        ("patches:digist:16x16", "unknown data source 'digist'; did you mean 'digits'"),
        ("patches:mnist:16x16", "mnist needs the place of its files"),
    ],
)
def test_what_cannot_be_is_refused_at_once(spec: str, message: str) -> None:
    for act in (open_dataset, check_dataset):
        with pytest.raises(ConfigError, match=message):
            act(spec)


def test_arguments() -> None:
    assert parse_patches("").count == 2048
    assert parse_patches("8x4").size == (8, 4)
    spec = parse_patches("folder:/data/of 16x16/here:20x20")
    assert (spec.source, spec.size, spec.count) == ("folder:/data/of 16x16/here", (20, 20), 0)
