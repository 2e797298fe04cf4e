"""A result file as tables: ``python -m retinar.bench.report FILE.json`` for a terminal, ``--readme`` for the README and
`report_page`'s page."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retinar.bench import record, report_decoding, report_sampling, targets
from retinar.bench.words import percent, seconds, table
from retinar.engine.errors import InputError

COLUMNS = ("op", "size", "dtype", "direction", "implementation", "time", "share of the limit")


def where(content: Mapping[str, Any]) -> str:
    """Device, date, commit and command of a result, in a line."""
    exercise = "EXERCISE at tiny sizes, its times say nothing; " if content.get("exercise") else ""
    return (
        f"{exercise}{content['device']}, {content['cores']} cores, {content['threads']} threads, "
        f"torch {content['torch']}, {content['date']}, commit {content['commit'] or 'unknown'}, `{content['command']}`"
    )


def markdown(content: Mapping[str, Any]) -> str:
    """The whole result: what is wrong first, then times, limits, sampling, what was left out, targets, the profile."""
    times = list(table(COLUMNS, map(_cells, content["rows"]))) if content["rows"] else []
    parts = [[where(content)], _failures(content), times, _limits(content)]
    parts += [report_sampling.lines(content), report_decoding.lines(content)]
    parts += [_left_out(content), _targets(content), _profile(content)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _cells(row: Mapping[str, Any]) -> list[str]:
    host = "" if row.get("queued", True) else " (the host's work in it)"
    cells = [row["name"], row["case"], row["dtype"], row["direction"], row["backend"]]
    return [*cells, seconds(row["seconds"]) + host, percent(row.get("share"))]


def _failures(content: Mapping[str, Any]) -> list[str]:
    return [f"WRONG  {sentence}" for sentence in content["tests"].get("failed", [])]


def _limits(content: Mapping[str, Any]) -> list[str]:
    return [
        f"limit in {name}: {limit['bytes_per_s'] / 1e9:.1f} GB/s copied, {limit['flops_per_s'] / 1e9:.0f} GFLOP/s"
        for name, limit in content["limits"].items()
    ]


def _left_out(content: Mapping[str, Any]) -> list[str]:
    """Baselines that did not run, joined over the ops that share a reason, and whatever else was not done."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in content.get("absent", []):
        reasons.setdefault((each["baseline"], each["reason"]), []).append(each["name"])
    lines = [f"absent: {name} ({', '.join(ops)}): {why}" for (name, why), ops in reasons.items()]
    return lines + [f"left out: {sentence}" for sentence in content.get("left_out", [])]


def _targets(content: Mapping[str, Any]) -> list[str]:
    found = content.get("targets", [])
    if not found or (content["kind"] != "cuda" and not content.get("exercise")):
        return []
    lines = list(
        table(
            ("target", "", "wanted", "found", "state"),
            [(each["op"], each["what"], each["wanted"], targets.shown(each), each["state"]) for each in found],
        )
    )
    for op in dict.fromkeys(each["op"] for each in found if each["state"].startswith("missed")):
        lines += ["", f"In the way of {op}:", *(f"- {line}" for line in targets.evidence(content, op))]
    return lines


def _profile(content: Mapping[str, Any]) -> list[str]:
    step = content.get("profile")
    if not step or "groups" not in step:
        return []
    head = (
        f"A training step of {step['recipe']} ({step['model']}, batch {step['batch']}, {step['precision']}, "
        f"{'compiled' if step['compiled'] else 'not compiled'}): {seconds(step['seconds'])}, "
        f"{step['tokens_per_s']:.0f} tokens/s"
    )
    groups = [(each["group"], seconds(each["seconds"]), percent(each["share"])) for each in step["groups"]]
    ours = ", ".join(f"{each['name']} x{each['calls']:.0f}" for each in step["kernels"]) or "none"
    lines = [head, "", *table(("group", "time", "share"), groups), "", f"our kernels in it: {ours}"]
    if step["missing"]:
        lines.append(f"missing: {', '.join(step['missing'])}")
    return lines


def main(argv: Sequence[str]) -> int:
    """Print one result, or bring README and pages up to date; exit code 2 with a sentence when that cannot be done."""
    if len(argv) != 1:
        print("Expected one result file or --readme: python -m retinar.bench.report FILE.json", file=sys.stderr)
        return 2
    try:
        if argv[0] == "--readme":
            from retinar.bench import readme, report_page, report_training

            print(f"written to {readme.update()}, {report_page.update()} and {report_training.update()}")
        else:
            print(markdown(record.load(Path(argv[0]))))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
