"""The pixel rule for every kind of file that a clinic's export may hold."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retinar.train.data.photographs import MAX_PIXELS, UnreadableError, square_rgb


def smooth(width: int = 90, height: int = 60) -> np.ndarray:
    """uint8 [H, W, 3] with a different gradient per channel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / (width - 1), 255 * y / (height - 1), 255 - 200 * x / (width - 1)], -1).astype(np.uint8)


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes, size: int = 60) -> np.ndarray:
    image, _ = square_rgb(data, size)
    assert (image.mode, image.size) == ("RGB", (size, size))
    return np.asarray(image).astype(int)


CENTRE = smooth()[:, 15:75].astype(int)


def test_the_largest_centred_square_is_kept_exactly_at_its_own_size() -> None:
    assert (pixels(encode(Image.fromarray(smooth()))) == CENTRE).all()
    tall = smooth(60, 93)
    assert (pixels(encode(Image.fromarray(tall))) == tall[16:76]).all()  # 33 rows to spare: 16 above, 17 below


def test_resizing_is_bilinear_with_antialiasing() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 254
    inner = pixels(encode(Image.fromarray(stripes)), 16)[2:-2]
    assert abs(inner - 127).max() <= 2  # without antialiasing: 0 or 254


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    upright = Image.fromarray(smooth())
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    data = encode(stored, form, exif=exif, **options)
    _, size = square_rgb(data, 60)
    assert size == (90, 60)
    assert abs(pixels(data) - CENTRE).max() <= (8 if form == "JPEG" else 0)


def test_damaged_exif_does_not_cost_the_photograph() -> None:
    data = encode(Image.fromarray(smooth()), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage", quality=95)
    assert abs(pixels(data) - CENTRE).mean() < 4


def test_greyscale_and_one_bit() -> None:
    grey = Image.fromarray(smooth()).convert("L")
    assert (pixels(encode(grey)) == np.asarray(grey)[:, 15:75, None]).all()
    bits = grey.convert("1")
    assert (pixels(encode(bits)) == np.asarray(bits.convert("L"))[:, 15:75, None]).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_cut(form: str) -> None:
    ramp = np.linspace(0, 65535, 60 * 60).reshape(60, 60).astype(np.uint16)
    data = encode(Image.fromarray(ramp), form)
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert (pixels(data) == np.rint(ramp.astype(float) * 255 / 65535)[..., None]).all()


def test_sixteen_bit_orientation() -> None:
    ramp = np.linspace(0, 65535, 90 * 60).reshape(60, 90).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 3
    expected = np.rint(ramp[::-1, ::-1].astype(float) * 255 / 65535)[:, 15:75, None]
    assert (pixels(encode(Image.fromarray(ramp), "PNG", exif=exif)) == expected).all()


def test_sixteen_bit_colour_keeps_its_range() -> None:
    rows = b"".join(b"\0" + struct.pack(">180H", *([65535, 32768, 0] * 60)) for _ in range(60))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 60, 60, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    assert (pixels(data)[0, 0] == (255, 128, 0)).all()


def test_transparency_lies_on_black() -> None:
    alpha = np.zeros((60, 90), np.uint8)
    alpha[:30] = 255
    alpha[30:40] = 128
    rgba = np.dstack([smooth(), alpha])
    got = pixels(encode(Image.fromarray(rgba)))
    assert (got[:30] == CENTRE[:30]).all() and (got[40:] == 0).all()
    assert abs(got[30:40] - CENTRE[30:40] * 128 / 255).max() <= 1
    grey = pixels(encode(Image.fromarray(rgba).convert("LA")))
    assert (grey[40:] == 0).all() and grey[:30].max() > 100


def test_palettes_with_and_without_transparency() -> None:
    palette = Image.fromarray(smooth()).quantize(64)
    expected = np.asarray(palette.convert("RGB"))[:, 15:75]
    for form in ("PNG", "GIF"):
        assert (pixels(encode(palette, form)) == expected).all()
    index = int(np.asarray(palette)[0, 20])
    clear = pixels(encode(palette, "PNG", transparency=index))
    hole = np.asarray(palette)[:, 15:75] == index
    assert (clear[hole] == 0).all() and (clear[~hole] == expected[~hole]).all()


def test_cmyk() -> None:
    cmyk = Image.fromarray(smooth()).convert("CMYK")
    for form in ("JPEG", "TIFF"):
        data = encode(cmyk, form, **({"quality": 100, "subsampling": 0} if form == "JPEG" else {}))
        assert Image.open(io.BytesIO(data)).mode == "CMYK"
        assert abs(pixels(data) - CENTRE).max() <= 10


def test_a_small_photograph_is_enlarged_a_tiny_one_refused() -> None:
    assert pixels(encode(Image.fromarray(smooth(40, 32))), 64).shape == (64, 64, 3)
    with pytest.raises(UnreadableError, match="90x31 pixels are less than 32"):
        square_rgb(encode(Image.fromarray(smooth(90, 31))), 60)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF"])
def test_a_truncated_file_is_refused(form: str) -> None:
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)), form)
    with pytest.raises(UnreadableError) as told:
        square_rgb(data[: len(data) // 2], 60)
    assert "0x" not in str(told.value)  # the same words on every run


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "empty"), (b"<html>not found</html>", "not an image"), (b"\xff\xd8\xff", "not an image|damaged")],
)
def test_what_is_no_image_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(UnreadableError, match=words):
        square_rgb(data, 60)


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(UnreadableError, match="mode F"):
        square_rgb(encode(Image.fromarray(np.random.rand(60, 60).astype(np.float32)), "TIFF"), 60)


@pytest.mark.filterwarnings("error")
def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    for side in (13_000, 30_000):  # above our limit, and above the one at which Pillow itself refuses
        assert side * side > MAX_PIXELS
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
        with pytest.raises(UnreadableError, match="pixels"):
            square_rgb(data, 60)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP"]), st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255))))
def test_damaged_bytes_give_pixels_or_a_reason(form: str, damage: list[tuple[int, int]]) -> None:
    data = bytearray(encode(Image.fromarray(smooth()), form))
    for position, value in damage:
        data[position % len(data)] = value
    try:
        image, _ = square_rgb(bytes(data), 32)
    except UnreadableError as error:
        assert str(error)
    else:
        assert (image.mode, image.size) == ("RGB", (32, 32))
