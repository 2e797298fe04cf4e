"""What training is meant to reach on a GPU, and what a result says of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from retinar.bench.target import Limits, Rows, Target

NAME = "training"
OURS, LLAMAGEN, PLAIN = "ours", "LlamaGen's loop", "upstream-like loop"
NOT_MEASURED = "not measured"


def find(rows: Rows, backend: str, compiled: bool) -> Mapping[str, Any] | None:
    """The line of an implementation, or None."""
    return next((row for row in rows if (row["backend"], row["compiled"]) == (backend, compiled)), None)


def mfu(rows: Rows, limits: Limits) -> float | None:
    """Of our compiled step: its FLOPs a second over those of matrix products in the same run."""
    row = find(rows, OURS, True)
    return None if row is None else row["mfu"]


def over_upstream(rows: Rows, limits: Limits, compiled: bool = True) -> float | None:
    """LlamaGen's step against ours, both compiled or both not."""
    return ratio(rows, LLAMAGEN, compiled)


def ratio(rows: Rows, backend: str, compiled: bool, field: str = "all_seconds") -> float | None:
    """A baseline's seconds over ours: the median over the rounds, in which one came just after the other. ``field``
    "all_cpu_seconds": of the processor time of all threads, which neighbours on a shared CPU disturb less."""
    ours, theirs = find(rows, OURS, compiled), find(rows, backend, compiled)
    if ours is None or theirs is None:
        return None
    return statistics.median(two / one for one, two in zip(ours[field], theirs[field], strict=False))


TARGETS: tuple[Target, ...] = (
    Target(NAME, "GPT-XL, batch 32, compiled: share of the matmul rate", 0.5, True, mfu, "%"),
    Target(NAME, "GPT-XL, batch 32, compiled: speed over LlamaGen's loop", 1.2, True, over_upstream),
)


def counts(content: Mapping[str, Any]) -> bool:
    """Whether the targets are for this result: GPT-XL with 32 images of 1,024 codes on a GPU."""
    found = content.get(NAME) or {}
    size = (found.get("model"), found.get("images"), found.get("codes"), found.get("precision"))
    return content["kind"] == "cuda" and not content.get("exercise") and size == ("GPT-XL", 32, 1024, "bf16")


def evaluate(content: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Each target with its state ("met", "missed by ...", "not measured")."""
    rows = content[NAME]["rows"] if content and counts(content) else []
    found = []
    for target in TARGETS:
        value = target.value(rows, {})
        if value is None:
            state, shown = NOT_MEASURED, "-"
        else:
            state = "met" if target.met(value) else f"missed by {target.show(abs(value - target.threshold))}"
            shown = target.show(value)
        found.append({"what": target.what, "wanted": target.wanted(), "shown": shown, "value": value, "state": state})
    return found
