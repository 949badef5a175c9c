import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from windlass.data import DEFAULT_SOURCE, SOURCES, check_dataset, digits, open_dataset, parse_spec
from windlass.data.dataset import channel_statistics, holdout_ids
from windlass.errors import ConfigError, DataError


def test_importing_takes_no_torch_and_no_sklearn() -> None:
    code = (
        "import sys, windlass.data as d; d.open_dataset('digits'); d.check_dataset('synthetic');"
        "sys.exit(', '.join({'torch', 'sklearn', 'PIL', 'scipy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_specs_are_split_at_the_first_colon() -> None:
    assert parse_spec("digits") == ("digits", "")
    assert parse_spec("folder:/a:b/c") == ("folder", "/a:b/c")
    assert parse_spec("synthetic:3x8x8:5:100") == ("synthetic", "3x8x8:5:100")
    assert DEFAULT_SOURCE in SOURCES


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_says_whether_it_wants_a_path(name: str, tmp_path: Path) -> None:
    entry = SOURCES[name]
    if entry.needs_path:
        for spec in (name, f"{name}:"):
            with pytest.raises(ConfigError, match=rf"--data {name}:PATH"):
                check_dataset(spec)
        with pytest.raises(DataError, match="nowhere: no such folder"):
            check_dataset(f"{name}:{tmp_path / 'nowhere'}")
    elif not entry.argument:
        with pytest.raises(ConfigError, match=rf"{name} takes no argument, got '{name}:x'"):
            open_dataset(f"{name}:x")
    else:
        check_dataset(name)
    assert entry.description


def test_unknown_sources_are_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown data source 'minst'; did you mean 'mnist'"):
        open_dataset("minst:somewhere")


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_shares_outside_0_and_1_are_refused(holdout: float) -> None:
    for act in (open_dataset, check_dataset):
        with pytest.raises(ConfigError, match="held-out share must lie between 0 and 1"):
            act("digits", holdout=holdout)


def test_digits() -> None:
    dataset = open_dataset("digits")
    assert (len(dataset.train), len(dataset.test)) == (1438, 359)
    assert dataset.image_shape == (1, 8, 8)
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    pixels = dataset.train.images.gather(np.arange(1438))
    assert set(np.unique(pixels).tolist()) == {round(level * 255 / 16) for level in range(17)}
    again = open_dataset("digits")
    assert np.array_equal(again.test.images.gather(np.arange(359)), dataset.test.images.gather(np.arange(359)))


def test_digits_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = open_dataset("digits")
    monkeypatch.setattr(digits, "digits_path", lambda: tmp_path / "absent.csv.gz")
    theirs = open_dataset("digits")
    for split, other in ((ours.train, theirs.train), (ours.test, theirs.test)):
        ids = np.arange(len(split))
        assert np.array_equal(split.images.gather(ids), other.images.gather(ids))
        assert np.array_equal(split.labels, other.labels)


def test_a_damaged_table_of_digits_is_told(tmp_path: Path) -> None:
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"digits\.csv\.gz: not a readable table of digits"):
        digits.read_rows(path)


@pytest.mark.parametrize(
    ("num_samples", "holdout", "num_test"),
    [(10_000, 0.2, 2000), (60_000, 0.1, 6000), (2, 0.001, 1), (2, 0.999, 1), (7, 0.5, 4), (1797, 0.2, 359)],
)
def test_held_out_samples_are_a_partition(num_samples: int, holdout: float, num_test: int) -> None:
    train, test = holdout_ids(num_samples, holdout, place="here")
    assert len(test) == num_test
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(num_samples))


def test_held_out_samples_do_not_change_between_versions() -> None:
    """Runs of other days are compared on these samples: a change here makes old results incomparable."""
    assert holdout_ids(100, 0.05, place="here")[1].tolist() == HELD_OUT_OF_100


HELD_OUT_OF_100 = [3, 14, 25, 66, 91]


def test_statistics_are_those_of_numpy_and_a_flat_channel_gets_1() -> None:
    x_NCHW = np.random.default_rng(0).integers(0, 256, (2500, 2, 3, 4), dtype=np.uint8)
    x_NCHW[:, 1] = 51
    mean, std = channel_statistics(x_NCHW)
    # Float64 sums over 30,000 numbers below 1: the error stays far below 1e-10.
    assert mean == pytest.approx([x_NCHW[:, 0].mean() / 255, 0.2], abs=1e-10)
    assert std == pytest.approx([x_NCHW[:, 0].std() / 255, 1.0], abs=1e-10)


def test_synthetic_shapes() -> None:
    dataset = open_dataset("synthetic:2x12x7:5:100", holdout=0.3)
    assert dataset.image_shape == (2, 12, 7)
    assert dataset.num_classes == len(dataset.class_names) == 5
    assert (len(dataset.train), len(dataset.test)) == (70, 30)
    assert set(dataset.train.labels.tolist()) == set(range(5))
    assert open_dataset("synthetic").image_shape == (3, 32, 32)
    assert len(open_dataset("synthetic:1x8x8").train) == 1638
    assert open_dataset("synthetic:1x8x8:3").num_classes == 3


@pytest.mark.parametrize(
    "argument",
    ["3x32", "3x32x32:ten", "3x32x32:10:2048:1", "axbxc", "0x8x8", "1x8x8:0", "1x8x8:2:1", "-1x8x8"],
)
def test_bad_synthetic_shapes_are_refused(argument: str) -> None:
    for act in (open_dataset, check_dataset):
        with pytest.raises(ConfigError, match="synthetic"):
            act(f"synthetic:{argument}")


def test_synthetic_images_are_deterministic_and_differ() -> None:
    one, other = open_dataset("synthetic:1x16x16:4:64"), open_dataset("synthetic:1x16x16:4:64")
    ids = np.arange(len(one.train))
    images = one.train.images.gather(ids)
    assert np.array_equal(images, other.train.images.gather(ids))
    assert np.array_equal(images[[5, 3]], one.train.images.gather(np.array([5, 3])))
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_synthetic_images_can_be_learned_and_are_not_trivial() -> None:
    dataset = open_dataset("synthetic:1x16x16:10:1000")
    train = dataset.train.images.gather(np.arange(len(dataset.train))).astype(float)
    test = dataset.test.images.gather(np.arange(len(dataset.test))).astype(float)
    centres = np.array([train[dataset.train.labels == k].mean(axis=0) for k in range(10)])
    distances = ((test[:, None] - centres[None]) ** 2).sum(axis=(2, 3, 4))
    assert (distances.argmin(axis=1) == dataset.test.labels).mean() > 0.95
    assert train[dataset.train.labels == 0].std(axis=0).min() > 10
