"""Runs the pytest-benchmark suite and files its figures as one JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from retinar.bench import decoding, machine, record, targets
from retinar.bench.baselines import llama_cpp
from retinar.bench.timing import Limits
from retinar.engine.errors import InputError

SUITE = Path(__file__).resolve().parent / "suite"


def run_suite(
    device: str, out: Path, keyword: str | None = None, built: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """Measure, write one result under ``out`` and return (its path, its content).

    ``keyword`` chooses benchmarks by name, as pytest's -k; "decoding" is decoding on a CPU at real size, which a run
    without a keyword on a CPU ends with. ``built``: a build of llama.cpp, then measured beside it. InputError without
    pytest-benchmark, without the device, without llama.cpp's program at that path, or when an op is wrong (then
    nothing is written).
    """
    check_device(device)
    decodes = device == "cpu" and keyword in (None, decoding.NAME)
    if built is not None and not decodes:
        raise InputError(
            f"Expected --llama-cpp with decoding on a CPU, found it with --device {device}"
            f"{'' if keyword is None else f' --only {keyword}'}: use --only decoding on a CPU, or leave it out."
        )
    program = None if built is None else llama_cpp.check(built)
    if decodes and keyword is not None:
        return decoding.alone(out, program=program)
    if machine.version("pytest-benchmark") is None:
        raise InputError("Expected the package pytest-benchmark, found none: run `pip install 'retinar[dev]'`.")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found, missing = Path(folder) / "benchmark.json", Path(folder) / "absent.json"
        command = [sys.executable, "-m", "pytest", str(SUITE), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += [f"--benchmark-json={found}", f"--bench-device={device}", "--benchmark-columns=median,min,rounds"]
        command += [f"--bench-absent={missing}", *(["-k", keyword] if keyword else [])]
        # The suite is a run of its own, also when it is started from a test: pytest's variables are not for it.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(command, stdout=sys.stderr, env=environment)
        if done.returncode or not found.is_file():
            why = "no benchmark of that name" if done.returncode == 5 else "a benchmark that fails (see above)"
            raise InputError(f"Expected every benchmark to run, found {why}: nothing is recorded.")
        content = json.loads(found.read_text(encoding="utf-8"))
        absent = json.loads(missing.read_text(encoding="utf-8"))
    rows = [each["extra_info"]["row"] for each in content["benchmarks"]]
    limits = {
        name: Limits(**limit)
        for each in content["benchmarks"]
        for name, limit in each["extra_info"].get("limits", {}).items()
    }
    names = {row["name"] for row in rows}
    document = record.document(device, rows, limits, {"passed": True, "by": "bench.checks, every case"})
    document["absent"] = [each for each in absent if each["name"] in names]
    document["targets"] = targets.evaluate(document)
    if decodes:
        decoding.add_to(document, program=program)
    return record.save(out, document), document


def check_device(device: str) -> None:
    """InputError when ``device`` ("cpu", "cuda") is not here."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("Expected a CUDA device, torch finds none: use --device cpu, or a machine with a GPU.")
