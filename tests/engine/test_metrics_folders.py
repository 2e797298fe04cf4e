"""Which images of a folder count, and how they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinar.engine.errors import InputError
from retinar.engine.metrics.folders import open_folder, read_image, thin


def picture(path: Path, value: int = 90, size: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value // 2, 7)).save(path)
    return path


def test_flat_folder_is_sorted_and_leaves_out_what_is_no_image(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.webp", ".hidden.png", "._a.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder.png").mkdir()
    found = open_folder(tmp_path)
    assert [path.name for path in found.files] == ["a.JPG", "b.png", "c.webp"]
    assert found.classes == {} and found.others == ()


def test_class_subfolders_at_any_depth(tmp_path: Path) -> None:
    for name in ("npdr/x/2.png", "npdr/1.png", "healthy/0.png", ".cache/9.png", "npdr/.old/8.png"):
        picture(tmp_path / name)
    (tmp_path / "empty").mkdir()
    found = open_folder(tmp_path)
    assert {label: [path.name for path in files] for label, files in found.classes.items()} == {
        "healthy": ["0.png"],
        "npdr": ["1.png", "2.png"],
    }
    assert len(found.files) == 3


def test_output_of_generate_counts_without_its_sheet(tmp_path: Path) -> None:
    picture(tmp_path / "sheet.png")
    picture(tmp_path / "images" / "npdr" / "000000.png")
    assert list(open_folder(tmp_path).classes) == ["npdr"]
    assert [path.name for path in open_folder(tmp_path).files] == ["000000.png"]


def test_images_beside_subfolders_make_it_flat_and_name_the_rest(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    picture(tmp_path / "old" / "2.png")
    found = open_folder(tmp_path)
    assert (len(found.files), found.classes, found.others) == (1, {}, ("old",))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda root: None, "found nothing"),
        (lambda root: picture(root), "found a file"),
        (lambda root: root.mkdir(), "found none"),
        (lambda root: (root / "images").mkdir(parents=True), "found none"),
        (lambda root: [picture(root / split / "healthy" / "1.png") for split in ("train", "test")], "splits test"),
    ],
)
def test_folders_that_cannot_be_scored(tmp_path: Path, build: object, sentence: str) -> None:
    build(tmp_path / "x.png")  # type: ignore[operator]
    with pytest.raises(InputError, match=sentence):
        open_folder(tmp_path / "x.png")


def test_every_8_bit_kind_is_read_as_rgb(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    image = Image.fromarray(colours)
    for mode in ("RGB", "L", "RGBA", "P", "CMYK", "1"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        image.convert(mode).save(path)
        pixels = read_image(path)
        assert pixels.shape == (9, 7, 3) and pixels.dtype == np.uint8
    assert np.array_equal(read_image(tmp_path / "RGB.png"), colours)
    assert np.array_equal(read_image(tmp_path / "RGBA.png"), colours)


def test_16_bit_images_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="8 bits"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize(("count", "limit", "kept"), [(5, None, 5), (5, 9, 5), (10, 3, 3), (7, 2, 2)])
def test_thinning_is_even(count: int, limit: int | None, kept: int) -> None:
    files = tuple(Path(f"{index:03d}") for index in range(count))
    found = thin(files, limit)
    assert len(found) == len(set(found)) == kept and list(found) == sorted(found)
    assert np.ptp(np.diff([int(path.name) for path in found])) <= 1
