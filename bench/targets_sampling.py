"""What sampling is meant to reach on a GPU: GPT-XL, 1,024 codes an image, guided, bf16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from retinar.bench.sampling_sizes import OURS, SIZES, UPSTREAM
from retinar.bench.target import Limits, Rows, Target

NAME = "sampling"
MODEL, CODES, DTYPE = "GPT-XL", 1024, "bfloat16"


def find(rows: Rows, backend: str, images: int) -> Mapping[str, Any] | None:
    """The line of an implementation with so many images of the size that the targets are for, or None."""
    for row in _lines(rows):
        if (row["backend"], row["images"]) == (backend, images):
            return row
    return None


def one_image(rows: Rows, limits: Limits) -> float | None:
    """Seconds from the first step to the last code."""
    row = find(rows, OURS, 1)
    return None if row is None or row["extrapolated"] else row["seconds"]


def over_upstream(rows: Rows, limits: Limits) -> float | None:
    """LlamaGen's time of one image, eager, over ours."""
    ours, theirs = one_image(rows, limits), find(rows, UPSTREAM["eager"], 1)
    return None if ours is None or theirs is None else theirs["seconds"] / ours


def share_of_the_bound(rows: Rows, limits: Limits) -> float | None:
    """Of 64 images at once."""
    row = find(rows, OURS, 64)
    return None if row is None else row["share"]


def best_over_best(rows: Rows, limits: Limits) -> float | None:
    """Our most images a second over LlamaGen's; None unless each of its ways was measured with each number of images:
    the one that is missing might be its best."""
    ours = [row["images_per_s"] for row in _lines(rows) if row["backend"] == OURS]
    theirs = [find(rows, name, images) for name in UPSTREAM.values() for images in SIZES["cuda"].upstream]
    speeds = [row["images_per_s"] for row in theirs if row is not None]
    return max(ours) / max(speeds) if ours and len(speeds) == len(theirs) else None


def evidence(content: Mapping[str, Any]) -> list[str]:
    """What stands beside a missed target: our rows, and where the time of a step goes."""
    found = content.get(NAME) or {}
    lines = [
        f"{row['images']} images: {row['seconds']:.3g} s, step {1e3 * row['step_p50']:.3g} ms (p99 "
        f"{1e3 * row['step_p99']:.3g} ms), {100 * row['share']:.0f} % of the bound"
        for row in found.get("rows", [])
        if row["backend"] == OURS
    ]
    step = found.get("step")
    if step:
        parts = ", ".join(f"{each['group']} {100 * each['share']:.0f} %" for each in step["groups"])
        lines.append(f"a step of {step['images']} images at position {step['position']}: {parts}")
    return lines


def _lines(rows: Rows) -> Iterator[Mapping[str, Any]]:
    for row in rows:
        if row["name"] == NAME and (row["model"], row["codes"], row["dtype"]) == (MODEL, CODES, DTYPE):
            yield row


TARGETS: tuple[Target, ...] = (
    Target(NAME, "one image of GPT-XL, guided", 1.5, False, one_image, "s"),
    Target(NAME, "one image, speed over LlamaGen's eager", 10.0, True, over_upstream),
    Target(NAME, "64 images, share of the bound of reading weights and cache once", 0.6, True, share_of_the_bound, "%"),
    Target(NAME, "images a second, over LlamaGen's best of 1 to 128 at once", 5.0, True, best_over_best),
)
