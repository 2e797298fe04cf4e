"""Decoding on a CPU in a result file as tables: for a terminal, and for the README."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from retinar.bench import targets_decoding
from retinar.bench.decoding_sizes import COMPILED, EAGER, INT8, INT8_CACHE, LLAMA_CPP, OURS, SIZES
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
README_COLUMNS = {
    EAGER: "upstream-like eager",
    **dict(zip(COMPILED, ("compiled, static cache", "cut to the context"), strict=True)),
    **{name: name for name in LLAMA_CPP.values()},
    OURS: "ours",
    INT8: "int8 weights",
    INT8_CACHE: "and int8 cache",
}
_PEERS = tuple(LLAMA_CPP.values())
PAGE = "docs/results/decoding.md"


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
    return [*parts, *target_lines(content), *evidence_lines(content, _missed(content))]


def about(found: Mapping[str, Any]) -> str:
    """What was measured, in sentences."""
    told = (
        f"Decoding, random bf16 weights, guided, {found['context']} slots of context, pages of {found['page_size']}; "
        f"a step is all layers and the draw. Limit: the greater of weights over the bandwidth of reading and products "
        f"over the rate of a large one, plus cache over bandwidth; both rates are taken just before and after "
        f"each row (reading: {found['read']})."
    )
    if "llama_cpp" not in found:
        return told
    return (
        f"{told} llama.cpp ({found['llama_cpp']}): the same shapes and as many sequences, the mean of the last steps "
        "up to that context, without guidance and without a draw; with the faster of an fp16 and a bf16 cache, and of "
        "flash attention and none."
    )


def target_lines(content: Mapping[str, Any]) -> list[str]:
    """The table of targets."""
    found = targets_decoding.evaluate(content)
    body = [(each["case"], each["what"], each["wanted"], each["shown"], each["state"]) for each in found]
    return list(table(("target", "", "wanted", "found", "state"), body))


def _missed(content: Mapping[str, Any]) -> Iterable[str]:
    found = targets_decoding.evaluate(content)
    return dict.fromkeys(each["case"] for each in found if each["state"].startswith("missed"))


def evidence_lines(content: Mapping[str, Any], cases: Iterable[str]) -> Iterator[str]:
    """Where the time of some cases goes."""
    for case in cases:
        told = targets_decoding.evidence(content, case)
        if told:
            yield from ("", f"Where the time goes, {case}:", "", *(f"- {line}" for line in told))


def _cells(row: Mapping[str, Any]) -> list[str]:
    limit, compiled = row["limit_seconds"], row.get("compile_seconds")
    read = " and ".join(f"{each / 1e9:.1f}" for each in row["read_bytes_per_s"])
    flash = {None: "", True: ", flash attention", False: ", no flash attention"}[row.get("flash_attention")]
    name = f"{row['backend']}, {row['cache']} cache{flash}" if flash else row["backend"]
    cells = [row["model"], str(row["images"]), name, seconds(row["step_p50"]), seconds(row["step_min"])]
    cells += [f"{row['images_per_minute']:.3g}", "-" if limit is None else seconds(limit), percent(row["share"]), read]
    return [*cells, "-" if compiled is None else seconds(compiled)]


def readme(content: Mapping[str, Any] | None) -> list[str]:
    """A line a case, and the targets; without a result, what has not been measured."""
    found = (content or {}).get("decoding")
    rows = found["rows"] if found else []
    measured = {row["backend"] for row in rows}
    columns = {name: told for name, told in README_COLUMNS.items() if name in measured or name not in _PEERS}
    body = [_case(rows, case.model, case.images, columns) for case in SIZES["cpu"].cases]
    start, end = ([about(found), ""], ["", f"Where the time goes, op by op: [{PAGE}]({PAGE})."]) if found else ([], [])
    return [
        *start,
        *table(("one step", *columns.values(), "limit", "images/min"), body),
        "",
        *target_lines(content or {}),
        *end,
    ]


def _case(rows: Sequence[Mapping[str, Any]], model: str, images: int, columns: Iterable[str]) -> list[str]:
    ours = find(rows, model, images, OURS)
    ends = ["-", "-"] if ours is None else list(_ends(ours))
    times = [_time(find(rows, model, images, name)) for name in columns]
    return [f"{model}, {images} image{'s' * (images > 1)}", *times, *ends]


def _ends(ours: Mapping[str, Any]) -> Iterator[str]:
    limit = ours["limit_seconds"]
    yield "-" if limit is None else f"{seconds(limit)} ({percent(ours['share'])})"
    yield f"{ours['images_per_minute']:.3g}"


def _time(row: Mapping[str, Any] | None) -> str:
    return NOT_MEASURED if row is None else seconds(row["step_p50"])
