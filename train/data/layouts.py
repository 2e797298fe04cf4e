"""Where photographs, grades and splits are found: OIA-DDR's layout, image folders, and tables (CSV).

Every layout becomes the same list of photographs; nothing is decoded here.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retinar.engine.errors import InputError
from retinar.train.data.classes import parse_classes
from retinar.train.data.listing import SPLIT_NAMES, SPLITS, SUFFIXES, Listing, Photograph, with_classes
from retinar.train.data.patients import patient_key

LAYOUTS = ("auto", "ddr", "folder", "csv")

# Columns of a table, in order of preference; image/level are EyePACS's names, id_code/diagnosis APTOS's.
PATH_COLUMNS = ("path", "image", "file", "filename", "image_path", "id_code", "name")
LABEL_COLUMNS = ("label", "grade", "class", "level", "diagnosis")
SPLIT_COLUMNS = ("split", "set", "subset")
PATIENT_COLUMNS = ("patient", "patient_id")


def read_source(
    src: Path | str, *, layout: str = "auto", classes: str | None = None, skip_missing: bool = False
) -> Listing:
    """List the photographs under ``src`` with their classes.

    ``classes`` is a mapping such as ``"healthy=0 npdr=2,3"``. None takes that default where the source is graded
    0 to 5, and every label as its own class where labels are names. Raises InputError for anything a person has to
    decide: absent or empty folders, unknown grades or labels, conflicting lines, listed photographs that do not exist
    (kept in ``missing`` with ``skip_missing``).
    """
    src = Path(src)
    if not src.exists():
        raise InputError(f"expected a folder of photographs or a CSV file, but {src} does not exist: check the path")
    if layout not in LAYOUTS:
        raise InputError(f"expected a layout of {', '.join(LAYOUTS)}, got {layout!r}: choose one of them")
    if classes is not None:
        parse_classes(classes)  # a mistake in the mapping is told before anything about files
    chosen = _detect(src) if layout == "auto" else layout
    unlisted = 0
    if chosen == "ddr":
        found, unlisted = _read_ddr(src)
    elif chosen == "csv":
        found = _read_csv(_only_table(src))
    else:
        found = _read_folder(src)
    if not found:
        raise InputError(f"expected photographs ({', '.join(SUFFIXES)}) under {src}, found none: check the path")
    photographs = [photograph for photograph, _ in found.values()]
    missing = [photograph for photograph, exists in found.values() if not exists]
    if missing and not skip_missing:
        names = ", ".join(photograph.source for photograph in missing[:3])
        raise InputError(
            f"{len(missing)} of {len(photographs)} listed photographs do not exist under {src} ({names}"
            f"{', ...' if len(missing) > 3 else ''}): restore them, or leave them out with --skip-missing"
        )
    return with_classes(chosen, photographs, missing, classes, unlisted, src)


# ---- detection ---------------------------------------------------------------------------------------------------


def _detect(src: Path) -> str:
    if src.is_file():
        return "csv"
    if any(True for _ in _grade_files(src)):
        return "ddr"
    if any(src.glob("*.csv")):
        return "csv"
    return "folder"


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """A folder's entries without hidden ones, by name."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _is_photograph(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


# ---- OIA-DDR -----------------------------------------------------------------------------------------------------

Found = dict[str, tuple[Photograph, bool]]  # source -> (photograph, whether the file exists)


def _grade_files(src: Path) -> Iterator[tuple[str, Path, Path]]:
    """(split, grade file, folder of photographs); ``src`` is DR_grading or its parent."""
    for root in (src, src / "DR_grading"):
        found = False
        for split in SPLITS:
            for path in (root / f"{split}.txt", root / split / f"{split}.txt"):
                if path.is_file():
                    found = True
                    yield split, path, root / split
                    break
        if found:
            return


def _read_ddr(src: Path) -> tuple[Found, int]:
    files = list(_grade_files(src)) if src.is_dir() else []
    if not files:
        raise InputError(
            f"expected OIA-DDR's grade files (train.txt, valid.txt, test.txt with lines NAME GRADE) in {src}, "
            "found none: give the folder DR_grading, or another --layout"
        )
    root = files[0][2].parent
    for split in SPLITS:
        folder = root / split
        if split not in {name for name, _, _ in files} and folder.is_dir() and any(_photographs_in(folder)):
            raise InputError(f"{folder} holds photographs, but the grade file {split}.txt is missing: add it")
    found: Found = {}
    unlisted = 0
    for split, path, folder in files:
        present = {entry.name for entry in _visible(folder)} if folder.is_dir() else set()
        listed = set()
        for number, line in enumerate(_read_text(path).splitlines(), 1):
            if not line.strip():
                continue
            name, grade = _name_and_grade(line, path, number)
            listed.add(name)
            source = (folder / name).relative_to(src).as_posix()
            exists = name in present or ("/" in name and (folder / name).exists())
            photograph = Photograph(folder / name, source, grade, split, patient_key(name))
            _add(found, photograph, exists, f"{path.name} line {number}")
        unlisted += sum(_is_photograph(name) for name in present - listed)
    return found, unlisted


def _name_and_grade(line: str, path: Path, number: int) -> tuple[str, str]:
    parts = line.rsplit(maxsplit=1)
    if len(parts) != 2:
        raise InputError(f"expected 'NAME GRADE' in line {number} of {path}, got {line.strip()!r}: correct the line")
    return parts[0].strip(), _normal(parts[1])


def _add(found: Found, photograph: Photograph, exists: bool, where: str) -> None:
    """Add a listed photograph; the same line twice is harmless, two different ones are for a person to settle."""
    earlier = found.get(photograph.source)
    if earlier is not None and earlier[0] != photograph:
        a, b = (f"{p.grade}{f' in {p.split}' if p.split else ''}" for p in (earlier[0], photograph))
        raise InputError(f"{photograph.source} is listed twice, as {a} and as {b} ({where}): keep one of the lines")
    found[photograph.source] = photograph, exists


def _normal(label: str) -> str:
    """'2.0' (spreadsheets write it) is grade '2'; every other label stays as it is."""
    label = label.strip()
    return label[:-2] if label.endswith(".0") and label[:-2].isdigit() else label


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8 text in {path}, found byte {error.start} that is not: re-save it") from error


# ---- tables ------------------------------------------------------------------------------------------------------


def _only_table(src: Path) -> Path:
    if src.is_file():
        return src
    tables = sorted(src.glob("*.csv"))
    if len(tables) != 1:
        names = ", ".join(table.name for table in tables) or "none"
        raise InputError(f"expected one CSV file in {src}, found {names}: name the file itself")
    return tables[0]


def _read_csv(path: Path) -> Found:
    text = _read_text(path)
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows = _rows(reader, path)
    names = [name.strip().lower() for name in next(rows, [])]
    path_column = _column(names, PATH_COLUMNS, path, "path or image")
    label_column = _column(names, LABEL_COLUMNS, path, "label or grade")
    split_column = next((names.index(name) for name in SPLIT_COLUMNS if name in names), None)
    patient_column = next((names.index(name) for name in PATIENT_COLUMNS if name in names), None)
    found: Found = {}
    for row in rows:
        where = f"{path.name} line {reader.line_num}"
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(names):
            raise InputError(f"expected {len(names)} columns in {where}, got {len(row)}: correct the line")
        name, grade = row[path_column].strip(), _normal(row[label_column])
        if not name or not grade:
            raise InputError(f"expected a path and a label in {where}, got an empty cell: fill it or remove the line")
        split = None
        if split_column is not None:
            split = SPLIT_NAMES.get(row[split_column].strip().lower())
            if split is None:
                raise InputError(f"expected train, valid or test as split in {where}, got {row[split_column]!r}")
        file, exists = _with_suffix(path.parent / name)
        source = Path(os.path.relpath(file, path.parent)).as_posix()
        patient = row[patient_column].strip() if patient_column is not None else ""
        _add(found, Photograph(file, source, grade, split, patient or patient_key(file.name)), exists, where)
    return found


def _rows(reader: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise InputError(
            f"expected a table in {path}, but line {reader.line_num + 1} is none ({error}): re-save it"
        ) from error


def _column(names: list[str], accepted: tuple[str, ...], path: Path, what: str) -> int:
    for name in accepted:
        if name in names:
            return names.index(name)
    raise InputError(f"expected a column {what} in {path}, found {', '.join(names) or 'an empty file'}: add a header")


def _with_suffix(path: Path) -> tuple[Path, bool]:
    """The file that a cell names; tables such as EyePACS's leave the suffix out."""
    if path.exists():
        return path, True
    for suffix in (suffix for s in SUFFIXES for suffix in (s, s.upper())):
        candidate = path.with_name(path.name + suffix)
        if candidate.exists():
            return candidate, True
    return path, False


# ---- image folders -----------------------------------------------------------------------------------------------


def _read_folder(src: Path) -> Found:
    """``src/{split}/{class}/*`` when the subfolders are splits, else ``src/{class}/*``; class folders may be nested."""
    if not src.is_dir():
        raise InputError(f"expected a folder of class folders, but {src} is a file: use --layout csv for a table")
    folders = [entry for entry in _visible(src) if entry.is_dir()]
    splits = {entry.name: SPLIT_NAMES[entry.name.lower()] for entry in folders if entry.name.lower() in SPLIT_NAMES}
    if splits and len(splits) < len(folders):
        others = ", ".join(entry.name for entry in folders if entry.name not in splits)
        raise InputError(f"expected either splits or classes in {src}, found {', '.join(splits)} beside {others}")
    roots: list[tuple[Path, str | None]] = [(src / name, split) for name, split in splits.items()] or [(src, None)]
    found: Found = {}
    for root, split in roots:
        if any(entry.is_file() and _is_photograph(entry.name) for entry in _visible(root)):
            raise InputError(
                f"expected one folder per class in {root}, found photographs directly in it: sort them into class "
                "folders, or list them in a CSV with columns path and label"
            )
        for label in (entry.name for entry in _visible(root) if entry.is_dir()):
            for path in _photographs_in(root / label):
                source = path.relative_to(src).as_posix()
                found[source] = Photograph(path, source, label, split, patient_key(path.name)), True
    return found


def _photographs_in(folder: Path) -> Iterable[Path]:
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _photographs_in(folder / entry.name)
        elif _is_photograph(entry.name):
            yield folder / entry.name
