"""``make gpu``: is every op right on this device, and how fast is it? One JSON, from a bare checkout.

Needs torch and numpy alone: ``PYTHONPATH=. python -m retinar.bench.gpu --device cuda``. Every op is held to its error
budget in bf16 (and fp32) on all cases of its spec; only those that pass are timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from retinar.bench import record
from retinar.bench.engine import engine_calls
from retinar.bench.ops import check, measurements, runnable, time_op
from retinar.bench.report import markdown
from retinar.bench.run import check_device
from retinar.bench.timing import Limits, limits, measure
from retinar.engine.errors import InputError
from retinar.engine.progress import Progress, plain
from retinar.kernels.spec import ALL_SPECS

DTYPES = (torch.bfloat16, torch.float32)


def check_all(device: str, progress: Progress = plain) -> tuple[int, list[str]]:
    """(cases checked, sentences about those that fail), over all ops, cases, backends and dtypes of `DTYPES`."""
    jobs = [
        (spec, case, dtype, backend)
        for spec in ALL_SPECS
        for dtype in DTYPES
        if dtype in spec.dtypes
        for backend in runnable(spec, device, dtype)
        for case in spec.cases
    ]
    wrong: list[str] = []
    with progress(f"correctness on {device}", len(jobs)) as bar:
        for spec, case, dtype, backend in jobs:
            try:
                found = check(spec, case, dtype, backend, device)
            except RuntimeError as error:
                found = f"{spec.name} {dict(case)} {dtype} {backend} on {device}: {error}"
            if found is not None:
                wrong.append(found)
            bar.advance(1, spec.name)
    return len(jobs), wrong


def run(device: str, out: Path, *, seconds: float = 0.3, progress: Progress = plain) -> tuple[Path, dict[str, object]]:
    """Check, measure, write one result under ``out``; returns (path, content). InputError without the device."""
    check_device(device)
    began = time.monotonic()
    checked, wrong = check_all(device, progress)
    failed = {sentence.split(" ", 1)[0] for sentence in wrong}
    jobs = [what for what in measurements(device) if what.spec.name not in failed]
    found: dict[torch.dtype, Limits] = {dtype: limits(device, dtype) for dtype in {what.dtype for what in jobs}}
    rows: list[dict[str, object]] = []
    with progress(f"times on {device}", len(jobs)) as bar:
        for what in jobs:
            rows.append(time_op(what, found[what.dtype], seconds))
            bar.advance(1, what.id)
    with progress("the engine", None) as bar:
        for call in engine_calls(device):
            timing = measure([call.call], device, seconds=seconds, least=2)
            rows.append(
                {"name": call.name, "case": call.case, "dtype": "float32", "backend": "-", "seconds": timing.median}
                | {"fastest": timing.fastest, "slowest": timing.slowest, "runs": timing.runs}
                | {"images_per_s": call.images / timing.median, "share": None}
            )
            bar.advance(1, call.name)
    tests = {"checked": checked, "failed": wrong, "passed": not wrong, "by": "bench.ops.check"}
    named = {str(dtype).removeprefix("torch."): limit for dtype, limit in found.items()}
    content = record.document(device, rows, named, tests) | {"minutes": (time.monotonic() - began) / 60}
    return record.save(out, content), content


def main(argv: list[str]) -> int:
    """0: all right; 1: an op is wrong on this device; 2: bad input, in one sentence."""
    parser = argparse.ArgumentParser(prog="python -m retinar.bench.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to run (default: cuda)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of results")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each measurement")
    flags = parser.parse_args(argv)
    try:
        path, content = run(flags.device, flags.out, seconds=flags.seconds)
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(markdown(content))
    tests = content["tests"]
    assert isinstance(tests, dict)
    print(f"{tests['checked']} cases checked, {len(tests['failed'])} wrong; written to {path}")
    for sentence in tests["failed"]:
        print(f"WRONG  {sentence}")
    return 1 if tests["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
