"""``retinar prepare``: photographs of any layout -> square PNGs by split and class, with a manifest.

The work is planned first, then checked against what an earlier run left (by digests of source and result, never by
times), and only what is missing is made. The files are the same for any number of workers and after any interruption.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from retinar.engine.errors import InputError
from retinar.engine.progress import Progress, plain
from retinar.train.data import duplicates
from retinar.train.data.layouts import read_source
from retinar.train.data.listing import SPLITS, Listing, Photograph
from retinar.train.data.manifest import (
    DUPLICATES,
    SKIPPED,
    Journal,
    Record,
    Skip,
    write_lines,
    write_manifest,
)
from retinar.train.data.patients import OIA_DDR_FRACTIONS, Leak, assign_splits, find_leaks
from retinar.train.data.photographs import RULE, UnreadableError, square_rgb
from retinar.train.data.plan import Plan, name_outputs, read_earlier, reuse
from retinar.train.data.pool import default_workers, parallel

PNG_LEVEL = 4
"""zlib's level: 6 takes almost three times as long for 1 % smaller files."""

MISSING = "listed, but the file does not exist"


class Job(NamedTuple):
    """One photograph to make; everything a worker needs."""

    path: str
    target: str
    size: int


class Made(NamedTuple):
    """What a worker made, or the reason why it could not."""

    sha256: str = ""
    source_sha256: str | None = None
    source_size: tuple[int, int] = (0, 0)
    signature: str = ""
    reason: str | None = None


def prepare(
    src: Path | str,
    out: Path | str,
    *,
    layout: str = "auto",
    classes: str | None = None,
    size: int = 256,
    fractions: tuple[float, float, float] = OIA_DDR_FRACTIONS,
    workers: int | None = None,
    skip_missing: bool = False,
    drop_leaks: bool = False,
    progress: Progress = plain,
) -> dict[str, object]:
    """Prepare the photographs under ``src`` into ``out``; returns the summary that the command prints.

    ``out`` receives {split}/{class}/NAME.png (``size`` pixels on a side, RGB), manifest.jsonl, skipped.jsonl and
    duplicates.jsonl. ``fractions`` (train, valid, test) apply where the source has no split of its own; a given split
    is kept, and patients on several sides are reported (``drop_leaks`` removes them from the less held-out side).
    Raises InputError for bad input and OSError when ``out`` cannot be written.
    """
    start = time.monotonic()
    src, out = Path(src), Path(out)
    if not 8 <= size <= 4096:
        raise InputError(f"expected a size of 8 to 4096 pixels, got {size}: 256 is the paper's")
    if workers is not None and workers < 1:
        raise InputError(f"expected at least one worker, got {workers}")
    workers = workers or default_workers()
    _refuse_overlap(src, out)
    listing = read_source(src, layout=layout, classes=classes, skip_missing=skip_missing)
    photographs, leaks = _with_splits(listing, fractions, drop_leaks)
    plan = Plan(name_outputs(photographs))
    state, finished = read_earlier(out, plan)

    reuse(plan, state, out, size, workers, progress)
    todo = plan.todo()
    stale = sorted(file for file in state if file not in plan.photographs)
    reused = len(plan.records)
    if todo or stale or not finished:
        _make_folders(out, plan)
        with Journal(out, plan.records.values(), [*todo, *stale]) as journal:
            _make(plan, todo, out, size, workers, journal, progress)
            _remove(out, set(stale) | set(plan.skips))
            records = sorted(plan.records.values(), key=lambda record: record.file)
            pairs = _write_reports(out, plan, listing, records)
            journal.close(records)
    else:  # no pixel changes; grades or patients may have
        records = sorted(plan.records.values(), key=lambda record: record.file)
        pairs = _write_reports(out, plan, listing, records)
        write_manifest(out, records)
    return {
        "out": str(out),
        "layout": listing.layout,
        "classes": {name: list(labels) for name, labels in listing.classes.items()},
        "counts": _counts(records, listing),
        "left_out": listing.left_out,
        "unlisted": listing.unlisted,
        "missing": len(listing.missing),
        "skipped": len(plan.skips),
        "made": len(records) - reused,
        "reused": reused,
        "upsampled": sum(record.upsampled for record in records),
        "leaks": _summarise_leaks(leaks, drop_leaks),
        "duplicates": pairs,
        "workers": workers,
        "seconds": round(time.monotonic() - start, 1),
    }


# ---- planning ----------------------------------------------------------------------------------------------------


def _refuse_overlap(src: Path, out: Path) -> None:
    source, target = src.resolve(), out.resolve()
    if source.is_dir() and (source == target or source in target.parents or target in source.parents):
        raise InputError(f"expected an output folder apart from the source, got {out} and {src}: choose another folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"expected a folder to write to, but {out} is a file: choose another name")


def _with_splits(
    listing: Listing, fractions: tuple[float, float, float], drop_leaks: bool
) -> tuple[list[Photograph], list[Leak]]:
    photographs = listing.photographs
    if all(p.split is None for p in photographs):
        splits = assign_splits(photographs, fractions)
        return [replace(p, split=split) for p, split in zip(photographs, splits, strict=True)], []
    leaks = find_leaks(photographs)
    dropped = {source for leak in leaks for source in leak.dropped} if drop_leaks else set()
    return [p for p in photographs if p.source not in dropped], leaks


# ---- work --------------------------------------------------------------------------------------------------------


def _make_folders(out: Path, plan: Plan) -> None:
    for folder in sorted({str(PurePosixPath(file).parent) for file in plan.photographs}):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for partial in out.glob("*/*/.*.partial"):  # of a run that was killed
        partial.unlink()


def _make(
    plan: Plan, todo: list[str], out: Path, size: int, workers: int, journal: Journal, progress: Progress
) -> None:
    """Make what is missing; results go to the plan and, one by one, to the journal."""
    jobs = {file: Job(str(plan.photographs[file].path), str(out / file), size) for file in todo}
    with progress("preparing", len(todo)) as bar, closing(parallel(make, jobs, workers)) as results:
        for file, result in results:
            p = plan.photographs[file]
            if result.reason is None:
                plan.records[file] = record = _record(file, p, size, result)
                journal.add(record)
            else:
                plan.skips[file] = Skip(p.source, p.label, p.grade, p.split, result.reason, result.source_sha256, RULE)
            bar.advance(note=f"{len(plan.skips)} skipped" if plan.skips else None)
    if not plan.records:
        first = min(plan.skips.values(), key=lambda skip: skip.source)
        raise InputError(
            f"none of {len(plan.skips)} photographs could be read ({first.source}: {first.reason}): check the source"
        )


def _remove(out: Path, files: set[str]) -> None:
    """Remove results of an earlier run that no longer belong, and the folders that this empties."""
    for file in files:
        (out / file).unlink(missing_ok=True)
    for split in SPLITS:
        for folder in [*(out / split).glob("*"), out / split]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _record(file: str, p: Photograph, size: int, result: Made) -> Record:
    return Record(
        file=file,
        source=p.source,
        label=p.label or "",
        grade=p.grade,
        split=p.split or "",
        patient=p.patient,
        size=size,
        sha256=result.sha256,
        source_sha256=result.source_sha256 or "",
        source_size=result.source_size,
        upsampled=min(result.source_size) < size,
        signature=result.signature,
        rule=RULE,
    )


def make(job: Job) -> Made:
    """Worker: decode, crop, resize, encode, store. Unreadable photographs give a reason; a full disk raises OSError."""
    try:
        with open(job.path, "rb") as handle:
            data = handle.read()
    except OSError as error:
        return Made(reason=error.strerror or type(error).__name__)
    source_sha256 = hashlib.sha256(data).hexdigest()
    try:
        square, source_size = square_rgb(data, job.size)
    except UnreadableError as error:
        return Made(source_sha256=source_sha256, reason=str(error))
    buffer = io.BytesIO()
    square.save(buffer, "PNG", compress_level=PNG_LEVEL)
    png = buffer.getvalue()
    # Renamed into place, so never half a file. Not forced to the disk one by one (that costs more than the decoding):
    # the next run compares digests and makes again what a power cut took.
    target = Path(job.target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(png)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return Made(hashlib.sha256(png).hexdigest(), source_sha256, source_size, duplicates.signature(square))


# ---- reports -----------------------------------------------------------------------------------------------------


def _write_reports(out: Path, plan: Plan, listing: Listing, records: Sequence[Record]) -> dict[str, object]:
    """skipped.jsonl and duplicates.jsonl; returns the summary of the latter."""
    missing = [Skip(p.source, p.label, p.grade, p.split, MISSING, None, RULE) for p in listing.missing]
    skips = sorted([*plan.skips.values(), *missing], key=lambda skip: skip.source)
    write_lines(out / SKIPPED, (vars(skip) for skip in skips))
    pairs = duplicates.find_pairs([r.signature for r in records], [r.sha256 for r in records])
    lines = []
    for pair in pairs:
        a, b = records[pair.first], records[pair.second]
        lines.append(
            {
                "files": [a.file, b.file],
                "similarity": pair.similarity,
                "mirrored": pair.mirrored,
                "across_splits": a.split != b.split,
                "same_patient": a.patient == b.patient,
                "grades": [a.grade, b.grade],
            }
        )
    write_lines(out / DUPLICATES, lines)
    across = [line for line in lines if line["across_splits"]]
    return {
        "across_splits": len(across),
        "within_splits": len(lines) - len(across),
        "first": [line["files"] for line in across[:3]],
    }


def _counts(records: Sequence[Record], listing: Listing) -> dict[str, dict[str, int]]:
    counted = Counter((record.split, record.label) for record in records)
    present = [split for split in SPLITS if any(record.split == split for record in records)]
    return {split: {name: counted[split, name] for name in listing.classes} for split in present}


def _summarise_leaks(leaks: Sequence[Leak], dropped: bool) -> dict[str, object]:
    return {
        "patients": len(leaks),
        "photographs": sum(len(leak.sources) for leak in leaks),
        "dropped": sum(len(leak.dropped) for leak in leaks) if dropped else 0,
        "first": [{"patient": leak.patient, "splits": list(leak.splits)} for leak in leaks[:3]],
    }
