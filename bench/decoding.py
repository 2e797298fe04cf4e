"""Decoding on a CPU at real size, beside what plain torch reaches and what this machine allows:
``python -m retinar.bench.decoding``, or ``retinar bench --only decoding``; ``make bench`` has it too.

Random bf16 weights, guided images, every row at one position, the whole step with the draw. The rows of a case follow
each other closely, once everything is compiled and packed, and the bandwidth is read between them: on a shared machine
only what was measured together can be compared. ``--llama-cpp`` puts llama.cpp beside ours, whose step has neither
guidance nor a draw (`baselines.llama_cpp`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retinar.bench import record, targets_decoding
from retinar.bench.baselines import llama_cpp as peer
from retinar.bench.deadline import Deadline
from retinar.bench.decoding_rows import NAME
from retinar.bench.decoding_run import Decoding, Say, to_stderr
from retinar.bench.decoding_sizes import SIZES
from retinar.engine.errors import InputError

MINUTES, LLAMA_CPP_MINUTES = 9.5, 17.5
"""Without and with llama.cpp."""


def measured(
    minutes: float | None = None, *, exercise: bool = False, say: Say = to_stderr, program: Path | None = None
) -> dict[str, Any]:
    """{"decoding", "left_out", "wrong", "minutes"} of a run on this CPU. ``program``: llama.cpp's, checked."""
    deadline = Deadline(60 * (minutes or (MINUTES if program is None else LLAMA_CPP_MINUTES)))
    size = SIZES["exercise" if exercise else "cpu"]
    run = Decoding(size, deadline, exercise=exercise, say=say, program=program)
    run.run()
    return {NAME: run.content(), "left_out": run.left_out, "wrong": run.wrong, "minutes": deadline.spent / 60}


def add_to(document: dict[str, Any], *, exercise: bool = False, **options: Any) -> None:
    """Measure, and put the figures and the states of their targets into a result; options as of `measured`."""
    found = measured(exercise=exercise, **options)
    document[NAME] = found[NAME]
    document["left_out"] = [*document.get("left_out", []), *found["left_out"]]
    document["tests"] = {**document["tests"], "failed": [*document["tests"].get("failed", []), *found["wrong"]]}
    if exercise:
        document["exercise"] = True
    document[NAME]["targets"] = targets_decoding.evaluate(document)
    document[NAME]["minutes"] = found["minutes"]


def alone(out: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    """A result of decoding and nothing else, written under ``out``: (its path, its content); options as of
    `measured`."""
    document: dict[str, Any] = {**record.document("cpu", [], {}, {}), "only": NAME}
    add_to(document, **options)
    return record.save(out, document), document


def main(argv: Sequence[str]) -> int:
    """0: all right; 1: a step is wrong; 2: bad input, in one sentence."""
    from retinar.bench.report import markdown

    parser = argparse.ArgumentParser(prog="python -m retinar.bench.decoding", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, default=Path("bench/results"), help="folder of results (bench/results)")
    add("--minutes", type=float, help="for everything (9.5; with llama.cpp 17.5); the rest is named")
    add("--llama-cpp", type=Path, help="a built llama.cpp, or its llama-batched-bench, which is then measured too")
    add("--exercise", action="store_true", help="all of it at tiny sizes; its times say nothing")
    flags = parser.parse_args(argv)
    try:
        program = None if flags.llama_cpp is None else peer.check(flags.llama_cpp)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    path, content = alone(flags.out, minutes=flags.minutes, exercise=flags.exercise, program=program)
    print(f"{markdown(content)}\n\nwritten to {path}")
    return 1 if content["tests"]["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
