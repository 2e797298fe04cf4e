"""What a preparation has to make, and what an earlier one has already made."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from retinar.engine.errors import InputError
from retinar.engine.files import sha256_file
from retinar.engine.progress import Progress
from retinar.train.data.listing import SPLITS, SUFFIXES, Photograph
from retinar.train.data.manifest import Record, Skip, read_skipped, read_state
from retinar.train.data.photographs import RULE
from retinar.train.data.pool import parallel


@dataclass
class Plan:
    """Output file -> its photograph, and what is known of it so far: made, or skipped for a reason."""

    photographs: dict[str, Photograph]
    records: dict[str, Record] = field(default_factory=dict)
    skips: dict[str, Skip] = field(default_factory=dict)

    def todo(self) -> list[str]:
        """Output files neither made nor skipped."""
        return [file for file in self.photographs if file not in self.records and file not in self.skips]


class Check(NamedTuple):
    """What an earlier run settled: unchanged when both digests still hold (no target: the photograph was skipped)."""

    path: str
    source_sha256: str | None
    target: str | None = None
    sha256: str | None = None


def name_outputs(photographs: Sequence[Photograph]) -> dict[str, Photograph]:
    """split/class/stem.png; photographs that share it (also where case is ignored) get a digest of their source."""
    groups: dict[str, list[tuple[str, Photograph]]] = defaultdict(list)
    for p in photographs:
        base = f"{p.split}/{p.label}/{PurePosixPath(p.source).stem}"
        groups[base.lower()].append((base, p))
    named = {}
    for group in groups.values():
        for base, p in group:
            digest = hashlib.sha256(p.source.encode("utf-8", "surrogateescape")).hexdigest()[:8]
            named[f"{base}-{digest}.png" if len(group) > 1 else f"{base}.png"] = p
    return dict(sorted(named.items()))


def read_earlier(out: Path, plan: Plan) -> tuple[dict[str, Record | None], bool]:
    """What an earlier run left in ``out``, as manifest.read_state; InputError when the folder holds something else."""
    if not out.is_dir():
        return {}, False
    state, finished = read_state(out)
    strangers = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
    if not state and not finished and strangers:
        found = ", ".join(strangers[:3])
        raise InputError(f"expected an empty or prepared folder, found {found} in {out}: choose another output folder")
    if state and not state.keys() & plan.photographs.keys():
        raise InputError(f"{out} was prepared from other photographs: choose another output folder, or remove it")
    for split in SPLITS:
        for path in sorted((out / split).glob("*/[!.]*")):
            file = path.relative_to(out).as_posix()
            if path.name.lower().endswith(SUFFIXES) and file not in state and file not in plan.photographs:
                raise InputError(f"{path} is not of an earlier preparation: move it away or choose another folder")
    return state, finished


def reuse(plan: Plan, state: dict[str, Record | None], out: Path, size: int, workers: int, progress: Progress) -> None:
    """Fill the plan with what still holds: same source bytes, same result bytes, same size and rule."""
    skips = {skip.source: skip for skip in read_skipped(out)}
    checks: dict[str, Check] = {}
    for file, p in plan.photographs.items():
        record, skip = state.get(file), skips.get(p.source)
        if record is not None and (record.size, record.rule) == (size, RULE):
            checks[file] = Check(str(p.path), record.source_sha256, str(out / file), record.sha256)
        elif skip is not None and skip.rule == RULE:
            checks[file] = Check(str(p.path), skip.source_sha256)
    if not checks:
        return
    with progress("checking", len(checks)) as bar, closing(parallel(unchanged, checks, workers)) as results:
        for file, holds in results:
            bar.advance()
            if not holds:
                continue
            p, record = plan.photographs[file], state.get(file)
            if checks[file].target is not None and record is not None and p.split is not None and p.label is not None:
                plan.records[file] = replace(
                    record, source=p.source, grade=p.grade, split=p.split, label=p.label, patient=p.patient
                )
            else:
                plan.skips[file] = replace(skips[p.source], grade=p.grade, split=p.split, label=p.label)


def unchanged(check: Check) -> bool:
    """Worker: whether source and result are still the bytes of the earlier run."""
    if _digest(check.path) != check.source_sha256:
        return False
    return check.target is None or _digest(check.target) == check.sha256


def _digest(path: str) -> str | None:
    try:
        return sha256_file(path)
    except OSError:
        return None
