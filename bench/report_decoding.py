"""Decoding on a CPU in a result file as tables: for a terminal, and for the README."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from retinar.bench import targets_decoding
from retinar.bench.decoding_sizes import BEST_TORCH, EAGER, INT8, INT8_CACHE, OURS, SIZES
from retinar.bench.targets_decoding import NOT_MEASURED, find
from retinar.bench.words import percent, seconds, table

HEAD = (
    "decoding",
    "images",
    "",
    "step p50",
    "fastest",
    "images/min",
    "limit",
    "limit / measured",
    "GB/s read",
    "compiled in",
)
README_HEAD = (
    "one step",
    "upstream-like eager",
    "compiled, static cache",
    "cut to the context",
    "ours",
    "int8 weights",
    "and int8 cache",
    "limit",
    "images/min",
)


def lines(content: Mapping[str, Any]) -> list[str]:
    """Every row, what is absent, the targets, and where the time of those that miss goes."""
    found = content.get("decoding")
    if not found:
        return []
    parts = [about(found), "", *table(HEAD, map(_cells, found["rows"])), ""]
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in found["absent"]:
        reasons.setdefault((each["backend"], each["reason"]), []).append(f"{each['model']} {each['images']}")
    parts += [f"absent: {name} ({', '.join(cases)}): {why}" for (name, why), cases in reasons.items()]
    parts += [
        f"{row['model']} {row['images']}, {row['backend']}: faster than its limit, so something else held the machine "
        "while that was measured: measure again"
        for row in found["rows"]
        if targets_decoding.beyond(row)
    ]
    return [*parts, *target_lines(content)]


def about(found: Mapping[str, Any]) -> str:
    """What was measured, in a sentence."""
    return (
        f"Decoding, random bf16 weights, guided, {found['context']} slots of context, pages of {found['page_size']}; "
        f"a step is all layers and the draw. Limit: the greater of weights over the bandwidth of reading and products "
        f"over the rate of a large one, plus cache over bandwidth; both rates are taken just before and after "
        f"each row (reading: {found['read']})."
    )


def target_lines(content: Mapping[str, Any]) -> list[str]:
    """The table of targets, then the evidence of the missed ones."""
    found = targets_decoding.evaluate(content)
    body = [(each["case"], each["what"], each["wanted"], each["shown"], each["state"]) for each in found]
    told = list(table(("target", "", "wanted", "found", "state"), body))
    for case in dict.fromkeys(each["case"] for each in found if each["state"].startswith("missed")):
        told += ["", f"Where the time goes, {case}:", ""]
        told += [f"- {line}" for line in targets_decoding.evidence(content, case)]
    return told


def _cells(row: Mapping[str, Any]) -> list[str]:
    limit, compiled = row["limit_seconds"], row.get("compile_seconds")
    read = " and ".join(f"{each / 1e9:.1f}" for each in row["read_bytes_per_s"])
    cells = [row["model"], str(row["images"]), row["backend"], seconds(row["step_p50"]), seconds(row["step_min"])]
    cells += [f"{row['images_per_minute']:.3g}", "-" if limit is None else seconds(limit), percent(row["share"]), read]
    return [*cells, "-" if compiled is None else seconds(compiled)]


def readme(content: Mapping[str, Any] | None) -> list[str]:
    """A line a case, and the targets; without a result, what has not been measured."""
    found = (content or {}).get("decoding")
    rows = found["rows"] if found else []
    body = [_case(rows, case.model, case.images) for case in SIZES["cpu"].cases]
    start = [about(found), ""] if found else []
    return [*start, *table(README_HEAD, body), "", *target_lines(content or {})]


def _case(rows: Sequence[Mapping[str, Any]], model: str, images: int) -> list[str]:
    ours = find(rows, model, images, OURS)
    cells = [_time(find(rows, model, images, EAGER)), *(_time(find(rows, model, images, name)) for name in BEST_TORCH)]
    cells += [_time(ours), *(_time(find(rows, model, images, name)) for name in (INT8, INT8_CACHE))]
    ends = ["-", "-"] if ours is None else list(_ends(ours))
    return [f"{model}, {images} image{'s' * (images > 1)}", *cells, *ends]


def _ends(ours: Mapping[str, Any]) -> Iterator[str]:
    limit = ours["limit_seconds"]
    yield "-" if limit is None else f"{seconds(limit)} ({percent(ours['share'])})"
    yield f"{ours['images_per_minute']:.3g}"


def _time(row: Mapping[str, Any] | None) -> str:
    return NOT_MEASURED if row is None else seconds(row["step_p50"])
