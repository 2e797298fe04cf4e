"""From a photograph's file to the square of RGB pixels that everything else sees.

The rule, in order: first frame; EXIF orientation applied; largest centred square (odd margins lose the extra pixel at
the right or bottom); 8-bit RGB (16-bit values v become round(v * 255 / 65535), transparency lies on black, colour
profiles are ignored); bilinear resize as Pillow does it, that is with antialiasing when shrinking. JPEG draft mode
would be faster for large photographs and is not used, because it changes pixels.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

RULE = 1
"""Number of the rule above; files made under another number are made again."""

MIN_SIDE = 32
"""Photographs with a shorter side are skipped: nothing of a retina is left at that size."""

MAX_PIXELS = 150_000_000
"""Larger pictures are taken for decompression bombs; fundus cameras stay below 50 million."""

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


class UnreadableError(Exception):
    """A file that is no usable photograph; the message is the reason, the same on every run."""


def decode(data: bytes) -> Image.Image:
    """An upright image of any Pillow mode, whole. Raises UnreadableError with the reason."""
    if not data:
        raise UnreadableError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and odd metadata; the limit is ours
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadableError(f"{width}x{height} pixels are more than {MAX_PIXELS:,}")
            image.load()
            transpose = _TRANSPOSE.get(_orientation(image))
            return image.transpose(transpose) if transpose is not None else image
    except (UnreadableError, KeyboardInterrupt):
        raise
    except UnidentifiedImageError:
        raise UnreadableError("not an image in a format that Pillow reads") from None
    except Image.DecompressionBombError:
        raise UnreadableError(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders raise anything (struct.error, IndexError, ...) on damaged bytes
        raise UnreadableError(f"damaged: {error or type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF around intact pixels: take them as they are
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode that has a defined meaning, else UnreadableError."""
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode == "I" or mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableError("32-bit integer pixels beyond 0 to 65535")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if mode in ("F", "LAB", "HSV"):
        raise UnreadableError(f"pixels of mode {mode} have no defined scale or profile")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("RGB")
    return image.convert("RGB")


def square_rgb(data: bytes, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """The file's bytes -> (RGB image of ``size`` x ``size``, upright (width, height) of the source).

    Raises UnreadableError with the reason.
    """
    image = decode(data)
    width, height = image.size
    side = min(width, height)
    if side < MIN_SIDE:
        raise UnreadableError(f"{width}x{height} pixels are less than {MIN_SIDE} on the shorter side")
    left, top = (width - side) // 2, (height - side) // 2
    square = to_rgb(image.crop((left, top, left + side, top + side)))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BILINEAR)
    return square, (width, height)
