"""docs/results/decoding.md, where the time of a decode step goes: ``python -m retinar.bench.report --readme``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retinar.bench.decoding_sizes import SIZES
from retinar.bench.readme import DECODING_BEGIN, DECODING_END, ROOT, newest_decoding, split
from retinar.bench.report import where
from retinar.bench.report_decoding import PAGE, evidence_lines
from retinar.bench.targets_decoding import NOT_MEASURED
from retinar.engine.files import write_text


def update(path: Path = ROOT / PAGE, results: Path = ROOT / "bench" / "results") -> Path:
    """Write what stands between the page's markers anew. InputError without the markers."""
    before, _, after = split(path.read_text(encoding="utf-8"), path, DECODING_BEGIN, DECODING_END)
    write_text(path, before + section(newest_decoding(results)) + after)
    return path


def section(contents: Sequence[Mapping[str, Any]]) -> str:
    """Of each machine the newest result, every case."""
    cases = [f"{case.model}, {case.images} at once" for case in SIZES["cpu"].cases]
    parts = ["\n".join([f"{where(each)}.", *evidence_lines(each, cases)]) for each in contents]
    return "\n\n" + "\n\n".join(parts or [f"{NOT_MEASURED.capitalize()}."]) + "\n\n"
