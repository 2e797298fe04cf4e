"""What kernels and sampling are meant to reach on a GPU, as data, and whether a result reaches it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from retinar.bench import targets_sampling
from retinar.bench.baselines.attention import ROTATED
from retinar.bench.target import Limits, Rows, Target

OURS, UNFUSED = "triton", "torch eager"


def row_of(rows: Rows, op: str, direction: str, backend: str) -> Mapping[str, Any] | None:
    """The line of a result, or None."""
    key = (op, direction, backend)
    return next((each for each in rows if (each["name"], each["direction"], each["backend"]) == key), None)


def bandwidth(rows: Rows, limits: Limits, op: str, direction: str) -> float | None:
    """Bytes that the op must move, over the time taken, over the bandwidth of a copy in the same run."""
    row = row_of(rows, op, direction, OURS)
    if row is None or row["bytes"] is None or row["dtype"] not in limits:
        return None
    return row["bytes"] / row["seconds"] / limits[row["dtype"]]["bytes_per_s"]


def ratio(
    rows: Rows, limits: Limits, op: str, field: str, above: str, below: str, direction: str = "both"
) -> float | None:
    """``field`` of one implementation over that of another."""
    pair = [row_of(rows, op, direction, backend) for backend in (above, below)]
    values = [None if row is None else row.get(field) for row in pair]
    if values[0] is None or not values[1]:
        return None
    return values[0] / values[1]


def _bandwidths() -> list[Target]:
    return [
        Target(
            op, f"{direction}, share of the copy bandwidth", least, True,
            partial(bandwidth, op=op, direction=direction), "%",
        )
        for op in ("rms_norm", "add_rms_norm", "swiglu", "swiglu_packed")
        for direction, least in (("forward", 0.85), ("backward", 0.75))
    ]  # fmt: skip


def _ratio(op: str, what: str, threshold: float, least: bool, field: str, above: str, below: str) -> Target:
    value = partial(ratio, op=op, field=field, above=above, below=below)
    return Target(op, f"forward and backward, {what}", threshold, least, value)


TARGETS: tuple[Target, ...] = (
    *_bandwidths(),
    _ratio("rope_attention", f"speed over that of {ROTATED}", 1.0, True, "seconds", ROTATED, OURS),
    _ratio("rope_attention_dropout", f"speed over that of {ROTATED}", 1.0, True, "seconds", ROTATED, OURS),
    _ratio("linear_cross_entropy", "peak memory over the unfused loss's", 0.25, False, "peak_bytes", OURS, UNFUSED),
    _ratio("linear_cross_entropy", "time over the unfused loss's", 1.1, False, "seconds", OURS, UNFUSED),
    *targets_sampling.TARGETS,
)
NOT_MEASURED = "not measured"


def evaluate(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each target with its state ("met", "missed by ...", "not measured") for a result; only a GPU's count.

    An exercise at tiny sizes computes the figures too, so that this code is tried, and then says "not measured".
    """
    counts = content["kind"] == "cuda" and not content.get("exercise")
    rows = [*content["rows"], *(content.get(targets_sampling.NAME) or {}).get("rows", [])]
    found = []
    for target in TARGETS:
        value = target.value(rows, content["limits"])
        if value is None or not counts:
            state = NOT_MEASURED
        elif target.met(value):
            state = "met"
        else:
            state = f"missed by {target.show(abs(value - target.threshold))}"
        shown = {"op": target.op, "what": target.what, "wanted": target.wanted(), "state": state}
        found.append({**shown, "value": value if counts else None, "threshold": target.threshold})
    return found


def shown(target: Mapping[str, Any]) -> str:
    """The figure of an evaluated target, as people read it."""
    if target["value"] is None:
        return "-"
    known = next(each for each in TARGETS if (each.op, each.what) == (target["op"], target["what"]))
    return known.show(target["value"])


def evidence(content: Mapping[str, Any], op: str) -> list[str]:
    """What stands beside a missed target: the op's times and shares of the limits, and its part of a training step."""
    if op == targets_sampling.NAME:
        return targets_sampling.evidence(content)
    lines = [
        f"{row['direction']}, {row['backend']}: {row['seconds'] * 1e6:.1f} us, "
        + (f"{100 * row['share']:.0f} % of the limit" if row.get("share") else "no limit counted")
        + ("" if row.get("queued", True) else ", the host in it")
        for row in content["rows"]
        if row["name"] == op
    ]
    step = content.get("profile") or {}
    lines += [
        f"in the training step: {kernel['name']}, {kernel['calls']} calls, {kernel['seconds'] * 1e3:.2f} ms"
        for kernel in step.get("kernels", [])
        if kernel["op"] in op
    ]
    return lines
