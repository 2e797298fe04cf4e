"""Where photographs come from, and how much of a label the source alone gives away.

Photographs of one class often come from other cameras and hospitals than those of another. A classifier may then read
the camera and still look good. Nothing in a score tells; the sources do, where they are known.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np

from retinar.engine.metrics.folders import EXTENSIONS

MANIFEST = "manifest.jsonl"
SPLITS_ABOVE = 3
"""How far above a photograph a manifest is looked for: its class, its split, the prepared folder."""
FILES_PER_SOURCE = 5
TIED_P = 0.01
TIED_V = 0.1
"""Label and source count as tied from this Cramer's V on, where chance is less likely than TIED_P to give it."""


@dataclass(frozen=True)
class Origin:
    """Where a photograph comes from: ``source`` None where nothing tells, ``patient`` the file where nothing does."""

    source: str | None
    patient: str


def read_origins(files: Sequence[Path], labels: Sequence[str] = ()) -> list[Origin]:
    """Source and patient of every file, from the ``manifest.jsonl`` of a prepared folder and from file names.

    The source is the manifest's ``source`` where that is a name, else what stands before the first ``-`` or ``_`` of
    the original file's name (the manifest's ``source`` where that is a path, else the file itself): ``eyepacs`` of
    ``eyepacs-10_left.jpg``. A class among ``labels`` is no source. With more than one prefix in FILES_PER_SOURCE files
    they number patients or pictures, and no source is known: give all files at once.
    """
    records = _manifests(files)
    found = []
    for path in files:
        record = records.get(path.resolve(), {})
        original = record.get("source") or path.name
        suffix = PurePosixPath(original).suffix.lower()
        source = _prefix(PurePosixPath(original).stem, labels) if suffix in EXTENSIONS else original
        found.append(Origin(source, record.get("patient") or str(path.resolve())))
    if len({origin.source for origin in found}) > max(2, len(found) // FILES_PER_SOURCE):
        return [Origin(None, origin.patient) for origin in found]
    return found


def _prefix(stem: str, labels: Sequence[str]) -> str | None:
    head, separator, _ = stem.partition(re.findall(r"[-_]|$", stem)[0] or "-")
    return head if separator and head and head.lower() not in {label.lower() for label in labels} else None


def _manifests(files: Iterable[Path]) -> dict[Path, dict[str, str]]:
    """Resolved file -> the text fields of its line in a manifest above it; lines that cannot be read are left out."""
    folders = {folder for path in files for folder in list(path.resolve().parents)[:SPLITS_ABOVE]}
    found: dict[Path, dict[str, str]] = {}
    for folder in sorted(folders):
        try:
            lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        for line in lines:
            try:
                record = json.loads(line)
                found[folder / record["file"]] = {key: text for key, text in record.items() if isinstance(text, str)}
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
    return found


@dataclass(frozen=True)
class Tie:
    """How label and source hang together: ``counts`` by source and label, over the photographs a classifier sees.

    ``association`` is Cramer's V (0 independent, 1 one decides the other), ``p`` the chance of as much without a tie
    (chi-squared), ``single`` the sources that hold one class alone, with that class.
    """

    counts: dict[str, dict[str, int]]
    association: float
    p: float

    @property
    def single(self) -> dict[str, str]:
        held = {source: [label for label, n in row.items() if n] for source, row in self.counts.items()}
        return {source: labels[0] for source, labels in held.items() if len(labels) == 1}

    @property
    def both(self) -> list[str]:
        """The sources that hold every class: what a classifier gains within one, it does not gain from the source."""
        return [source for source, row in self.counts.items() if all(row.values())]

    @property
    def tied(self) -> bool:
        return self.association >= TIED_V and self.p < TIED_P


def tie(sources: Sequence[str | None], labels: Sequence[str]) -> Tie | None:
    """The tie of the photographs whose source is known; None for fewer than two sources or two labels."""
    known = [(source, label) for source, label in zip(sources, labels, strict=True) if source is not None]
    names, classes = (sorted(set(side)) for side in (zip(*known, strict=True) if known else ((), ())))
    if len(names) < 2 or len(classes) < 2:
        return None
    seen = Counter(known)
    counts = {source: {label: seen[source, label] for label in classes} for source in names}
    table = np.array([list(row.values()) for row in counts.values()], np.float64)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    rows, columns = table.shape
    association = (statistic / (table.sum() * (min(rows, columns) - 1))) ** 0.5
    return Tie(counts, association, _chi_squared_tail(statistic, (rows - 1) * (columns - 1)))


def _chi_squared_tail(statistic: float, freedom: int) -> float:
    from scipy.stats import chi2

    return float(chi2.sf(statistic, freedom))


def source_scores(
    train_sources: Sequence[str | None], train_classes: np.ndarray, test_sources: Sequence[str | None], classes: int
) -> np.ndarray:
    """fp64 [n_test, classes]: the shares of the classes in the training photographs of a test photograph's source.

    It is what a classifier can say that looks at no picture, and so the baseline of one that does. A source without
    training photographs has the shares of all of them. ``train_classes`` are class numbers.
    """
    of: dict[str | None, list[int]] = defaultdict(list)
    for source, number in zip(train_sources, train_classes, strict=True):
        of[source].append(int(number))
    everything = list(chain.from_iterable(of.values()))
    shares = {source: np.bincount(numbers, minlength=classes) / len(numbers) for source, numbers in of.items()}
    overall = np.bincount(everything, minlength=classes) / len(everything)
    return np.stack([shares.get(source, overall) for source in test_sources])


def tie_warning(found: Tie, auroc: float | None, n_test: Mapping[str, int]) -> str | None:
    """One sentence that names the sources where label and source are tied, None where they are not.

    ``auroc`` is that of ``source_scores`` on the test photographs, whose counts by class are ``n_test``.
    """
    if not found.tied:
        return None
    by_label: dict[str, list[str]] = defaultdict(list)
    for source, label in found.single.items():
        by_label[label].append(source)
    alone = "; ".join(f"{', '.join(sources)}: only {label}" for label, sources in sorted(by_label.items()))
    shares = "; ".join(
        f"{source}: " + ", ".join(f"{n} {label}" for label, n in row.items())
        for source, row in found.counts.items()
        if source not in found.single
    )
    counts = ", ".join(f"{n} {label}" for label, n in n_test.items())
    baseline = f"; knowing the source alone gives AUROC {auroc:.3f} on {counts}" if auroc is not None else ""
    advice = f"read the AUROC within {' and '.join(found.both)}" if found.both else "no source holds every class"
    held = "; ".join(part for part in (alone, shares) if part)
    return f"label and source are tied (Cramer's V {found.association:.2f}; {held}){baseline}: {advice}"
