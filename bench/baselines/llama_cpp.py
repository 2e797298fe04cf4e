"""llama.cpp on the same CPU: its ``llama-batched-bench``, from a build that the user names (``--llama-cpp``). Nothing
of it is in this repository.

Its model has the shapes of ours (`gguf_model`), and as many sequences decode together as a guided step has rows, each
with a cache of its own. Its step ends at the logits: it neither mixes guidance nor draws, which ours do. Of a 16-bit
cache as fp16 or bf16, with flash attention or without, the fastest counts; everything else is as it comes.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from retinar.bench import roofline
from retinar.bench.baselines import gguf_model
from retinar.bench.deadline import Deadline
from retinar.engine.config import GPTConfig
from retinar.engine.errors import InputError
from retinar.kernels import ops

PROGRAM = "llama-batched-bench"
FOLDERS = ("", "bin", "build/bin")
STEPS = 32
"""Of a window: the program tells the mean of those alone. The last one fills the context."""
WINDOWS = 3


class Way(NamedTuple):
    """What llama.cpp's user chooses: the type of keys and values, and flash attention ("on", "off")."""

    cache: str
    flash: str


WAYS = tuple(Way(cache, flash) for cache in ("f16", "bf16") for flash in ("on", "off"))
DTYPES = {"f16": "float16", "bf16": "bfloat16"}


class Failed(Exception):
    """Why llama.cpp has no time, in words for people."""


class Found(NamedTuple):
    """``seconds``: of a step, the mean of each window."""

    seconds: list[float]
    way: Way


def check(path: Path) -> Path:
    """The program in a build of llama.cpp, absolute; InputError when it is not there, or when the package is missing
    that writes its models."""
    candidates = [path] if path.is_file() else [path / folder / PROGRAM for folder in FOLDERS]
    found = next((each for each in candidates if each.is_file() and os.access(each, os.X_OK)), None)
    if found is None or not found.name.startswith(PROGRAM):
        raise InputError(
            f"Expected llama.cpp's program {PROGRAM} at {path} or in its bin or build/bin, found none that can be run: "
            f"build it with `cmake -B build && cmake --build build --target {PROGRAM}` there, or correct --llama-cpp."
        )
    if gguf_model.missing():
        raise InputError(
            f"Expected the package {gguf_model.PACKAGE}, which writes llama.cpp's models, found none: "
            f"run `pip install {gguf_model.PACKAGE}`, or leave --llama-cpp out."
        )
    return found.resolve()


def version(program: Path) -> str | None:
    """As the program states it; None where it states none."""
    try:
        done = _run([str(program), "--version"], 20.0)
    except Failed:
        return None
    lines = f"{done.stdout}\n{done.stderr}".splitlines()
    return next((line.removeprefix("version: ") for line in lines if line.startswith("version: ")), None)


def steps_of(context: int) -> int:
    """Steps of a window that ends at a context."""
    return min(STEPS, context // 2)


def work_of(config: GPTConfig, images: int, context: int, kind: str) -> roofline.Work:
    """A step in the middle of a window, rows of ``images`` guided images, weights of ``kind``."""
    middle = context - steps_of(context) // 2
    work = roofline.work_of(config, images, middle, torch.bfloat16, torch.bfloat16)
    return work._replace(weight_bytes=int(work.weight_bytes / 2 * gguf_model.BYTES[kind]))


class LlamaCpp:
    """Measures one model in the kinds of `gguf_model`. Files are written when first needed; ``close`` removes them."""

    def __init__(self, program: Path, weights: ops.DecodeWeights, config: GPTConfig, threads: int) -> None:
        self.program, self.weights, self.config, self.threads = program, weights, config, threads
        self._folder = tempfile.TemporaryDirectory(prefix="retinar-llama-cpp-")

    def close(self) -> None:
        self._folder.cleanup()

    def measure(self, kind: str, rows: int, context: int, seconds: float) -> Found:
        """``rows`` sequences up to a context of ``context`` slots, in at most so many seconds: each way once, and the
        fastest again if there is time. Raises Failed."""
        deadline = Deadline(seconds)
        model = self._model(kind)
        tried: dict[Way, float] = {}
        reasons: list[str] = []
        for index, way in enumerate(WAYS):
            share = deadline.left / (len(WAYS) - index + 1)
            try:
                tried[way] = self._windows(model, rows, context, way, 1, share)[0]
            except Failed as error:  # a build may lack a type of cache
                reasons.append(str(error))
        if not tried:
            raise Failed(reasons[0])
        best = min(tried, key=lambda way: tried[way])
        try:
            return Found(self._windows(model, rows, context, best, WINDOWS, deadline.left), best)
        except Failed:
            return Found([tried[best]], best)

    def _model(self, kind: str) -> Path:
        path = Path(self._folder.name) / f"{kind}.gguf"
        if not path.is_file():
            part = path.with_suffix(".part")
            try:
                gguf_model.write(part, self.weights, self.config, kind).rename(path)
            except OSError as error:
                part.unlink(missing_ok=True)
                raise Failed(f"its model could not be written to {path.parent} ({error.strerror})") from error
        return path

    def _windows(self, model: Path, rows: int, context: int, way: Way, count: int, seconds: float) -> list[float]:
        """Mean seconds of a step in each of ``count`` windows."""
        steps, threads = steps_of(context), str(self.threads)
        command = [str(self.program), "-m", str(model), "-dev", "none", "-t", threads, "-tb", threads]
        command += ["-c", str(rows * context), "-npp", str(context - steps), "-ntg", str(steps), "-pps"]
        command += ["-npl", ",".join([str(rows)] * count), "-ctk", way.cache, "-ctv", way.cache, "-fa", way.flash]
        done = _run([*command, "--output-format", "jsonl"], seconds)
        if done.returncode:
            raise Failed(f"{PROGRAM} ended with {_ended(done.returncode)}: {_last(done.stderr or done.stdout)}")
        return parse(done.stdout, rows, context, count)


def parse(told: str, rows: int, context: int, count: int) -> list[float]:
    """Mean seconds of a step in each window, from lines of JSON among others. Raises Failed where there are not
    ``count`` of them, or where the sequences shared one cache."""
    steps, found = steps_of(context), []
    for line in told.splitlines():
        try:
            window = json.loads(line[line.index("{") :])
            key = window["pl"], window["tg"], window["pp"]
            slots, seconds = int(window["n_kv"]), float(window["t_tg"])
        except (ValueError, KeyError, TypeError):
            continue
        if key != (rows, steps, context - steps) or not seconds > 0:
            continue
        if slots != rows * context:  # the prompt is processed once; newer ones then copy it for each sequence
            raise Failed(f"its {rows} sequences share one cache of {slots} slots: it needs a newer llama.cpp")
        found.append(seconds / steps)
    if len(found) != count:
        raise Failed(f"{PROGRAM} told {len(found)} of {count} times: {_last(told)}")
    return found


def _run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    if seconds <= 0:
        raise Failed("no time was left for it")
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", errors="replace",
            timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"it took longer than the {seconds:.2g} s that it was given") from None
    except OSError as error:
        raise Failed(f"{PROGRAM} cannot be run ({error.strerror})") from error


def _ended(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _last(told: str) -> str:
    """The last line that says something, at most 200 characters of it."""
    return next((line.strip()[:200] for line in reversed(told.splitlines()) if line.strip()), "it said nothing")
