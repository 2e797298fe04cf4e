"""The blinded reading: nothing but the picture tells, the key is right, and filled-in forms are scored."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from retinar import cli
from retinar.engine.errors import InputError
from retinar.report.reading import alike, write_reading
from retinar.report.reading_score import score_reading
from tests.face.report_world import CLASSES, picture

Classes = dict[str, list[Path]]


def sides(root: Path, count: int = 6, real_size: int = 90, fake_size: int = 64) -> tuple[Classes, Classes]:
    """Photographs as JPEG of one size with EXIF data, generated images as PNG of another with text chunks."""
    found: tuple[Classes, Classes] = ({}, {})
    for place, label in enumerate(CLASSES):
        for index in range(count):
            path = root / "real" / label / f"real-{index}.png"
            picture(path, 100 * place + index, real_size)
            with Image.open(path) as image:
                exif = Image.Exif()
                exif[0x010F] = "camera"
                image.save(path.with_suffix(".jpg"), quality=95, exif=exif)
            path.unlink()
            found[0].setdefault(label, []).append(path.with_suffix(".jpg"))
            path = root / "fake" / label / f"fake-{index}.png"
            picture(path, 1000 + 100 * place + index, fake_size)
            text = PngImagePlugin.PngInfo()
            text.add_text("synthetic", "true")
            with Image.open(path) as image:
                image.save(path, pnginfo=text)
            found[1].setdefault(label, []).append(path)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classes, Classes]:
    return sides(tmp_path_factory.mktemp("sides"))


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def chunks(data: bytes) -> list[bytes]:
    """The kinds of a PNG's chunks."""
    place, found = 8, []
    while place < len(data):
        found.append(data[place + 4 : place + 8])
        place += 12 + int.from_bytes(data[place : place + 4])
    return found


# ---- blindness ------------------------------------------------------------------------------------------------------


def test_only_the_picture_tells(files: tuple[Classes, Classes], tmp_path: Path) -> None:
    found = write_reading(tmp_path, *files, count=12, seed=3)
    inside = tmp_path / "reading"
    images = sorted(inside.glob("0*.png"))
    assert found.count == len(images) == 12 and [path.stem for path in images] == [f"{n:03}" for n in range(1, 13)]
    assert sorted(path.name for path in inside.iterdir() if path not in images) == [
        "README.txt",
        "form.csv",
        "sheet.png",
    ]
    looks = set()
    for path in (*images, inside / "sheet.png"):
        assert set(chunks(path.read_bytes())) == {b"IHDR", b"IDAT", b"IEND"}
        with Image.open(path) as image:
            if path in images:
                looks.add((image.size, image.mode))
    assert looks == {((384, 384), "RGB")}
    assert len({path.stat().st_size for path in images}) == 1
    assert len({path.stat().st_mtime_ns for path in inside.iterdir()}) == 1
    assert len({(path.stat().st_mode, path.stat().st_uid) for path in images}) == 1
    said = (inside / "README.txt").read_text() + (inside / "form.csv").read_text()
    assert "fake" not in said and str(tmp_path.parent) not in said
    form = rows(inside / "form.csv")
    assert [list(row.values())[1:] for row in form] == [["", "", "", ""]] * 12


def test_the_key_names_each_image(files: tuple[Classes, Classes], tmp_path: Path) -> None:
    found = write_reading(tmp_path, *files, count=16)
    key = rows(tmp_path / "reading-key.csv")
    assert not list((tmp_path / "reading").glob("*key*"))
    for row in key:
        path = Path(row["file"])
        assert path.parent.name == row["label"] and path.name.startswith(
            {"real": "real", "generated": "fake"}[row["source"]]
        )
        with Image.open(path) as image, Image.open(tmp_path / "reading" / f"{row['number']}.png") as shown:
            assert np.array_equal(np.asarray(alike(image, found.side, 384)), np.asarray(shown))
    assert len({row["file"] for row in key}) == 16
    for label in CLASSES:
        for source in ("real", "generated"):
            assert sum((row["label"], row["source"]) == (label, source) for row in key) == 4


def test_a_seed_is_an_order(files: tuple[Classes, Classes], tmp_path: Path) -> None:
    said = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        write_reading(tmp_path / name, *files, count=12, seed=seed)
        inside = sorted((tmp_path / name).rglob("*"))
        said[name] = [(path.relative_to(tmp_path / name), path.read_bytes()) for path in inside if path.is_file()]
    assert said["a"] == said["b"] != said["c"]
    sources = [row["source"] for row in rows(tmp_path / "a" / "reading-key.csv")]
    assert sources != sorted(sources) and sources != sorted(sources, reverse=True)


def test_a_finer_photograph_does_not_show() -> None:
    """One scene, as a photograph of 256 px and as an image of 64 px: both have the same detail afterwards."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    coarse = Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)
    fine = coarse.resize((256, 256), Image.Resampling.LANCZOS)
    speckled = Image.fromarray(np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8))

    def detail(image: Image.Image) -> float:
        """Share of the energy beyond what 64 pixels can hold."""
        grey = np.asarray(alike(image, 64, 384).convert("L"), np.float64)
        power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
        far = np.abs(np.fft.fftfreq(384)) > 1.5 * 32 / 384
        return float((power[far][:, far].sum()) / power.sum())

    assert detail(speckled) < 2e-3 and detail(fine) < 2e-3 and detail(coarse) < 2e-3


def test_fewer_images_than_asked(tmp_path: Path) -> None:
    real, fake = sides(tmp_path / "sides", count=5)
    real["npdr"][0].write_bytes(b"no photograph")
    fake["healthy"] = fake["healthy"][:3]
    found = write_reading(tmp_path, real, fake, count=40)
    assert found.count == 12 and found.per_class == dict.fromkeys(CLASSES, 3)
    assert "12 images instead of 40" in found.warnings[0]


def test_too_few(files: tuple[Classes, Classes], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 4"):
        write_reading(tmp_path, *files, count=3)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(InputError, match="readable image of generated npdr"):
        write_reading(tmp_path, files[0], {**files[1], "npdr": [bad]}, count=4)
    assert not (tmp_path / "reading").exists()


# ---- scoring --------------------------------------------------------------------------------------------------------

KEY = [(1, "real", "healthy"), (2, "generated", "healthy"), (3, "real", "npdr"), (4, "generated", "npdr")]


def write_key(path: Path, lines: list[tuple[int, str, str]]) -> Path:
    path.write_text("number,source,label,file\n" + "".join(f"{n:03},{s},{c},x/{n}.png\n" for n, s, c in lines))
    return path


HEADER = ("number", "real or generated", "confidence (1 to 5)", "grade", "remarks")


def write_form(path: Path, lines: list[tuple[object, ...]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([HEADER, *lines])
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def test_a_form_by_hand(tmp_path: Path) -> None:
    lines = [
        ("1", "Real", "5", "healthy", "sharp, clear"),
        ("2", "real", "2,5", "npdr", ""),
        (3, "", "", "", ""),
        (4, "g", 4, "NPDR", ""),
    ]
    for delimiter, encoding in ((",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8")):
        form = write_form(tmp_path / "form.csv", lines, delimiter, encoding)
        found = score_reading(form, write_key(tmp_path / "key.csv", KEY))
        assert (found["images"], found["unanswered"]) == (4, 1)
        assert found["accuracy"]["right"] == 2 and found["accuracy"]["n"] == 3  # type: ignore[index]
        assert found["sensitivity"]["share"] == 0.5 and found["specificity"]["share"] == 1.0  # type: ignore[index]
        assert [found["by_class"][label]["share"] for label in CLASSES] == [0.5, 1.0]  # type: ignore[index]
        assert [found["grading"][side]["share"] for side in ("real", "generated")] == [1.0, 0.5]  # type: ignore[index]
        assert found["confidence"] == {"where right": 4.5, "where wrong": 2.5}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["real", "generated"]), st.sampled_from(["real", "generated", ""])),
        min_size=1,
        max_size=60,
    ),
    st.randoms(),
)
def test_counts_add_up(
    tmp_path_factory: pytest.TempPathFactory, truth: list[tuple[str, str]], order: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("reading")
    key = write_key(folder / "key.csv", [(n, source, CLASSES[n % 2]) for n, (source, _) in enumerate(truth, 1)])
    lines = [(n, said, "", "", "") for n, (_, said) in enumerate(truth, 1)]
    order.shuffle(lines)
    form = write_form(folder / "form.csv", lines)
    told = [(source, said) for source, said in truth if said]
    if not told:
        with pytest.raises(InputError, match="fill in the form"):
            score_reading(form, key)
        return
    found = score_reading(form, key)
    whole, parts = found["accuracy"], [found["sensitivity"], found["specificity"]]
    assert whole["right"] == sum(source == said for source, said in told) and whole["n"] == len(told)  # type: ignore[index]
    low, high = whole["interval"]  # type: ignore[index]
    assert 0 <= low <= whole["share"] <= high <= 1 and high - low > 0  # type: ignore[index]
    for split in (parts, list(found["by_class"].values())):  # type: ignore[attr-defined]
        assert sum(part["right"] for part in split) == whole["right"]  # type: ignore[index]
        assert sum(part["n"] for part in split) == whole["n"]  # type: ignore[index]


def test_wilsons_interval(tmp_path: Path) -> None:
    """14 of 20: 0.481 to 0.855 (Newcombe 1998 gives the method; computed by hand)."""
    key = write_key(tmp_path / "key.csv", [(n, "real", "healthy") for n in range(1, 21)])
    form = write_form(
        tmp_path / "form.csv", [(n, "real" if n <= 14 else "generated", "", "", "") for n in range(1, 21)]
    )
    assert score_reading(form, key)["accuracy"]["interval"] == pytest.approx((0.48103, 0.85452), abs=1e-4)  # type: ignore[index]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([(1, "perhaps", "", "", "")], "found 'perhaps'"),
        ([(9, "real", "", "", "")], "found 9"),
        ([(1, "real", "", "", ""), (1, "real", "", "", "")], "1 twice"),
        ([("one", "real", "", "", "")], "found 'one'"),
        ([("²", "real", "", "", "")], "found '²'"),
        ([(1, "real", "7", "", "")], "confidence of 1 to 5"),
        ([(1, "real", "high", "", "")], "confidence of 1 to 5"),
        ([], "no column"),
    ],
)
def test_forms_that_cannot_be_scored(
    lines: list[tuple[object, ...]], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form, key = write_form(tmp_path / "form.csv", lines), write_key(tmp_path / "key.csv", KEY)
    assert cli.main(["evaluate", "--score-reading", str(form), str(key)]) == 2
    told = capsys.readouterr()
    assert words in told.err and told.err.count("\n") == 1


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, form = write_key(tmp_path / "key.csv", KEY), write_form(tmp_path / "form.csv", [(1, "real", "", "", "")])
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * 4)
    for pair in ((tmp_path / "absent", key), (form, tmp_path / "absent"), (key, form), (tmp_path / "bytes", key)):
        assert cli.main(["evaluate", "--score-reading", *map(str, pair)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_from_the_folder_to_the_score(
    files: tuple[Classes, Classes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A grader who knows the key, writing into the form that was given out."""
    write_reading(tmp_path, *files, count=8)
    form = tmp_path / "reading" / "form.csv"
    key = {row["number"]: row for row in rows(tmp_path / "reading-key.csv")}
    lines = [(row["number"], key[row["number"]]["source"], "5", key[row["number"]]["label"], "") for row in rows(form)]
    write_form(form, lines)
    assert cli.main(["evaluate", "--score-reading", str(form), str(tmp_path / "reading-key.csv")]) == 0
    told = capsys.readouterr().out
    assert "right answers" in told and "8 of 8" in told and "4 of 4" in told and "Wilson" in told
