"""Near-duplicates: planted copies are found, different eyes are not."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from retinar.engine.progress import silent
from retinar.train.data.duplicates import THRESHOLD, find_pairs, signature
from retinar.train.data.layouts import read_source
from retinar.train.data.phantoms import draw_phantom
from retinar.train.data.photographs import square_rgb
from retinar.train.data.prepare import prepare


def reencoded(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40)
    return Image.open(buffer)


COPIES = {
    "re-encoded": reencoded,
    "smaller": lambda im: im.resize((110, 110), Image.Resampling.LANCZOS),
    "larger": lambda im: im.resize((601, 601), Image.Resampling.BICUBIC),
    "mirrored": lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "mirrored, smaller, re-encoded": lambda im: reencoded(
        im.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((150, 150))
    ),
    "brighter": lambda im: ImageEnhance.Brightness(im).enhance(1.2),
    "cropped": lambda im: im.crop((4, 4, im.width - 4, im.height - 4)),
}


def prepared(image: Image.Image, size: int = 128) -> str:
    return signature(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


@pytest.fixture(scope="module")
def phantoms() -> list[Image.Image]:
    return [draw_phantom(("healthy", "npdr")[i % 2], i, size=192).image for i in range(40)]


@pytest.mark.parametrize("kind", COPIES)
def test_planted_copies_are_found_and_nothing_else(phantoms: list[Image.Image], kind: str) -> None:
    signatures = [prepared(image) for image in [*phantoms, *(COPIES[kind](image) for image in phantoms[:8])]]
    pairs = find_pairs(signatures, [str(i) for i in range(len(signatures))], block=7)
    assert {(p.first, p.second) for p in pairs} == {(i, 40 + i) for i in range(8)}
    assert all(p.mirrored == ("mirrored" in kind) for p in pairs)
    assert all(THRESHOLD <= p.similarity <= 1 for p in pairs)


def test_blocks_do_not_change_the_result(phantoms: list[Image.Image]) -> None:
    signatures = [prepared(image) for image in [*phantoms[:20], *phantoms[5:9]]]
    digests = [str(i) for i in range(24)]
    assert find_pairs(signatures, digests, block=1) == find_pairs(signatures, digests, block=1000)


def test_pictures_without_structure_are_alike_only_when_equal() -> None:
    black, grey = (Image.new("RGB", (64, 64), colour) for colour in ("black", "grey"))
    assert prepared(black, 64) == "" == prepared(grey, 64)
    assert find_pairs(["", "", ""], ["a", "b", "a"]) == [(0, 2, 1.0, False)]
    assert find_pairs([], []) == []


def test_unrelated_signatures_give_no_pairs() -> None:
    rng = np.random.default_rng(0)
    signatures = [base64.b64encode(rng.integers(-60, 60, 205, np.int8).tobytes()).decode() for _ in range(3000)]
    assert find_pairs(signatures, [str(i) for i in range(3000)]) == []


def test_the_report_names_both_files(tmp_path: Path) -> None:
    for i in range(4):
        path = tmp_path / "src" / ("train", "test")[i % 2] / "a" / f"eye{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_phantom("healthy", i, size=96).image.save(path)
    COPIES["mirrored"](draw_phantom("healthy", 0, size=96).image).save(tmp_path / "src" / "test" / "a" / "copy.jpg")
    summary = prepare(tmp_path / "src", tmp_path / "out", size=64, workers=1, progress=silent)
    assert summary["duplicates"] == {
        "across_splits": 1, "within_splits": 0, "first": [["test/a/copy.png", "train/a/eye0.png"]],
    }  # fmt: skip
    line = (tmp_path / "out" / "duplicates.jsonl").read_text()
    assert line.count("\n") == 1 and '"mirrored": true' in line and '"same_patient": false' in line


def test_real_photographs(photographs: Path) -> None:
    """Known pairs are found, and neighbours in the list (other eyes by the same cameras) are not taken for them."""
    names = {"idrid-tr_IDRiD_013.jpg", "idrid-tr_IDRiD_397.jpg", "odir-2957_left.jpg", "odir-2957_right.jpg"}
    listed = read_source(photographs).photographs
    chosen = [p for i, p in enumerate(listed) if p.path.name in names or i % 16 == 0]
    signatures = [signature(square_rgb(p.path.read_bytes(), 256)[0]) for p in chosen]
    pairs = find_pairs(signatures, [p.source for p in chosen])
    assert [{chosen[p.first].path.name, chosen[p.second].path.name} for p in pairs] == [
        {"idrid-tr_IDRiD_013.jpg", "idrid-tr_IDRiD_397.jpg"},
        {"odir-2957_left.jpg", "odir-2957_right.jpg"},
    ]
    assert [p.mirrored for p in pairs] == [False, True]
