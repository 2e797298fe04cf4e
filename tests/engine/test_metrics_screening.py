"""Which images of a folder are scored: grey among colour and wrong sizes are left out, nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retinar.engine.metrics.folders import read_image
from retinar.engine.metrics.screening import GREY, SIZE, Look, screen, usable

ROOT = Path("photographs")


def looks(*sizes: tuple[int, int], grey: tuple[int, ...] = ()) -> dict[Path, Look]:
    return {ROOT / f"{i}.png": Look(*size, grey=i in grey) for i, size in enumerate(sizes)}


def left_out(found: dict[Path, Look]) -> dict[str, str]:
    return {path.stem: reason for path, reason in screen(found, ROOT).left_out.items()}


def test_grey_among_colour_is_left_out_and_alone_is_scored() -> None:
    assert left_out(looks(*[(9, 9)] * 4, grey=(1, 3))) == {"1": GREY, "3": GREY}
    alone = screen(looks(*[(9, 9)] * 3, grey=(0, 1, 2)), ROOT)
    assert alone.left_out == {} and "greyscale images only" in alone.warnings[0]
    assert screen({}, ROOT).left_out == {} and screen({}, ROOT).warnings == []


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGB", "RGBA"])
def test_grey_files_of_every_mode_are_recognised(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8))
    grey.convert(mode).save(tmp_path / "grey.png")
    assert Look.of(read_image(tmp_path / "grey.png")) == Look(30, 20, True)
    colour = np.asarray(grey.convert("RGB")).copy()
    colour[19, 29, 2] ^= 1
    assert Look.of(colour) == Look(30, 20, False)


def test_thumbnails_and_strips_are_left_out_with_their_size() -> None:
    found = left_out(looks(*[(100, 100)] * 5, (49, 49), (50, 50), (300, 60), (201, 100), (200, 100), (100, 201)))
    assert set(found) == {"5", "7", "8", "10"}
    assert found["5"] == f"{SIZE}: 49 x 49, where half of the folder has a short side of 100 or more"
    assert found["8"] == f"{SIZE}: 201 x 100, longer than 2:1"
    assert left_out(looks(*[(300, 100)] * 3, (100, 100))) == {}  # a folder of panoramas


def test_other_sizes_are_scored_and_named() -> None:
    assert screen(looks(*[(40, 40)] * 3), ROOT).warnings == []
    few = screen(looks(*[(40, 40)] * 3, (60, 40)), ROOT)
    assert few.left_out == {} and "1 of 4 images" in few.warnings[0] and "3.png (60 x 40)" in few.warnings[0]
    many = screen(looks(*[(40, 40)] * 8, *[(40 + i, 40) for i in range(1, 8)]), ROOT).warnings[0]
    assert "7 of 15 images" in many and many.endswith("12.png (45 x 40) and 2 more")


@settings(max_examples=200, deadline=None)
@given(
    found=st.lists(
        st.builds(Look, width=st.integers(1, 900), height=st.integers(1, 900), grey=st.booleans()), max_size=12
    )
)
def test_what_is_left_out_is_named_with_a_reason_and_most_remains(found: list[Look]) -> None:
    files = {ROOT / f"{i}.png": look for i, look in enumerate(found)}
    result = screen(files, ROOT)
    assert set(result.left_out) <= set(files) and all(result.left_out.values())
    coloured = {path for path, look in files.items() if not look.grey} or set(files)
    kept = set(files) - set(result.left_out)
    assert kept <= coloured
    thumbnails = [path for path in coloured - kept if "short side" in result.left_out[path]]
    assert len(thumbnails) <= len(coloured) / 2


def test_every_photograph_of_mixed_sources_is_kept(photographs: Path) -> None:
    """400 x 400, 512 and 256 on the short side, as published: the figures then equal clean-fid's on the folder."""
    found = {}
    for split in ("train", "valid", "test"):
        for path in sorted((photographs / split).glob("*.jpg")):
            with Image.open(path) as image:
                found[path] = Look(*image.size, grey=False)
        assert len(found) > 500 and screen(found, photographs).left_out == {}


def test_usable_files_can_be_read_and_keep_their_class(tmp_path: Path) -> None:
    for name, size in (("a/1.png", 20), ("a/2.png", 20), ("b/3.png", 20), ("b/4.png", 5)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (size, size), (9, 8, 7)).save(tmp_path / name)
    (tmp_path / "a" / "bad.png").write_bytes(b"x")
    classes = {label: tuple(sorted((tmp_path / label).iterdir())) for label in "ab"}
    skipped: dict[Path, str] = {}
    found = usable(classes, tmp_path, skipped)
    assert sorted(path.name for path in skipped) == ["4.png", "bad.png"] and all(skipped.values())
    assert {label: [path.name for path in files] for label, files in found.items()} == {
        "a": ["1.png", "2.png"],
        "b": ["3.png"],
    }
