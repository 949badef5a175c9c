from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from windlass.data import Dataset, open_dataset, serving
from windlass.data.augment import Augment, parse_augment
from windlass.data.dataset import ArrayImages, Split
from windlass.data.serving import Batch, BatchServer, fit_images
from windlass.errors import ConfigError

AUGMENTS = ("none", "shift:2", "flip", "crop", "crop:0.5,shift:1,flip", "pad-crop:2,flip")


@pytest.fixture(scope="module")
def small() -> Dataset:
    return open_dataset("synthetic:3x10x10:5:130", holdout=0.2)


def serve(
    dataset: Dataset,
    *,
    batch: int = 16,
    image_size: int = 10,
    augment: Augment | str = "none",
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
) -> BatchServer:
    return BatchServer(
        dataset.train,
        dataset=dataset,
        batch=batch,
        image_size=image_size,
        augment=augment,
        seed=seed,
        rank=rank,
        world_size=world_size,
        shuffle=shuffle,
    )


def assert_equal(one: Batch, other: Batch) -> None:
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)
    assert np.array_equal(one.ids, other.ids)
    assert one.global_count == other.global_count


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_joined_are_a_single_rank(small: Dataset, augment: str, world_size: int) -> None:
    alone = serve(small, augment=augment)
    ranks = [serve(small, augment=augment, rank=r, world_size=world_size) for r in range(world_size)]
    for step in range(alone.num_steps):
        whole = alone.fetch(2, step)
        parts = [server.fetch(2, step) for server in ranks]
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert np.array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
        assert {part.global_count for part in parts} == {whole.global_count} == {len(whole.ids)}


@pytest.mark.parametrize("batch", [1, 3, 16, 104, 105, 1000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_is_served_once_an_epoch(small: Dataset, batch: int, shuffle: bool) -> None:
    assert len(small.train) == 104
    servers = [serve(small, batch=batch, rank=r, world_size=3, shuffle=shuffle) for r in range(3)]
    served = np.zeros(104, dtype=int)
    for step in range(servers[0].num_steps):
        batches = [server.fetch(1, step) for server in servers]
        assert sum(len(one.ids) for one in batches) == batches[0].global_count
        for one in batches:
            np.add.at(served, one.ids, 1)
            assert np.array_equal(one.labels.numpy(), small.train.labels[one.ids])
    assert servers[0].num_steps == -(-104 // batch)
    assert (served == 1).all()


def test_a_rank_without_samples_gets_the_right_shapes(small: Dataset) -> None:
    for augment in AUGMENTS:
        # 104 = 20 * 5 + 4: the last step has 4 samples for 6 ranks.
        servers = [serve(small, batch=20, augment=augment, rank=r, world_size=6) for r in range(6)]
        last = [server.fetch(0, 5) for server in servers]
        assert sorted(len(one.ids) for one in last) == [0, 0, 1, 1, 1, 1]
        for one in last:
            assert one.images.shape == (len(one.ids), 3, 10, 10)
            assert one.images.dtype == torch.float32
            assert one.labels.shape == (len(one.ids),)
            assert one.labels.dtype == torch.int64
            assert one.global_count == 4


def test_seeds_and_epochs_give_other_orders_and_other_pictures(small: Dataset) -> None:
    one = serve(small, augment="shift:2", batch=104)
    assert not np.array_equal(one.fetch(0, 0).ids, one.fetch(1, 0).ids)
    assert not np.array_equal(one.fetch(0, 0).ids, serve(small, batch=104, seed=1).fetch(0, 0).ids)
    fixed = serve(small, augment="shift:2", batch=104, shuffle=False)
    assert np.array_equal(fixed.fetch(0, 0).ids, np.arange(104))
    assert not torch.equal(fixed.fetch(0, 0).images, fixed.fetch(1, 0).images)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_a_picture_does_not_depend_on_its_batch(small: Dataset, augment: str) -> None:
    large, little = serve(small, augment=augment, batch=104), serve(small, augment=augment, batch=7)
    pictures = dict(zip(large.fetch(3, 0).ids.tolist(), large.fetch(3, 0).images, strict=True))
    for step in range(little.num_steps):
        batch = little.fetch(3, step)
        for number, image in zip(batch.ids.tolist(), batch.images, strict=True):
            assert torch.equal(image, pictures[number])


def test_resuming_at_any_step_equals_the_straight_run(small: Dataset) -> None:
    straight = serve(small, augment="shift:1,flip")
    steps = [(epoch, step) for epoch in range(3) for step in range(straight.num_steps)]
    run = [straight.fetch(*at) for at in steps]
    for k in range(0, len(steps), 5):
        resumed = serve(small, augment="shift:1,flip")
        for at, expected in zip(steps[k : k + 3], run[k : k + 3], strict=True):
            assert_equal(resumed.fetch(*at), expected)


def test_threads_get_what_one_caller_gets(small: Dataset) -> None:
    server, alone = serve(small, augment="crop,flip"), serve(small, augment="crop,flip")
    steps = [(epoch, step) for epoch in range(8) for step in range(server.num_steps)]
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda at: server.fetch(*at), steps))
    for at, batch in zip(steps, batches, strict=True):
        assert_equal(batch, alone.fetch(*at))


def test_images_are_normalised(small: Dataset) -> None:
    batch = serve(small, shuffle=False, batch=104).fetch(0, 0)
    pixels = small.train.images.gather(np.arange(104)).astype(np.float64)
    mean, std = (np.array(v)[:, None, None] for v in (small.mean, small.std))
    # Values below 5 in magnitude after one product and one sum in float32: 3 roundings of 2**-24 relative.
    assert np.abs(batch.images.numpy() - (pixels / 255 - mean) / std).max() < 5 * 4 * 2.0**-24


def test_memory_can_be_given(small: Dataset) -> None:
    server = serve(small)
    out = torch.full((16, 3, 10, 10), float("nan"))
    batch = server.fetch(0, 1, out=out)
    assert batch.images.data_ptr() == out.data_ptr()
    assert_equal(batch, server.fetch(0, 1))
    last = server.fetch(0, server.num_steps - 1, out=out)
    assert_equal(last, server.fetch(0, server.num_steps - 1))


def test_batches_do_not_share_memory(small: Dataset) -> None:
    server = serve(small)
    first = server.fetch(0, 0)
    kept = first.images.clone()
    first.images.add_(1.0)
    server.fetch(0, 1)
    assert torch.equal(server.fetch(0, 0).images, kept)


def test_large_splits_are_fitted_batch_by_batch(small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for image_size in (10, 12, 20, 6):
        kept = serve(small, image_size=image_size, augment="flip").fetch(0, 0)
        with monkeypatch.context() as patch:
            patch.setattr(serving, "MAX_KEPT_BYTES", 0)
            assert_equal(serve(small, image_size=image_size, augment="flip").fetch(0, 0), kept)


def test_slightly_smaller_images_are_framed_with_zeros() -> None:
    x_NCHW = np.random.default_rng(0).integers(1, 256, (4, 1, 28, 28), dtype=np.uint8)
    framed = fit_images(x_NCHW, 32)
    assert np.array_equal(framed[:, :, 2:30, 2:30], x_NCHW)
    assert framed.astype(np.int64).sum() == x_NCHW.astype(np.int64).sum()
    assert fit_images(x_NCHW, 28) is x_NCHW
    assert fit_images(x_NCHW[:, :, :24, :24], 32)[0, 0, 4, 4] == x_NCHW[0, 0, 0, 0]


@pytest.mark.parametrize(
    ("shape", "size"), [((8, 8), 32), ((23, 23), 32), ((33, 33), 32), ((64, 64), 32), ((24, 40), 32)]
)
def test_other_images_are_scaled_as_pillow_scales(shape: tuple[int, int], size: int) -> None:
    x_NCHW = np.random.default_rng(0).integers(0, 256, (3, 1, *shape), dtype=np.uint8)
    scaled = fit_images(x_NCHW, size)
    for x_CHW, y_CHW in zip(x_NCHW, scaled, strict=True):
        expected = Image.fromarray(x_CHW[0]).resize((size, size), Image.Resampling.BILINEAR)
        # Both round to 8 bits after each of two passes: a grey level or two.
        assert np.abs(y_CHW[0].astype(int) - np.asarray(expected)).max() <= 2


def test_what_comes_in_from_outside_is_black(small: Dataset) -> None:
    white = Split(ArrayImages(np.full((64, 3, 10, 10), 255, np.uint8)), np.zeros(64, np.int64))
    server = BatchServer(white, dataset=small, batch=64, image_size=10, augment="shift:3")
    images = server.fetch(0, 0).images
    black = -torch.tensor(small.mean) / torch.tensor(small.std)
    torch.testing.assert_close(images.amin(dim=(0, 2, 3)), black)


def test_a_whole_crop_of_a_square_changes_little() -> None:
    """Of a square, a box of share 1 fits only when its sides round to the square's; the rest fall back."""
    x_NCHW = np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), dtype=np.uint8)
    data = open_dataset("synthetic:3x16x16:2:10")
    split = Split(ArrayImages(x_NCHW), np.zeros(8, np.int64))
    crop, plain = (
        BatchServer(split, dataset=data, batch=8, image_size=16, augment=augment, shuffle=False)
        for augment in ("crop:1", "none")
    )
    assert torch.equal(crop.fetch(0, 0).images, plain.fetch(0, 0).images)


def test_an_augment_may_come_parsed(small: Dataset) -> None:
    parsed = serve(small, augment=parse_augment("shift:2,flip"))
    assert_equal(parsed.fetch(0, 0), serve(small, augment="shift:2,flip").fetch(0, 0))


def test_folder_images_are_served_alike_for_any_world(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(20):
        path = tmp_path / "ab"[i % 2] / f"{i:02}.{'png' if i % 3 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 45 - i, 3), dtype=np.uint8)).save(path)
    data = open_dataset(f"folder:{tmp_path}")
    for augment in ("none", "crop,flip"):
        alone = serve(data, batch=6, image_size=16, augment=augment)
        ranks = [serve(data, batch=6, image_size=16, augment=augment, rank=r, world_size=4) for r in range(4)]
        for step in range(alone.num_steps):
            parts = torch.cat([server.fetch(1, step).images for server in ranks])
            assert torch.equal(parts, alone.fetch(1, step).images)
            assert parts.shape[1:] == (3, 16, 16)


@pytest.mark.parametrize("step", [-1, 7, 100])
def test_steps_outside_the_epoch_are_refused(small: Dataset, step: int) -> None:
    with pytest.raises(IndexError, match=rf"step {step} of an epoch of 7 steps"):
        serve(small).fetch(0, step)


def test_numbers_that_do_not_fit_are_refused(small: Dataset) -> None:
    with pytest.raises(ConfigError, match="at least 1 sample, got 0"):
        serve(small, batch=0)
    with pytest.raises(ConfigError, match="at least 1 pixel, got 0"):
        serve(small, image_size=0)
    with pytest.raises(ConfigError, match=r"world of 2 are 0..1, got 2"):
        serve(small, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="shift of 10 pixels needs images larger than that, got 10"):
        serve(small, augment="shift:10")
