import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from windlass.data import check_dataset, decode, open_dataset
from windlass.data.decode import centre_square, decode_file, resize_with_pillow
from windlass.data.folder import FolderImages, pack_names
from windlass.data.serving import BatchServer, resize_with_torch
from windlass.errors import DataError


def smooth(height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """A picture without edges, which JPEG keeps within a few grey levels."""
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    planes = [80 + 60 * rows + seed, 120 + 60 * columns, 60 + 40 * rows * columns]
    return np.stack(planes, axis=-1).astype(np.uint8)


def save(path: Path, *, height: int = 20, width: int = 30, mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(smooth(height, width, seed=seed)).convert(mode).save(path)
    return path


def make_classes(root: Path, *, per_class: int = 3, classes: tuple[str, ...] = ("cat", "ant", "bee")) -> None:
    for k, name in enumerate(classes):
        for i in range(per_class):
            suffix = (".png", ".jpg", ".BMP")[i % 3]
            save(root / name / f"{i}{suffix}", height=17 + i, width=31 - 5 * i, seed=10 * k + i)


def test_two_layouts_with_validation_images(tmp_path: Path) -> None:
    make_classes(tmp_path / "train")
    make_classes(tmp_path / "val", per_class=1, classes=("bee", "cat"))
    check_dataset(f"folder:{tmp_path}")
    dataset = open_dataset(f"folder:{tmp_path}")
    assert dataset.class_names == ("ant", "bee", "cat")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert dataset.test.labels.tolist() == [1, 2]
    assert dataset.varied_sizes
    assert dataset.image_shape == (3, 0, 0)
    assert dataset.train.images.gather(np.array([0, 8]), size=12).shape == (2, 3, 12, 12)
    (tmp_path / "val").rename(tmp_path / "test")
    assert open_dataset(f"folder:{tmp_path}").test.labels.tolist() == [1, 2]


@pytest.mark.parametrize("subfolder", ["", "train"])
def test_held_out_images_keep_their_labels(tmp_path: Path, subfolder: str) -> None:
    make_classes(tmp_path / subfolder, per_class=4)
    dataset = open_dataset(f"folder:{tmp_path}", holdout=0.25)
    assert (len(dataset.train), len(dataset.test)) == (9, 3)
    paths = []
    for split in (dataset.train, dataset.test):
        assert isinstance(split.images, FolderImages)
        for i, label in enumerate(split.labels):
            path = split.images.path(i)
            assert path.parent.name == dataset.class_names[label]
            paths.append(path)
    assert sorted(paths) == sorted(path for path in tmp_path.rglob("*.*") if path.is_file())


def test_other_files_and_hidden_folders_are_passed_over(tmp_path: Path) -> None:
    make_classes(tmp_path)
    (tmp_path / "README.txt").write_text("not a class")
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "ant" / ".hidden.png").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    dataset = open_dataset(f"folder:{tmp_path}")
    assert len(dataset.train) + len(dataset.test) == 9


def test_empty_places_are_told(tmp_path: Path) -> None:
    for act in (open_dataset, check_dataset):
        with pytest.raises(DataError, match=r"nowhere: no such folder"):
            act(f"folder:{tmp_path / 'nowhere'}")
        with pytest.raises(DataError, match=r": no images; needs one folder per class"):
            act(f"folder:{tmp_path}")
    make_classes(tmp_path)
    (tmp_path / "dog").mkdir()
    for act in (open_dataset, check_dataset):
        with pytest.raises(DataError, match=r"dog: no images in this class folder; looked for \*\.jpg"):
            act(f"folder:{tmp_path}")


def test_a_class_without_training_images_is_told(tmp_path: Path) -> None:
    make_classes(tmp_path / "train")
    make_classes(tmp_path / "val", classes=("ant", "elk"))
    for act in (open_dataset, check_dataset):
        with pytest.raises(DataError, match=r"val: classes without training images: elk"):
            act(f"folder:{tmp_path}")


FORMS = {
    "grey.png": "L",
    "grey.jpg": "L",
    "bits.png": "1",
    "palette.png": "P",
    "palette.gif": "P",
    "alpha.png": "RGBA",
    "grey-alpha.png": "LA",
    "cmyk.jpg": "CMYK",
    "colour.webp": "RGB",
    "colour.bmp": "RGB",
    "colour.tif": "RGB",
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_rgb(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, height=19, width=23, mode=FORMS[name])
    pixels = decode_file(path)
    assert pixels.shape == (19, 23, 3)
    assert pixels.dtype == np.uint8
    expected = smooth(19, 23).astype(int)
    if FORMS[name].startswith("L"):
        expected = (expected @ [299, 587, 114] // 1000)[..., None]  # ITU-R 601 luma
    if FORMS[name] not in ("1", "P"):
        # Lossy formats and chroma at half resolution: a few grey levels on a picture without edges.
        assert np.abs(pixels - expected).max() <= 12


def test_transparent_palette_and_16_bit_grey(tmp_path: Path) -> None:
    palette = Image.fromarray(smooth(8, 8)).convert("P")
    palette.save(tmp_path / "p.png", transparency=bytes(range(256)))
    assert decode_file(tmp_path / "p.png").shape == (8, 8, 3)
    deep = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(decode_file(tmp_path / "deep.png")[..., 1], deep >> 8)


def test_a_png_named_jpg_is_decoded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(smooth(9, 9)).save(buffer, format="png")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert np.array_equal(decode_file(tmp_path / "a.jpg"), smooth(9, 9))


def test_jpegs_decode_without_simplejpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.jpg", height=33, width=47)
    fast = decode_file(path)
    monkeypatch.setattr(decode, "_simplejpeg", lambda: None)
    # Two builds of one library; the decoders may round chroma differently by a level or two.
    assert np.abs(decode_file(path).astype(int) - fast).max() <= 2


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "empty.png", "page.jpg"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    make_classes(tmp_path)
    path = tmp_path / "ant" / name
    save(path, height=60, width=60)
    content = path.read_bytes()
    damaged = {"empty": b"", "page": b"<html>404</html>"}.get(path.stem, content[: len(content) * 6 // 10])
    path.write_bytes(damaged)
    dataset = open_dataset(f"folder:{tmp_path}", holdout=0.1)
    server = BatchServer(dataset.train, dataset=dataset, batch=20, image_size=8)
    test_server = BatchServer(dataset.test, dataset=dataset, batch=20, image_size=8)
    with pytest.raises(DataError, match=rf"ant/{name}: cannot be decoded as an image of {len(damaged)} bytes"):
        (server.fetch(0, 0), test_server.fetch(0, 0))


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    make_classes(tmp_path)
    dataset = open_dataset(f"folder:{tmp_path}")
    for path in tmp_path.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match=r"\.jpg: cannot be read"):
        dataset.train.images.gather(np.arange(len(dataset.train)), size=8)


def test_the_centre_square_is_what_scaling_and_cutting_gives() -> None:
    assert centre_square(20, 31) == (0, 5, 20, 20)
    x_HWC = np.zeros((20, 60, 3), dtype=np.uint8)
    x_HWC[:, 20:40] = 200
    for resize in (resize_with_pillow, resize_with_torch):
        assert np.array_equal(resize(x_HWC, centre_square(20, 60), 7), np.full((3, 7, 7), 200))


def test_images_need_a_size(tmp_path: Path) -> None:
    make_classes(tmp_path)
    with pytest.raises(ValueError, match="need a size"):
        open_dataset(f"folder:{tmp_path}").train.images.gather(np.arange(2))


@pytest.mark.parametrize("box", [(0, 0, 50, 70), (3, 11, 40, 31), (20, 30, 5, 9)])
@pytest.mark.parametrize("size", [8, 24, 100])
def test_torch_scales_as_pillow_does(box: tuple[int, int, int, int], size: int) -> None:
    x_HWC = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    difference = resize_with_torch(x_HWC, box, size).astype(int) - resize_with_pillow(x_HWC, box, size)
    # Both round to 8 bits after each of two passes, with weights of 8 to 16 bits: a grey level or two.
    assert np.abs(difference).max() <= 2


def test_crops_are_cut_at_full_resolution(tmp_path: Path) -> None:
    """The edge columns, which the centre square lacks, must turn up in crops."""
    x_HWC = np.zeros((40, 120, 3), dtype=np.uint8)
    x_HWC[:, :40], x_HWC[:, 80:] = (255, 0, 0), (0, 0, 255)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.fromarray(x_HWC).save(tmp_path / name / f"{i}.png")
    dataset = open_dataset(f"folder:{tmp_path}")
    plain = BatchServer(dataset.train, dataset=dataset, batch=40, image_size=10).fetch(0, 0).images
    cropped = BatchServer(dataset.train, dataset=dataset, batch=40, image_size=10, augment="crop:0.08")
    images = cropped.fetch(0, 0).images
    assert float(plain.amax()) < 0  # black is below the mean
    red, blue = images[:, 0].amax(dim=(1, 2)) > 1, images[:, 2].amax(dim=(1, 2)) > 1
    assert red.any()
    assert blue.any()


def test_names_are_packed_with_any_bytes() -> None:
    names = ["a/1.png", "", "ü/\udcff.jpg", "b/x.png"]
    packed = pack_names(names)
    assert [packed[i] for i in range(len(packed))] == names
