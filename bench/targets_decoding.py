"""What decoding on a CPU is meant to reach: ratios of steps in one run, context 512, the whole step with the draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from statistics import mean
from typing import Any

from retinar.bench.baselines.gguf_model import BF16, Q8_0
from retinar.bench.decoding_sizes import CUT, EAGER, INT8, INT8_CACHE, LLAMA_CPP, OURS, STATIC
from retinar.bench.target import Limits, Rows, Target

CONTEXT = 512
NOT_MEASURED = "not measured"


def find(rows: Rows, model: str, images: int, backend: str) -> Mapping[str, Any] | None:
    """The line of a case, or None."""
    key = (model, images, backend)
    return next((row for row in rows if (row["model"], row["images"], row["backend"]) == key), None)


def over(rows: Rows, limits: Limits, model: str, images: int, theirs: str, ours: str) -> float | None:
    """How many times as fast one is as another."""
    pair = [find(rows, model, images, name) for name in (theirs, ours)]
    return None if pair[0] is None or pair[1] is None else pair[0]["step_p50"] / pair[1]["step_p50"]


def share(rows: Rows, limits: Limits, model: str, images: int) -> float | None:
    """Of the limit, ours. What beats it is no figure: something else held the machine while the limit was measured."""
    ours = find(rows, model, images, OURS)
    return None if ours is None or beyond(ours) else ours["share"]


def beyond(row: Mapping[str, Any]) -> bool:
    """Whether a step was faster than its limit."""
    return row["share"] is not None and row["share"] > 1


# model, images: over eager, over either of compiled torch, share of the limit
_WANTED = {
    ("GPT-B", 1): (7.0, 1.7, 0.75),
    ("GPT-B", 4): (16.0, 1.7, 0.70),
    ("GPT-B", 16): (15.0, 1.3, 0.65),
    ("GPT-XL", 1): (5.0, 1.8, 0.80),
    ("GPT-XL", 4): (10.0, 1.4, 0.70),
}


def _targets() -> Iterator[Target]:
    for (model, images), (eager, compiled, limit) in _WANTED.items():
        case = f"{model}, {images} at once"
        at: dict[str, Any] = {"model": model, "images": images}
        yield Target(case, "over upstream-like eager", eager, True, partial(over, **at, theirs=EAGER, ours=OURS))
        for what, name in (("over compiled torch, static cache", STATIC), ("over the same, cut to the context", CUT)):
            yield Target(case, what, compiled, True, partial(over, **at, theirs=name, ours=OURS))
        yield Target(case, "limit over measured", limit, True, partial(share, **at), "%")
        for what, kind, ours in (("over", BF16, OURS), ("int8 weights over", Q8_0, INT8)):
            value = partial(over, **at, theirs=LLAMA_CPP[kind], ours=ours)
            yield Target(case, f"{what} {LLAMA_CPP[kind]}", 1.0, True, value)
    for model, least in (("GPT-B", 1.4), ("GPT-XL", 1.6)):
        value = partial(over, model=model, images=1, theirs=OURS, ours=INT8)
        yield Target(f"{model}, 1 at once", "int8 weights over bf16", least, True, value)
    value = partial(over, model="GPT-B", images=16, theirs=INT8, ours=INT8_CACHE)
    yield Target("GPT-B, 16 at once", "int8 cache on top of int8 weights", 1.3, True, value)


TARGETS: tuple[Target, ...] = tuple(_targets())


def evaluate(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each target with its state ("met", "missed by ...", "not measured") for a result; an exercise measures none."""
    found = content.get("decoding") or {"rows": [], "context": CONTEXT}
    counts = not content.get("exercise") and found["context"] == CONTEXT
    lines = []
    for target in TARGETS:
        value = target.value(found["rows"], {}) if counts else None
        if value is None:
            state = NOT_MEASURED
        elif target.met(value):
            state = "met"
        else:
            state = f"missed by {target.show(abs(value - target.threshold))}"
        shown = "-" if value is None else target.show(value)
        about = {"case": target.op, "what": target.what, "wanted": target.wanted(), "threshold": target.threshold}
        lines.append({**about, "value": value, "shown": shown, "state": state})
    return lines


def evidence(content: Mapping[str, Any], case: str) -> list[str]:
    """Where the time goes, beside a missed target of a case: per op where the decoder has timed its phases, else what a
    short context leaves over, each beside its part of the limit."""
    lines = []
    for row in (content.get("decoding") or {}).get("rows", []):
        if row["baseline"] or f"{row['model']}, {row['images']} at once" != case:
            continue
        read = mean(row["read_bytes_per_s"])
        cache = row["cache_bytes"] / read
        parts = [f"{row['backend']}: {_ms(row['step_p50'])}"]
        if row.get("short_step_p50") is not None:
            rest, long = row["short_step_p50"], row["step_p50"] - row["short_step_p50"]
            weights = [f"weights {_ms(row['weight_bytes'] / read)}"]
            if row["flops_per_s"]:
                weights.append(f"products {_ms(row['flops'] / mean(row['flops_per_s']))}")
            parts.append(f"the cache {_ms(long)} (limit {_ms(cache)})")
            parts.append(f"all else {_ms(rest)} (limit, the greater of {' and '.join(weights)})")
        parts += [f"{each['name']} {_ms(each['seconds'])}" for each in row.get("phases") or ()]
        lines.append("; ".join(parts))
    return lines


def _ms(value: float) -> str:
    return f"{1e3 * value:.3g} ms"
