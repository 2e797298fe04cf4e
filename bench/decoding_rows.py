"""A measured row of decoding as a result file holds it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from retinar.bench import roofline
from retinar.bench.decoding_sizes import Case
from retinar.engine.config import GPTConfig

NAME = "decoding"


def result_row(
    case: Case,
    backend: str,
    config: GPTConfig,
    seconds: Sequence[float],
    rates: Sequence[roofline.Rates],
    work: roofline.Work,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """``seconds``: of a step, each measured; ``rates``: before and after, for the limit; ``about``: what else it says,
    ``steps`` among it where a measurement is the mean of several."""
    limit, median = roofline.limit(work, *rates), statistics.median(seconds)
    return {
        "name": NAME,
        "model": case.model,
        "images": case.images,
        "backend": backend,
        "steps": len(seconds),
        "step_p50": median,
        "step_min": min(seconds),
        "step_max": max(seconds),
        "images_per_minute": 60 * case.images / (median * config.block_size),
        "read_bytes_per_s": [each.bytes_per_s for each in rates],
        "flops_per_s": [each.flops_per_s for each in rates] if limit is not None else None,
        **work._asdict(),
        "limit_seconds": limit,
        "share": None if limit is None else limit / median,
        **about,
    }


def said(row: Mapping[str, Any], rates: Sequence[roofline.Rates]) -> str:
    """A row in a line, for who waits."""
    told = "-" if row["share"] is None else f"{100 * row['share']:.0f} % of the limit"
    read = f"{rates[0].said()} before, {rates[-1].said()} after"
    return f"{row['backend']}: {1e3 * row['step_p50']:.2f} ms, {told}; {read}"


def named(case: Case) -> str:
    """A case in words."""
    return f"{case.model}, {case.images} image{'s' * (case.images > 1)}"


def words(dtype: torch.dtype) -> str:
    """A dtype's name."""
    return str(dtype).removeprefix("torch.")
