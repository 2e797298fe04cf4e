"""The manifest of a prepared folder, and the journal that stands in for it while work is under way.

``manifest.jsonl`` exists exactly when the folder is complete: it names every file with its digest. A preparation that
changes anything first turns the manifest into ``.journal.jsonl`` (what is planned, and what is already done), appends
a line per finished file, and ends by writing the manifest and removing the journal. A killed run leaves a journal; the
next one goes on from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from retinar.engine.errors import InputError
from retinar.engine.files import write_text

MANIFEST = "manifest.jsonl"
SKIPPED = "skipped.jsonl"
DUPLICATES = "duplicates.jsonl"
JOURNAL = ".journal.jsonl"


@dataclass(frozen=True)
class Record:
    """One prepared photograph: a line of the manifest."""

    file: str  # POSIX path under the prepared folder: split/class/name.png
    source: str  # POSIX path under the source folder
    label: str  # the class
    grade: str  # the source's own label
    split: str
    patient: str
    size: int  # pixels on a side
    sha256: str  # of the PNG file
    source_sha256: str
    source_size: tuple[int, int]  # (width, height), upright
    upsampled: bool
    signature: str  # for near-duplicates, see duplicates.py
    rule: int  # photographs.RULE at the time


@dataclass(frozen=True)
class Skip:
    """One listed photograph that could not be used: a line of skipped.jsonl."""

    source: str
    label: str | None
    grade: str
    split: str | None
    reason: str
    source_sha256: str | None  # None when the file could not be read at all
    rule: int


def read_manifest(folder: Path | str) -> list[Record]:
    """The records of a complete prepared folder, by file. Raises InputError when absent, unfinished or damaged."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / JOURNAL).is_file():
            raise InputError(f"the preparation of {folder} was interrupted: run the same retinar prepare again")
        raise InputError(f"expected a prepared folder with {MANIFEST}, found none in {folder}: run retinar prepare")
    return [_record(line, path, number) for number, line in enumerate(_lines(path), 1)]


def read_skipped(folder: Path | str) -> list[Skip]:
    """The lines of skipped.jsonl; none when the file is absent or damaged (it is rewritten by every preparation)."""
    path = Path(folder) / SKIPPED
    try:
        return [_skip(json.loads(line)) for line in _lines(path)]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def read_state(folder: Path | str) -> tuple[dict[str, Record | None], bool]:
    """What an earlier run left: file -> its record, or None when it was only planned; and whether the run ended.

    A torn last line of the journal (the run was killed while writing it) is left out.
    """
    folder = Path(folder)
    state: dict[str, Record | None] = {}
    finished = (folder / MANIFEST).is_file() and not (folder / JOURNAL).exists()
    if (folder / MANIFEST).is_file():
        state = {record.file: record for record in read_manifest(folder)}
    journal = folder / JOURNAL
    if journal.is_file():
        lines = _lines(journal)
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
                state[value["file"]] = None if value.get("planned") else _make(value)
            except (ValueError, TypeError, KeyError) as error:
                if number < len(lines):
                    raise InputError(
                        f"line {number} of {journal} is damaged: remove {folder} and prepare it again"
                    ) from error
    return state, finished


def write_manifest(folder: Path | str, records: Iterable[Record]) -> None:
    """Write manifest.jsonl sorted by file, atomically, unless it already says the same."""
    ordered = sorted(records, key=lambda record: record.file)
    write_lines(Path(folder) / MANIFEST, (asdict(record) for record in ordered))


def write_lines(path: Path, values: Iterable[Mapping[str, object]]) -> None:
    """Write JSON lines atomically; a file that already has this text is left untouched.

    ASCII only: file names that are not UTF-8 survive the round trip as escapes.
    """
    text = "".join(json.dumps(value) + "\n" for value in values)
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)


class Journal:
    """Append-only record of the work under way; opening it retires the manifest.

    Lines are flushed one by one but not forced to the disk: after a power cut a record may be lost (its file is then
    made again) or name a file that was not stored (the digest then tells).
    """

    def __init__(self, folder: Path, done: Iterable[Record], planned: Iterable[str]) -> None:
        done = list(done)
        known = {record.file for record in done}
        values: list[Mapping[str, object]] = [{"file": file, "planned": True} for file in planned if file not in known]
        self.path = folder / JOURNAL
        write_lines(self.path, [*values, *(asdict(record) for record in done)])
        (folder / MANIFEST).unlink(missing_ok=True)
        self._handle = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()

    def add(self, record: Record) -> None:
        """Note a finished file."""
        self._handle.write(json.dumps(asdict(record)) + "\n")
        self._handle.flush()

    def close(self, records: Iterable[Record]) -> None:
        """The folder is complete: write the manifest, remove the journal."""
        write_manifest(self.path.parent, records)
        self._handle.close()
        self.path.unlink()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _make(value: dict[str, Any]) -> Record:
    width, height = value["source_size"]
    return Record(**{f.name: value[f.name] for f in fields(Record)} | {"source_size": (width, height)})


def _skip(value: dict[str, Any]) -> Skip:
    return Skip(**{f.name: value[f.name] for f in fields(Skip)})


def _record(line: str, path: Path, number: int) -> Record:
    try:
        return _make(json.loads(line))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"line {number} of {path} is not a line of a manifest: run retinar prepare into a new folder"
        ) from error
