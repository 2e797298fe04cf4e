"""A filled-in reading form against its key: how well a person told generated images from photographs."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from retinar.engine.errors import InputError
from retinar.engine.metrics.discrimination import wilson
from retinar.report.reading import GENERATED, KEY_COLUMNS, QUESTIONS, REAL

WORDS = {
    REAL: ("real", "r", "photo", "photograph", "true"),
    GENERATED: ("generated", "g", "fake", "f", "synthetic", "s", "artificial", "ai"),
}


@dataclass(frozen=True)
class Answer:
    """One image: what it was, and what the reader said (``said`` and ``grade`` may be empty)."""

    number: int
    source: str
    label: str
    said: str
    confidence: float | None
    grade: str


def score_reading(form: Path | str, key: Path | str) -> dict[str, object]:
    """Figures of a reading as plain values.

    ``accuracy`` is the share of right answers (0.5 is guessing), ``sensitivity`` of generated images seen through,
    ``specificity`` of photographs recognised, ``grading`` of grades that agree with the label, by source; each as
    {"n", "right", "share", "interval"} with Wilson's 95 % interval, over the answered lines (``unanswered`` counts the
    others). ``by_class`` has the accuracy of each class; ``confidence`` the mean where right and where wrong. Raises
    InputError for files that are no form and key of one reading.
    """
    answers = read_answers(Path(form), Path(key))
    told = [answer for answer in answers if answer.said]
    if not told:
        raise InputError(f"Expected answers in the column {QUESTIONS[1]!r} of {form}, found none: fill in the form.")
    found: dict[str, object] = {
        "form": str(form),
        "key": str(key),
        "images": len(answers),
        "unanswered": len(answers) - len(told),
        "accuracy": share(told, _right),
        "sensitivity": share([each for each in told if each.source == GENERATED], _right),
        "specificity": share([each for each in told if each.source == REAL], _right),
        "by_class": {
            label: share([each for each in told if each.label == label], _right)
            for label in sorted({each.label for each in answers})
        },
    }
    graded = [answer for answer in answers if answer.grade]
    if graded:
        found["grading"] = {
            source: share([each for each in graded if each.source == source], _graded) for source in (REAL, GENERATED)
        }
    sure = [(_right(answer), answer.confidence) for answer in told if answer.confidence is not None]
    if sure:
        found["confidence"] = {
            name: _mean(value for good, value in sure if good is right)
            for name, right in (("where right", True), ("where wrong", False))
        }
    return found


def share(answers: Iterable[Answer], right: Callable[[Answer], bool]) -> dict[str, object]:
    """{"n", "right", "share", "interval"}; the last two None where there is nothing."""
    found = [right(answer) for answer in answers]
    if not found:
        return {"n": 0, "right": 0, "share": None, "interval": None}
    return {
        "n": len(found),
        "right": sum(found),
        "share": sum(found) / len(found),
        "interval": list(wilson(sum(found), len(found))),
    }


def _right(answer: Answer) -> bool:
    return answer.said == answer.source


def _graded(answer: Answer) -> bool:
    return answer.grade.casefold() == answer.label.casefold()


def _mean(values: Iterable[float]) -> float | None:
    every = list(values)
    return sum(every) / len(every) if every else None


def read_answers(form: Path, key: Path) -> list[Answer]:
    """The lines of the key with what the form says to them."""
    rows = _table(key, KEY_COLUMNS, "the key of a reading")
    said = _table(form, QUESTIONS[:2], "a reading's form")
    for number in said:
        if number not in rows:
            raise InputError(f"Expected numbers of {key} in {form}, found {number}: give the key of the same reading.")
    answers = []
    for number, row in rows.items():
        if row["source"] not in WORDS:
            raise InputError(f"Expected real or generated as the source of {number} in {key}, found {row['source']!r}.")
        line = said.get(number, {})
        answers.append(
            Answer(
                number,
                row["source"],
                row["label"],
                _word(line.get(QUESTIONS[1], ""), number, form),
                _confidence(line.get(QUESTIONS[2], ""), number, form),
                line.get(QUESTIONS[3], ""),
            )
        )
    return answers


def _table(path: Path, columns: Iterable[str], what: str) -> dict[int, Mapping[str, str]]:
    """Rows by their number. Spreadsheets of some countries part columns with semicolons, and some put a mark first."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            head = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=head.count)
            rows = [
                {_clean(name): _clean(cell) for name, cell in row.items()}
                for row in csv.DictReader(file, delimiter=delimiter)
            ]
    except FileNotFoundError as error:
        raise InputError(f"Expected {what} at {path}, found nothing: check the path.") from error
    except (csv.Error, ValueError) as error:
        raise InputError(f"Expected {what} at {path}, found no table ({error}): save it as CSV.") from error
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        raise InputError(f"Expected {what} at {path}, found no column {missing[0]!r}: give the file that was written.")
    found: dict[int, Mapping[str, str]] = {}
    for row in rows:
        if not any(row.values()):
            continue
        if not row["number"].isdecimal():
            raise InputError(f"Expected a number in every line of {path}, found {row['number']!r}: put it right.")
        number = int(row["number"])
        if number in found:
            raise InputError(f"Expected every number once in {path}, found {number} twice: remove one line.")
        found[number] = row
    return found


def _clean(cell: object) -> str:
    return cell.strip() if isinstance(cell, str) else ""


def _word(text: str, number: int, form: Path) -> str:
    for source, words in WORDS.items():
        if text.casefold() in words:
            return source
    if text:
        raise InputError(f"Expected real or generated at number {number} of {form}, found {text!r}: write one of them.")
    return ""


def _confidence(text: str, number: int, form: Path) -> float | None:
    try:
        value = float(text.replace(",", ".")) if text else None
    except ValueError:
        value = -1.0
    if value is not None and not 1 <= value <= 5:
        raise InputError(f"Expected a confidence of 1 to 5 at number {number} of {form}, found {text!r}: put it right.")
    return value
