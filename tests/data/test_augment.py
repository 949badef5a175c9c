import numpy as np
import pytest
from numpy.typing import NDArray

from windlass.data.augment import AUGMENTATIONS, Augment, Crop, Flip, Shift, cut_windows, draw, parse_augment
from windlass.errors import ConfigError


def pictures(n: int, *, c: int = 3, h: int = 7, w: int = 9) -> NDArray[np.uint8]:
    return np.random.default_rng(n).integers(1, 256, (n, c, h, w), dtype=np.uint8)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_is_made_without_a_parameter(name: str) -> None:
    augment = parse_augment(name)
    assert augment != Augment()
    assert augment == parse_augment([name])


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "crop"])
@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (1, 1, 5, 11), (0, 3, 8, 8), (33, 1, 9, 6)])
def test_steps_depend_on_seed_epoch_and_sample_alone(name: str, shape: tuple[int, int, int, int]) -> None:
    n, c, h, w = shape
    x, ids = pictures(n, c=c, h=h, w=w), np.arange(n) * 1000 + 7
    before = x.copy()
    augment = parse_augment(name)
    whole = augment.apply(x, ids, seed=1, epoch=2)
    assert whole.shape == x.shape
    assert whole.dtype == np.uint8
    assert np.array_equal(x, before)
    for i in range(n):
        alone = augment.apply(x[i : i + 1], ids[i : i + 1], seed=1, epoch=2)
        assert np.array_equal(alone[0], whole[i])


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "crop"])
def test_steps_change_with_seed_and_epoch(name: str) -> None:
    x, ids, augment = pictures(64), np.arange(64), parse_augment(name)
    results = [augment.apply(x, ids, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert not np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def naive_shift(x_CHW: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
    out = np.zeros_like(x_CHW)
    _, h, w = x_CHW.shape
    for row in range(h):
        for column in range(w):
            if 0 <= row - down < h and 0 <= column - right < w:
                out[:, row, column] = x_CHW[:, row - down, column - right]
    return out


def test_shift_moves_every_image_by_a_permitted_offset_and_uses_all_of_them() -> None:
    x, pixels = pictures(300, c=2, h=6, w=5), 2
    shifted = Shift(pixels).apply(x, np.arange(300), seed=4, epoch=0, stream=1)
    seen = set()
    offsets = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    for before, after in zip(x, shifted, strict=True):
        fitting = [at for at in offsets if np.array_equal(naive_shift(before, *at), after)]
        assert len(fitting) == 1  # pixels are never 0, so each offset leaves another frame
        seen.add(fitting[0])
    assert seen == set(offsets)  # of 300 draws, one of 25 offsets stays away with odds 25 * (24/25)**300 = 1e-4


def test_flip_mirrors_about_half() -> None:
    x = pictures(400)
    flipped = Flip().apply(x, np.arange(400), seed=4, epoch=0, stream=1)
    same = np.array([np.array_equal(a, b) for a, b in zip(x, flipped, strict=True)])
    assert np.array_equal(flipped[~same], x[~same][..., ::-1])
    assert 150 < same.sum() < 250  # mean 200, deviation 10


def test_cut_windows_is_slicing() -> None:
    x = pictures(11, c=3, h=12, w=10)
    rng = np.random.default_rng(0)
    for height, width in ((12, 10), (5, 7), (1, 1), (12, 3)):
        tops, lefts = rng.integers(0, 13 - height, 11), rng.integers(0, 11 - width, 11)
        tops[-1], lefts[-1] = 12 - height, 10 - width  # the very last window of the array
        cut = cut_windows(x, tops, lefts, height=height, width=width)
        for i in range(11):
            window = x[i, :, tops[i] : tops[i] + height, lefts[i] : lefts[i] + width]
            assert np.array_equal(cut[i], window)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (224, 224), (3, 1000), (1, 1)])
def test_crop_boxes_lie_inside_and_keep_their_promises(height: int, width: int) -> None:
    crop = Crop(0.3)
    draws = crop.draw(np.arange(500), seed=1, epoch=0, stream=0)
    boxes = np.array([crop.box(one, height, width) for one in draws])
    top, left, h, w = boxes.T
    assert min(top.min(), left.min()) >= 0
    assert min(h.min(), w.min()) >= 1
    assert (top + h).max() <= height
    assert (left + w).max() <= width
    if min(height, width) > 100:
        # Sides are rounded to whole pixels, so a share is off by half a pixel in each of two sides.
        assert (h * w / (height * width)).min() > 0.3 - 0.01
        assert (h * w / (height * width)).max() > 0.7
        assert (w / h).min() > 3 / 4 - 0.02
        assert (w / h).max() < 4 / 3 + 0.02
        assert len(np.unique(boxes, axis=0)) > 450


def test_crop_falls_back_to_a_centred_box_when_nothing_fits() -> None:
    crop = Crop(1.0)
    for one in crop.draw(np.arange(50), seed=1, epoch=0, stream=0):
        assert crop.box(one, 100, 1000) == (0, (1000 - 133) // 2, 100, 133)
        assert crop.box(one, 1000, 100) == ((1000 - 133) // 2, 0, 133, 100)


def test_draws_are_independent_between_neighbouring_samples() -> None:
    draws = draw(np.arange(10_000), 3, seed=0, epoch=0, stream=0)
    correlations = np.corrcoef(np.column_stack([draws[:-1], draws[1:]]).T) - np.eye(6)
    assert np.abs(correlations).max() < 5 / np.sqrt(10_000)


def test_parsing() -> None:
    assert parse_augment("shift:3, flip") == Augment(None, (Shift(3), Flip()))
    assert parse_augment(["flip", "shift"]) == Augment(None, (Flip(), Shift(2)))
    assert parse_augment("pad-crop,crop:0.5") == Augment(Crop(0.5), (Shift(4),))
    assert parse_augment("none") == parse_augment("") == parse_augment([]) == Augment()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shfit:2", r"unknown augmentation 'shfit'; did you mean 'shift'"),
        ("shift:two", r"shift is written shift:PIXELS, got 'shift:two'"),
        ("shift:", r"shift is written shift:PIXELS, got 'shift:'"),
        ("shift:0", r"at least 1 pixel, got 0"),
        ("pad-crop:-1", r"at least 1 pixel, got -1"),
        ("flip:0.5", r"flip is written flip, got 'flip:0.5'"),
        ("crop:1.5", r"\(0, 1\], got 1.5"),
        ("crop:0", r"\(0, 1\], got 0"),
        ("crop:nan", r"\(0, 1\], got nan"),
        ("flip,shift,flip", r"'flip' is given twice"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_augment(spec)
