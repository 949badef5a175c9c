"""Image files to RGB pixels.

Files are told apart by their first bytes, not by name.  A JPEG goes to simplejpeg when that is installed:
in its strict mode it notices damage that others pass over.  Whatever it refuses, CMYK pictures, and all
other formats go to Pillow.  Rules: an EXIF orientation is not applied; transparency is dropped, not
blended; 16-bit grey keeps its upper 8 bits; CMYK, palette and grey pictures become RGB.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from windlass.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

JPEG_MAGIC = b"\xff\xd8\xff"
_CMYK_SPACES = ("CMYK", "YCCK")

Box: TypeAlias = tuple[int, int, int, int]
"""Top, left, height and width of a rectangle, in pixels."""

Resize: TypeAlias = Callable[[NDArray[np.uint8], Box, int], NDArray[np.uint8]]
"""(x_HWC, box, size) -> the box of x scaled to size × size, as C, H, W."""


def decode_file(path: Path) -> NDArray[np.uint8]:
    """Pixels of an image file: H, W, 3.

    Raises:
        DataError: missing, unreadable or undecodable; it names the file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    try:
        return decode(content)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on damaged bytes
        raise DataError(f"{path}: cannot be decoded as an image of {len(content)} bytes ({error})") from error


def decode(content: bytes) -> NDArray[np.uint8]:
    """Pixels of an encoded image: H, W, 3; raises whatever Pillow raises."""
    if content.startswith(JPEG_MAGIC):
        pixels = _decode_jpeg(content)
        if pixels is not None:
            return pixels
    return _decode_with_pillow(content)


@cache
def _simplejpeg() -> Any:
    """The optional module, or None."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _decode_jpeg(content: bytes) -> NDArray[np.uint8] | None:
    """Pixels by simplejpeg, or None where Pillow must decide."""
    simplejpeg = _simplejpeg()
    if simplejpeg is None:
        return None
    try:
        if simplejpeg.decode_jpeg_header(content)[2] in _CMYK_SPACES:
            return None  # the two convert CMYK differently, and pixels should not depend on what is installed
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, colorspace="RGB")
    except ValueError:
        return None
    return pixels


def _decode_with_pillow(content: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        image.load()
        return np.array(_to_rgb(image), dtype=np.uint8)


def _to_rgb(image: Image) -> Image:
    from PIL import Image as PillowImage

    if image.mode.startswith("I;16"):
        upper = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return PillowImage.fromarray(upper).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # palettes with transparency convert in two steps
    return image.convert("RGB")


def centre_square(height: int, width: int) -> Box:
    """The largest centred square: scaling it is scaling the shorter side and cutting off the rest."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def resize_with_pillow(x_HWC: NDArray[np.uint8], box: Box, size: int) -> NDArray[np.uint8]:
    """The box of an RGB image scaled to size × size: C, H, W; bilinear, widened when shrinking."""
    from PIL import Image

    top, left, height, width = box
    part = np.ascontiguousarray(x_HWC[top : top + height, left : left + width])
    scaled = Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(scaled).transpose(2, 0, 1)
