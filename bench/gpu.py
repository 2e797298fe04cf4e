"""``make gpu``: is every op right on this device, how fast is it, does training use it, how fast are images made? One
JSON, and the trace of a decode step beside it.

From a bare checkout with torch, triton and numpy alone: ``PYTHONPATH=. python -m retinar.bench.gpu --device cuda``, in
under nine minutes. ``--device cpu`` exercises all of it at tiny sizes, the GPU kernels under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

# Only what is light is imported here: Triton must not be before its interpreter is chosen, and the processes that
# compile for the GPU import this file too.

MINUTES = {"cuda": 8.5, "cpu": 6.0}
OUT = {"cuda": Path("bench/results"), "cpu": Path("build/exercise")}
GRACE_SECONDS = 20


def main(argv: Sequence[str], *, watched: bool = False) -> int:
    """0: all right; 1: something is wrong on this device; 2: bad input, in one sentence.

    ``watched``: end the process, with the result so far, should something hang past the deadline.
    """
    parser = argparse.ArgumentParser(prog="python -m retinar.bench.gpu", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the exercise")
    add("--out", type=Path, help="folder of results (bench/results; of the exercise build/exercise)")
    add("--seconds", type=float, help="time for each measurement (0.3; of the exercise 0)")
    add("--minutes", type=float, help="for everything (8.5; of the exercise 6)")
    add("--only", help="ops whose name contains this, without profile and engine; or: sampling")
    add("--upstream", type=Path, help="a clone of LlamaGen, whose own sampling is then measured too")
    flags = parser.parse_args(argv)

    from retinar.bench.baselines.upstream import check_clone
    from retinar.bench.deadline import Deadline
    from retinar.bench.report import markdown
    from retinar.bench.run import check_device
    from retinar.bench.whole import Run
    from retinar.engine.errors import InputError

    exercise = flags.device == "cpu"
    try:
        check_device(flags.device)
        upstream = None if flags.upstream is None else check_clone(flags.upstream)
        run = Run(
            flags.device,
            flags.out or OUT[flags.device],
            Deadline(60 * (flags.minutes or MINUTES[flags.device])),
            exercise=exercise,
            seconds=flags.seconds if flags.seconds is not None else 0.0 if exercise else 0.3,
            only=flags.only,
            upstream=upstream,
        )
        if watched:
            watch(run.deadline.left + GRACE_SECONDS)
        content = run.all()
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(markdown(content))
    tests = content["tests"]
    told = f"{tests['checked']} cases checked, {len(tests['failed'])} wrong, {content['minutes']:.1f} minutes"
    print(f"\n{told}; written to {run.path}")
    return 1 if tests["failed"] else 0


def watch(seconds: float) -> None:
    """End the process after so long: a kernel that never ends cannot be interrupted. The last phase's file stays."""

    def end() -> None:
        print(f"stopped after {seconds:.0f} seconds: something hangs; the result so far is written", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def prepare(argv: Sequence[str]) -> None:
    """What must be in the environment before torch and Triton start."""
    # Without it cuBLAS, deterministic as it is on one stream, is refused when torch is told to be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if "--device=cpu" in argv or ("--device", "cpu") in itertools.pairwise(argv):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads cost more than they gain at these sizes
        if importlib.util.find_spec("triton") is not None:
            os.environ["TRITON_INTERPRET"] = "1"


if __name__ == "__main__":
    prepare(sys.argv[1:])
    raise SystemExit(main(sys.argv[1:], watched=True))
