"""Sampling in a result file as tables: for a terminal, and for the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retinar.bench.sampling_sizes import INVARIANT, OURS, SIZES, TO_PNG
from retinar.bench.targets import NOT_MEASURED
from retinar.bench.words import percent, seconds, table

HEAD = (
    "sampling",
    "images",
    "step p50",
    "p99",
    "all images",
    "img/s",
    "share of the bound",
    "peak memory",
    "graphs",
    "warm-up",
)


def lines(content: Mapping[str, Any]) -> list[str]:
    """Every row, what is absent, the pipeline to PNGs, and where the time of a step goes."""
    found = content.get("sampling")
    if not found:
        return []
    head = f"{found['model']} ({found['size']}), {found['codes']} codes an image, guided ({found['cfg_scale']})"
    rows = [row for row in found["rows"] if "step_p50" in row]
    parts = [head, "", *table(HEAD, map(_cells, rows)), ""]
    for images, cost in invariance(found["rows"]).items():
        parts.append(f"batch invariant, {images} at once: {cost:.2f}x the time")
    parts += [f"{TO_PNG}: {_pipeline(row)}" for row in found["rows"] if row["backend"] == TO_PNG]
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in found["absent"]:
        reasons.setdefault((each["backend"], each["reason"]), []).append(str(each["images"]))
    parts += [f"absent: {name} ({', '.join(images)} images): {why}" for (name, why), images in reasons.items()]
    return [*parts, *_step(found.get("step"))]


def invariance(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Images at once -> time of the batch-invariant mode over that of the fast one."""
    times = {(row["backend"], row["images"]): row["seconds"] for row in rows}
    pairs = {images: times.get((OURS, images)) for name, images in times if name == INVARIANT}
    return {images: times[INVARIANT, images] / fast for images, fast in pairs.items() if fast}


def _cells(row: Mapping[str, Any]) -> list[str]:
    mark = " (from a window)" if row["extrapolated"] else ""
    cells = [row["backend"], str(row["images"]), seconds(row["step_p50"]), seconds(row["step_p99"])]
    cells += [seconds(row["seconds"]) + mark, f"{row['images_per_s']:.3g}", percent(row["share"])]
    warm_up = row.get("warm_up_seconds")
    return [
        *cells,
        memory(row.get("peak_bytes")),
        memory(row.get("graph_bytes")),
        "-" if warm_up is None else seconds(warm_up),
    ]


def memory(size: int | None) -> str:
    """In GiB or MiB, or a dash where it is not known."""
    if size is None:
        return "-"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _pipeline(row: Mapping[str, Any]) -> str:
    return (
        f"{row['images']} images of {row['model']} through {row['tokenizer']}, {row['slots']} at once: "
        f"{row['images_per_s']:.3g} img/s, the codes alone {row['alone_images_per_s']:.3g} ({percent(row['kept_up'])})"
    )


def _step(step: Mapping[str, Any] | None) -> list[str]:
    if not step:
        return []
    groups = [(each["group"], seconds(each["seconds"]), percent(each["share"])) for each in step["groups"]]
    ours = ", ".join(f"{each['name']} x{each['calls']:.0f}" for each in step["kernels"]) or "none"
    where = f"its trace: {step['trace']}" if step["trace"] else "its trace was not kept"
    found = ["", f"A step of {step['images']} images at position {step['position']}; {where}", ""]
    found += [*table(("group", "time", "share"), groups), "", f"our kernels in it: {ours}"]
    return found + [f"missing: {', '.join(step['missing'])}"] * bool(step["missing"])


def readme(content: Mapping[str, Any] | None) -> list[str]:
    """A line for each number of images at once; without a result, what has not been measured."""
    found = (content or {}).get("sampling") or {"rows": []}
    rows = {(row["backend"], row["images"]): row for row in found["rows"]}
    costs = invariance(found["rows"])
    head = ("images at once", "step p50, p99", "all", "img/s", "share of the bound", "batch invariant")
    body = []
    for images in sorted(SIZES["cuda"].batches):
        row = rows.get((OURS, images))
        if row is None:
            body.append([str(images), NOT_MEASURED, *["-"] * (len(head) - 2)])
            continue
        cells = [str(images), f"{seconds(row['step_p50'])}, {seconds(row['step_p99'])}", seconds(row["seconds"])]
        cost = f"{costs[images]:.2f}x the time" if images in costs else NOT_MEASURED
        body.append([*cells, f"{row['images_per_s']:.3g}", percent(row["share"]), cost])
    told = [
        f"- {row['backend']}, {row['images']} at once: {row['images_per_s']:.3g} img/s, step {seconds(row['step_p50'])}"
        + (f", from {row['steps']} steps" if row["extrapolated"] else "")
        for row in found["rows"]
        if row["baseline"]
    ]
    told += [f"- {row['backend']}: {_pipeline(row)}" for row in found["rows"] if row["backend"] == TO_PNG]
    return [*table(head, body), *([""] * bool(told)), *told]
