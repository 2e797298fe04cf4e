"""A result file as a table, for a terminal or for the README: ``python -m retinar.bench.report FILE.json``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retinar.bench import record
from retinar.engine.errors import InputError

COLUMNS = ("name", "case", "dtype", "backend", "time", "share of the limit")


def seconds(value: float) -> str:
    """A time in the unit that people read: 3.2 s, 41.0 ms, 7.5 us."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def markdown(content: Mapping[str, Any]) -> str:
    """The whole table, with device, date, commit and command above it and the measured limits below."""
    head = [
        f"{content['device']}, {content['cores']} cores, {content['threads']} threads, torch {content['torch']}, "
        f"{content['date']}, commit {content['commit'] or 'unknown'}, `{content['command']}`",
        "",
    ]
    cells = [
        [
            row["name"],
            row["case"],
            row["dtype"],
            row["backend"],
            seconds(row["seconds"]),
            "-" if row.get("share") is None else f"{100 * row['share']:.0f} %",
        ]
        for row in content["rows"]
    ]
    widths = [max(len(line[column]) for line in [list(COLUMNS), *cells]) for column in range(len(COLUMNS))]
    body = [list(COLUMNS), ["-" * width for width in widths], *cells]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in body]
    tail = [
        f"limit in {name}: {limit['bytes_per_s'] / 1e9:.1f} GB/s copied, {limit['flops_per_s'] / 1e9:.0f} GFLOP/s"
        for name, limit in content["limits"].items()
    ]
    return "\n".join([*head, *lines, "", *tail])


def main(argv: list[str]) -> int:
    """Print one result; exit code 2 with a sentence when it cannot be read."""
    if len(argv) != 1:
        print("Expected one result file: python -m retinar.bench.report FILE.json", file=sys.stderr)
        return 2
    try:
        print(markdown(record.load(Path(argv[0]))))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
