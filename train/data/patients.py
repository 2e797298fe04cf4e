"""Patients: who a photograph belongs to, splits that keep a patient on one side, and given splits that do not."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

from retinar.engine.errors import InputError
from retinar.train.data.listing import SUFFIXES

OIA_DDR_FRACTIONS = (0.5, 0.2, 0.3)
"""train, valid, test: the proportions of OIA-DDR's own split (3,133 / 1,253 / 1,880 healthy)."""

# Left and right, or oculus sinister and dexter, at the end of a name: EyePACS, ODIR, most clinics' exports.
_EYE = re.compile(r"[_\- ](left|right|l|r|os|od)$", re.IGNORECASE)
# A split that cannot keep a patient whole gives up training photographs before it weakens the test.
_KEEP_ORDER = {"test": 0, "valid": 1, "train": 2}


class HasPatient(Protocol):
    """What these functions need of a photograph."""

    @property
    def patient(self) -> str: ...
    @property
    def label(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...
    @property
    def source(self) -> str: ...


def patient_key(name: str) -> str:
    """The patient by a file's name: the stem without its eye; ``eyepacs-10009_left.jpg`` -> ``eyepacs-10009``."""
    path = PurePosixPath(name)
    stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
    return _EYE.sub("", stem) or stem


def assign_splits(
    photographs: Sequence[HasPatient], fractions: tuple[float, float, float] = OIA_DDR_FRACTIONS
) -> list[str]:
    """A split for each photograph; a patient's photographs stay together.

    Patients are dealt out in the order of a digest of their key, each to the split that is furthest behind its share;
    patients with the same classes are dealt together, so that every split sees every class. The same photographs give
    the same split on any machine.
    """
    if not (all(fraction >= 0 for fraction in fractions) and abs(sum(fractions) - 1) <= 1e-6):  # NaN too
        raise InputError(f"expected three fractions (train, valid, test) that add up to 1, got {fractions}")
    of_patient: dict[str, list[int]] = defaultdict(list)
    for index, photograph in enumerate(photographs):
        of_patient[photograph.patient].append(index)
    strata: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for patient, indices in of_patient.items():
        strata[tuple(sorted({photographs[index].label or "" for index in indices}))].append(patient)
    splits = ["train"] * len(photographs)
    for stratum in strata.values():
        total, dealt = 0, dict.fromkeys(_KEEP_ORDER, 0)
        for patient in sorted(stratum, key=lambda key: (hashlib.sha256(key.encode("utf-8", "replace")).digest(), key)):
            indices = of_patient[patient]
            total += len(indices)
            share = dict(zip(("train", "valid", "test"), fractions, strict=True))
            split = max(("train", "valid", "test"), key=lambda name: share[name] * total - dealt[name])
            dealt[split] += len(indices)
            for index in indices:
                splits[index] = split
    return splits


class Leak(NamedTuple):
    """A patient with photographs in several splits of a given division."""

    patient: str
    splits: tuple[str, ...]
    sources: tuple[str, ...]
    dropped: tuple[str, ...]  # the sources that drop_leaks removes


def find_leaks(photographs: Sequence[HasPatient]) -> list[Leak]:
    """Patients on more than one side, by key. Dropping keeps the most held-out side: test, then valid, then train."""
    of_patient: dict[str, list[HasPatient]] = defaultdict(list)
    for photograph in photographs:
        of_patient[photograph.patient].append(photograph)
    leaks = []
    for patient, group in sorted(of_patient.items()):
        splits = sorted({p.split or "" for p in group}, key=lambda split: _KEEP_ORDER.get(split, 3))
        if len(splits) > 1:
            dropped = tuple(p.source for p in group if p.split != splits[0])
            leaks.append(Leak(patient, tuple(splits), tuple(p.source for p in group), dropped))
    return leaks
