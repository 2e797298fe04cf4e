"""Phantoms: deterministic, in OIA-DDR's layout, and with classes that differ by their lesions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retinar.engine.errors import InputError
from retinar.engine.progress import silent
from retinar.train.data.layouts import read_source
from retinar.train.data.phantoms import draw_phantom, write_phantoms
from retinar.train.data.prepare import prepare

COUNTS = {"train": {"healthy": 4, "npdr": 5}, "test": {"healthy": 2, "npdr": 2}}


def write(out: Path, **options: object) -> dict:
    return write_phantoms(out, COUNTS, size=48, progress=silent, **options)


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(tmp_path / name, seed=seed)
    a, b, c = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.jpg")} for name in "abc"
    )
    assert a == b and len(a) == 13 and len(set(a.values())) == 13
    assert not set(a.values()) & set(c.values())
    few = draw_phantom("npdr", 2, split="train", seed=3, size=48)
    many = [draw_phantom("npdr", i, split="train", seed=3, size=48) for i in range(3)][2]
    assert few.image.tobytes() == many.image.tobytes()  # nothing depends on the neighbours


def test_they_are_prepared_like_photographs(tmp_path: Path) -> None:
    write(tmp_path / "src")
    listing = read_source(tmp_path / "src")
    assert listing.layout == "ddr"
    assert {p.grade for p in listing.photographs} <= {"0", "2", "3"}
    summary = prepare(tmp_path / "src", tmp_path / "out", size=32, workers=1, progress=silent)
    assert summary["counts"] == COUNTS
    assert summary["leaks"]["patients"] == summary["duplicates"]["across_splits"] == summary["skipped"] == 0


def test_a_second_call_draws_only_when_something_changed(tmp_path: Path) -> None:
    assert write(tmp_path)["reused"] is False
    stamp = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert write(tmp_path)["reused"] is True
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == stamp
    write_phantoms(tmp_path, {"train": {"healthy": 1}}, size=48, progress=silent)
    assert len(list(tmp_path.rglob("*.jpg"))) == 1
    (tmp_path / "phantoms.json").write_text("{")  # killed while drawing
    assert write(tmp_path)["reused"] is False


@pytest.mark.parametrize("size", [64, 128])
def test_classes_differ_by_more_than_chance(size: int) -> None:
    """Yellow deposits: pixels where green is far above its surroundings and blue is not, outside the disc."""

    def deposits(label: str, index: int) -> float:
        pixels = np.asarray(draw_phantom(label, index, size=size).image).astype(float)
        yellow = pixels[..., 1] - pixels[..., 2]
        return float(np.quantile(yellow, 0.995) / (np.median(yellow) + 20))

    healthy, npdr = ([deposits(label, i) for i in range(30)] for label in ("healthy", "npdr"))
    cut = sorted(healthy + npdr)[30]
    assert sum(v >= cut for v in npdr) + sum(v < cut for v in healthy) >= 51  # 85 % by one hand-made feature


def test_anatomy_is_where_it_belongs() -> None:
    for index in range(6):
        phantom = draw_phantom("healthy", index, size=128)
        pixels = np.asarray(phantom.image).astype(float)
        assert phantom.grade == 0
        assert pixels[:6, :6].max() < 12  # black beyond the field of view
        inside = pixels[40:88, 40:88].mean((0, 1))
        assert inside[0] > inside[1] > inside[2] and inside[0] > 90  # orange-red
        _, column = np.unravel_index(pixels[..., 1].argmax(), (128, 128))
        assert (column > 64) == (phantom.eye == "right")  # the disc is on the nasal side


def test_mistakes_are_told(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for arguments, words in (
        (({"dev": {"healthy": 1}},), "got dev"),
        (({"train": {"amd": 1}},), "amd"),
        (({"train": {"healthy": -1}},), "-1"),
    ):
        with pytest.raises(InputError, match=words):
            write_phantoms(tmp_path / "out", *arguments, progress=silent)
    with pytest.raises(InputError, match="holds something else"):
        write(tmp_path / "full")
    with pytest.raises(InputError, match="32 to 1024"):
        write_phantoms(tmp_path / "out", COUNTS, size=8, progress=silent)
