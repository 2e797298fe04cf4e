"""Views of a photograph: upstream's geometry, to the pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retinar.engine.checkpoint import save_tokenizer
from retinar.engine.errors import InputError
from retinar.engine.progress import silent
from retinar.engine.tokenizer import VQTokenizer
from retinar.engine.torchvision_shim import import_torchvision
from retinar.train.code_files import CodeSet
from retinar.train.codes import encode_folder
from retinar.train.views import Views, center_crop, resize_shorter
from tests.train.pictures import MODEL, SIZE, write_pictures


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 90), st.integers(8, 90), st.integers(8, 40), st.floats(1, 1.6))
def test_ten_crops_are_torchvisions(height: int, width: int, size: int, crop_range: float) -> None:
    try:
        import_torchvision()
        from torchvision.transforms import TenCrop
    except ImportError:
        pytest.skip("torchvision is not installed")
    pixels, views = noise(height, width), Views("ten-crop", size, crop_range)
    wanted = TenCrop(size)(Image.fromarray(center_crop(pixels, int(size * crop_range))))
    found = views.of(pixels)
    assert found.shape == (10, size, size, 3) and len(views.names) == 10
    assert all(np.array_equal(crop, np.asarray(image)) for crop, image in zip(found, wanted, strict=True))


def test_an_image_and_its_mirror() -> None:
    views = Views("mirror", 24)
    image, mirror = views.of(noise(24, 24))
    assert np.array_equal(image, noise(24, 24)) and np.array_equal(mirror, noise(24, 24)[:, ::-1])
    wide = np.concatenate([np.zeros((24, 8, 3), np.uint8), noise(24, 24), np.zeros((24, 9, 3), np.uint8)], axis=1)
    assert np.array_equal(views.of(wide)[0], noise(24, 24))  # the larger margin is on the right


def test_large_photographs_are_halved_by_averages_before() -> None:
    pixels = noise(80, 100)
    halves = pixels.astype(np.float64).reshape(40, 2, 50, 2, 3).mean(axis=(1, 3))
    assert np.abs(resize_shorter(pixels, 40).astype(np.float64) - halves).max() <= 1  # rounded twice
    assert resize_shorter(noise(17, 33), 20).shape == (20, 39, 3)  # smaller ones are enlarged


@pytest.mark.parametrize("crop_range", [0.9, 0.0, float("nan"), 17.0])
def test_crops_beyond_the_image_are_refused(crop_range: float) -> None:
    with pytest.raises(InputError, match="crop range from 1"):
        Views("ten-crop", 32, crop_range)


def test_encoding_ten_crops_of_photographs_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "data", train=1)
    save_tokenizer(tmp_path / "vq", VQTokenizer(MODEL))
    encode_folder(tmp_path / "data", tmp_path / "vq", tmp_path / "codes", views="ten-crop", progress=silent)
    assert f"photographs of {SIZE} pixels are enlarged to {int(1.1 * SIZE)}" in capsys.readouterr().err
    codes = CodeSet(tmp_path / "codes")
    assert codes.codes.shape == (2, 10, 64) and codes.meta["crop_range"] == 1.1
    assert codes.meta["view_names"][4] == "centre" and codes.meta["view_names"][5] == "top-left of the mirror"
    with pytest.raises(InputError, match="another crop_range"):
        encode_folder(
            tmp_path / "data", tmp_path / "vq", tmp_path / "codes", views="ten-crop", crop_range=1.2, progress=silent
        )
