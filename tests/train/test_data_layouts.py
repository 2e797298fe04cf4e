"""Layouts, class mappings, patients and splits: what is listed, and which mistakes are told."""

from __future__ import annotations

import string
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinar.engine.errors import InputError
from retinar.train.data.classes import DEFAULT_CLASSES, format_classes, parse_classes
from retinar.train.data.layouts import read_source
from retinar.train.data.listing import Photograph
from retinar.train.data.patients import assign_splits, find_leaks, patient_key


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not decoded here")


def ddr(root: Path, lines: dict[str, str]) -> Path:
    """OIA-DDR's layout from the text of its grade files."""
    for split, text in lines.items():
        (root / split).mkdir(parents=True)
        (root / f"{split}.txt").write_text(text)
        touch(root / split, *(line.split()[0] for line in text.splitlines() if line.split()))
    return root


def labels(listing) -> Counter:
    return Counter((p.split, p.label) for p in listing.photographs)


# ---- mapping -----------------------------------------------------------------------------------------------------

names = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=8)
grades = st.text(string.ascii_letters + string.digits + " '\"-._", min_size=1, max_size=6).map(str.strip).filter(bool)


@given(st.dictionaries(names, st.lists(grades, min_size=1, max_size=3), min_size=1, max_size=4))
def test_a_mapping_survives_being_written_and_read(mapping: dict[str, list[str]]) -> None:
    unique = {name: tuple(f"{grade}{n}" for grade in values) for n, (name, values) in enumerate(mapping.items())}
    unique = {name: tuple(dict.fromkeys(values)) for name, values in unique.items()}
    if len({v for values in unique.values() for v in values}) < sum(len(values) for values in unique.values()):
        return
    assert parse_classes(format_classes(unique)) == unique
    assert list(parse_classes(format_classes(unique))) == list(unique)


@given(st.text(max_size=40))
def test_any_text_is_a_mapping_or_one_sentence(text: str) -> None:
    try:
        classes = parse_classes(text)
    except InputError as error:
        assert str(error)
    else:
        assert classes and all(classes.values())


def test_the_default_mapping_is_the_papers() -> None:
    assert parse_classes(DEFAULT_CLASSES) == {"healthy": ("0",), "npdr": ("2", "3")}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty mapping"),
        ("healthy", "'healthy'"),
        ("healthy=", "'healthy='"),
        ("a=0 a=1", "occurs twice"),
        ("a=0 b=0", "belongs to a and b"),
        ("../up=0", "class name"),
        ("a='0", "open quote"),
    ],
)
def test_a_wrong_mapping_is_told(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_classes(text)


# ---- OIA-DDR -----------------------------------------------------------------------------------------------------

LINES = {
    "train": "a.jpg 0\nb.jpg 2\nc.jpg 1\n",
    "valid": "d.jpg 0\ne.jpg 3\n",
    "test": "f.jpg 0\n\ng_left.jpg   3  \nh.jpg 5\n",
}


@pytest.mark.parametrize("given_parent", [False, True])
@pytest.mark.parametrize("layout", ["auto", "ddr"])
def test_ddr(tmp_path: Path, given_parent: bool, layout: str) -> None:
    ddr(tmp_path / "DR_grading", LINES)
    listing = read_source(tmp_path if given_parent else tmp_path / "DR_grading", layout=layout)
    assert listing.layout == "ddr"
    assert labels(listing) == {(s, c): 1 for s in LINES for c in ("healthy", "npdr")}
    assert listing.left_out == {"1": 1, "5": 1}
    prefix = "DR_grading/" if given_parent else ""
    assert [p.source for p in listing.photographs][-1] == f"{prefix}valid/e.jpg"
    assert {p.patient for p in listing.photographs} >= {"g"}


def test_ddr_with_grade_files_inside_the_split_folders(tmp_path: Path) -> None:
    ddr(tmp_path, LINES)
    for split in LINES:
        (tmp_path / f"{split}.txt").rename(tmp_path / split / f"{split}.txt")
    assert labels(read_source(tmp_path)) == {(s, c): 1 for s in LINES for c in ("healthy", "npdr")}


def test_ddr_counts_what_no_line_names_and_takes_windows_text(tmp_path: Path) -> None:
    ddr(tmp_path, {"train": "a.jpg 0\nb.jpg 2\n"})
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbfa.jpg 0\r\nb.jpg 2\r\na.jpg 0\r\n")
    touch(tmp_path / "train", "extra.jpg", "notes.md", ".hidden.jpg")
    listing = read_source(tmp_path)
    assert listing.unlisted == 1 and len(listing.photographs) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.jpg 0\nb.jpg 9\n", "grade of 0 to 5, got '9' for train/b.jpg"),
        ("a.jpg 0\nb.jpg two\n", "grade of 0 to 5"),
        ("a.jpg 0\nb.jpg\n", "line 2 of .*'b.jpg'"),
        ("a.jpg 0\na.jpg 2\n", "train/a.jpg is listed twice, as 0 in train and as 2 in train"),
        ("", "found none"),
        ("a.jpg 0\n", "class npdr"),
    ],
)
def test_ddr_mistakes(tmp_path: Path, text: str, words: str) -> None:
    ddr(tmp_path, {"train": text})
    with pytest.raises(InputError, match=words):
        read_source(tmp_path, layout="ddr")


def test_missing_photographs_are_told_or_left_out(tmp_path: Path) -> None:
    ddr(tmp_path, {"train": "".join(f"{i}.jpg {0 if i % 2 else 2}\n" for i in range(10))})
    for i in range(5):
        (tmp_path / "train" / f"{i}.jpg").unlink()
    with pytest.raises(InputError, match=r"5 of 10 listed photographs .*train/0.jpg, train/1.jpg, train/2.jpg, \.\.\."):
        read_source(tmp_path)
    listing = read_source(tmp_path, skip_missing=True)
    assert (len(listing.photographs), len(listing.missing)) == (5, 5)


def test_a_split_folder_without_grades_is_told(tmp_path: Path) -> None:
    ddr(tmp_path, LINES)
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(InputError, match=r"valid.txt is missing"):
        read_source(tmp_path)


def test_real_photographs_are_counted(photographs: Path) -> None:
    counts = labels(read_source(photographs))
    assert [counts[s, "healthy"] for s in ("train", "valid", "test")] == [888, 355, 529]
    assert [counts[s, "npdr"] for s in ("train", "valid", "test")] == [454, 182, 269]
    assert find_leaks(read_source(photographs).photographs) == []


# ---- tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(tmp_path: Path, delimiter: str) -> None:
    touch(tmp_path, "im/10_left.jpeg", "im/10_right.jpeg", "im/x.png", "y.PNG")
    rows = ["Path,Grade,Split,Patient", "im/10_left,0,train,", "im/10_right,2.0,training,", '"im/x.png",3,val,P7']
    rows += ["y,0,TEST,P8", "", ",,,"]
    (tmp_path / "t.csv").write_text("\n".join(rows).replace(",", delimiter))
    for src in (tmp_path, tmp_path / "t.csv"):
        listing = read_source(src)
        assert listing.layout == "csv"
        found = {p.source: (p.label, p.grade, p.split, p.patient) for p in listing.photographs}
        assert found == {
            "im/10_left.jpeg": ("healthy", "0", "train", "10"),
            "im/10_right.jpeg": ("npdr", "2", "train", "10"),
            "im/x.png": ("npdr", "3", "valid", "P7"),
            "y.PNG": ("healthy", "0", "test", "P8"),
        }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "an empty file"),
        ("image\na.jpg\n", "column label or grade .*found image"),
        ("image,label\na.jpg\n", "2 columns in t.csv line 2"),
        ("image,label\na.jpg,\n", "empty cell"),
        ("image,label,split\na.jpg,0,dev7\n", "got 'dev7'"),
        ("image,label\na.jpg,0\na.jpg,2\n", "listed twice"),
        ("image,label\nb.jpg,0\n", "do not exist"),
        ('image,label\n"a.jpg,0\n' + "x" * 150_000, "a table in .*t.csv, but line .*field"),
    ],
)
def test_csv_mistakes(tmp_path: Path, text: str, words: str) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_source(tmp_path / "t.csv")


def test_two_tables_are_ambiguous(tmp_path: Path) -> None:
    touch(tmp_path, "a.csv", "b.csv")
    with pytest.raises(InputError, match=r"a.csv, b.csv: name the file"):
        read_source(tmp_path)


def test_text_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"image,label\n\xff.jpg,0\n")
    with pytest.raises(InputError, match="UTF-8"):
        read_source(tmp_path / "t.csv")


# ---- folders -----------------------------------------------------------------------------------------------------


def test_folders_with_and_without_splits(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "a/training/cat/1.jpg",
        "a/val/cat/2.JPG",
        "a/val/dog/deep/3.png",
        "a/.git/x.jpg",
        "b/0/1.jpg",
        "b/2/2.jpg",
    )
    listing = read_source(tmp_path / "a")
    assert listing.layout == "folder"
    assert labels(listing) == {("train", "cat"): 1, ("valid", "cat"): 1, ("valid", "dog"): 1}
    assert labels(read_source(tmp_path / "b")) == {(None, "healthy"): 1, (None, "npdr"): 1}  # folders named by grade
    mapped = read_source(tmp_path / "a", classes="pet=cat,dog")
    assert labels(mapped) == {("train", "pet"): 1, ("valid", "pet"): 2}


def test_folder_mistakes(tmp_path: Path) -> None:
    touch(tmp_path, "mixed/train/a/1.jpg", "mixed/other/a/1.jpg", "flat/1.jpg", "odd/mild npdr/1.jpg", "ok/a/1.jpg")
    (tmp_path / "empty").mkdir()
    for name, words in {
        "mixed": "train beside other",
        "flat": "directly in it",
        "odd": "'mild npdr'",
        "empty": "found none",
        "absent": "does not exist",
    }.items():
        with pytest.raises(InputError, match=words):
            read_source(tmp_path / name)
    assert len(read_source(tmp_path / "odd", classes='npdr="mild npdr"').photographs) == 1
    with pytest.raises(InputError, match=r"--classes names 'b', but the labels under .* are a"):
        read_source(tmp_path / "ok", classes="x=a,b")
    with pytest.raises(InputError, match="layout of auto, ddr"):
        read_source(tmp_path / "ok", layout="zip")


# ---- patients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("eyepacs-10009_left.jpg", "eyepacs-10009"),
        ("10009_right.jpeg", "10009"),
        ("odir-1034_Left.jpg", "odir-1034"),
        ("IM-7-R.png", "IM-7"),
        ("case 3 OS.tif", "case 3"),
        ("folder/4_l.png", "4"),
        ("idrid-tr_IDRiD_013.jpg", "idrid-tr_IDRiD_013"),
        ("hrf-01_h.jpg", "hrf-01_h"),
        ("bright.jpg", "bright"),
        ("_left.jpg", "_left"),
        ("v1.5_left", "v1.5"),
    ],
)
def test_patient_key(name: str, patient: str) -> None:
    assert patient_key(name) == patient


def listed(patients: list[int], label: str = "a") -> list[Photograph]:
    return [Photograph(Path(), f"{label}{i}", "0", None, str(p), label) for i, p in enumerate(patients)]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=120))
def test_a_made_split_keeps_patients_together_whatever_the_order(patients: list[int]) -> None:
    photographs = listed(patients)
    splits = assign_splits(photographs)
    side = dict(zip(patients, splits, strict=True))
    assert all(side[patient] == split for patient, split in zip(patients, splits, strict=True))
    again = assign_splits(photographs[::-1])[::-1]
    assert again == splits


def test_a_made_split_has_the_asked_shares_in_every_class() -> None:
    photographs = listed(list(range(200))) + listed([i // 2 + 500 for i in range(100)], "b")
    splits = assign_splits(photographs)
    for label, total in (("a", 200), ("b", 100)):
        counts = Counter(split for p, split in zip(photographs, splits, strict=True) if p.label == label)
        for split, share in (("train", 0.5), ("valid", 0.2), ("test", 0.3)):
            assert abs(counts[split] - share * total) <= 2
    assert set(assign_splits(listed([1, 2, 3]))) == {"train", "valid", "test"}
    assert set(assign_splits(photographs, (0.8, 0.2, 0.0))) == {"train", "valid"}
    with pytest.raises(InputError, match="add up to 1"):
        assign_splits(photographs, (0.8, 0.3, 0.0))
    with pytest.raises(InputError, match="add up to 1"):
        assign_splits(photographs, (0.5, 0.5, float("nan")))


def test_leaks_keep_the_most_held_out_side() -> None:
    photographs = [
        replace(p, split=split)
        for p, split in zip(
            listed([1, 1, 1, 2, 2, 3]), ["train", "valid", "test", "train", "valid", "test"], strict=True
        )
    ]
    leaks = find_leaks(photographs)
    assert [(leak.patient, leak.splits, leak.dropped) for leak in leaks] == [
        ("1", ("test", "valid", "train"), ("a0", "a1")),
        ("2", ("valid", "train"), ("a3",)),
    ]
