"""Several GPUs share the images of one folder: a process for each, and one that watches them.

The parent has checked everything, claimed the folder and found what is missing, as a single process would; its
children load the checkpoint and write their shares; the parent then completes the folder. Nothing in a file tells which
process made it: where bits do not depend on the batch (`Sampler`), the folder is to the byte the one of one process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from retinar.engine.errors import InputError
from retinar.engine.generate import Item, Limits, save_images
from retinar.engine.progress import Bar, Progress, SilentBar, silent
from retinar.engine.provenance import Origin
from retinar.engine.sampler import Sampler

GRACE = 10.0  # seconds for a process that was told to stop: it finishes the file that it is writing
REPORT = 0.1  # seconds between two counts of a process


@dataclass(frozen=True)
class Source:
    """The arguments of `Sampler.from_pretrained` but for the device: what every process loads for itself."""

    model: Path
    tokenizer: Path | None = None
    config: str | None = None
    dtype: str | None = None
    batch_invariant: bool = False
    pin: bool = False

    def load(self, device: str | None) -> Sampler:
        return Sampler.from_pretrained(
            self.model,
            self.tokenizer,
            device,
            self.dtype,
            config=self.config,
            batch_invariant=self.batch_invariant,
            pin=self.pin,
        )


class Job(NamedTuple):
    """A process's share. ``origin`` and ``threads`` are the parent's: files and bits must be those of one process."""

    out: Path
    items: Sequence[Item]
    limits: Limits
    origin: Origin
    threads: int


@dataclass(frozen=True)
class Shards:
    """`retinar.engine.generate.Make`: a process for each of ``devices`` (cuda:0, cuda:1, ...; one may be named twice).

    The sampler that it is given must be loaded from ``source``, and is unloaded to leave its GPU to the process that
    works there. A process's InputError or OSError is raised here as it is, the death of one is an InputError; both,
    and Ctrl-C, stop the others and leave a folder that the same call continues.
    """

    source: Source
    devices: Sequence[str]

    def __call__(
        self, sampler: Sampler, out: Path, missing: Sequence[Item], limits: Limits, progress: Progress
    ) -> None:
        if not missing:
            return
        sampler.unload()
        devices = self.devices[: len(missing)]
        # Turn by turn: every process has its part of every class, and of whatever an interruption has left.
        shares = [missing[first :: len(devices)] for first in range(len(devices))]
        children: list[Child] = []
        with progress("codes", len(missing) * sampler.config.block_size) as bar:
            try:
                with _without_interrupts():
                    for device in devices:
                        children.append(Child(self.source, device))
                bar.advance(0, f"loading in {len(devices)} processes")
                for child, share in zip(children, shares, strict=True):
                    child.begin(Job(out, share, limits, sampler.origin, torch.get_num_threads()))
                _watch(children, bar, len(missing))
            finally:
                _stop(children)


class Child:
    """A process on ``device`` and the line to it; nothing shared, so that no death can block the others."""

    def __init__(self, source: Source, device: str) -> None:
        context = get_context("spawn")  # a forked process cannot use CUDA
        self.device, self.done = device, False
        self.line, end = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(end, source, device), daemon=True)
        self.process.start()
        end.close()  # so that the line ends with the process

    def begin(self, job: Job) -> None:
        with suppress(OSError):  # dead already: `_watch` tells
            self.line.send(job)

    def heard(self) -> tuple[str, Any]:
        """The next message. InputError when the process has died instead."""
        try:
            return self.line.recv()
        except (EOFError, OSError):
            raise self.death() from None

    def death(self) -> InputError:
        self.process.join(GRACE)
        code = self.process.exitcode
        how = f"exit code {code}"
        with suppress(ValueError, TypeError):
            how += f", {signal.Signals(-code).name}"  # type: ignore[operator]
        return InputError(
            f"the process for {self.device} ended before its images were made ({how}); "
            "run the same command again to go on where it stopped"
        )


def _watch(children: Sequence[Child], bar: Bar, total: int) -> None:
    """Pass on what the processes count until all are done. Raises what one of them raised, or its death."""
    running = {child.line: child for child in children}
    done = 0
    while running:
        heard = wait(list(running), timeout=1.0)
        for line in heard:
            child = running[line]  # type: ignore[index]
            kind, value = child.heard()
            if kind == "codes":
                bar.advance(value)
            elif kind == "image":
                done += 1
                bar.advance(0, f"{done} of {total} images")
            elif kind == "note":
                bar.advance(0, f"{value} on {child.device}")
            elif kind == "done":
                child.done = True
                del running[child.line]
            elif isinstance(value, BaseException):
                raise value
            else:
                raise RuntimeError(f"the process for {child.device} failed:\n{value}")
        for child in running.values():  # a process of its own may hold a dead child's line open
            if not heard and child.process.exitcode is not None and not child.line.poll():
                raise child.death()


def _stop(children: Sequence[Child]) -> None:
    """End those that still work, at once, and see all of them out."""
    for child in children:
        child.line.close()
        if not child.done:
            child.process.terminate()
    deadline = time.monotonic() + GRACE
    for child in children:
        child.process.join(max(0.0, deadline - time.monotonic()))
        if child.process.exitcode is None:
            child.process.kill()
            child.process.join()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C reaches the whole group of processes. Those started here ignore it from their first instruction: the
    parent stops them.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can signals be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# --- in the child


class CountingBar(SilentBar):
    """Sends its counts down the line, a few times a second."""

    def __init__(self, line: Connection, label: str, total: int | None) -> None:
        super().__init__(label, total)
        self.line, self.told, self.sent = line, 0, 0.0

    def advance(self, count: int = 1, note: str | None = None) -> None:
        super().advance(count, note)
        if time.monotonic() - self.sent >= REPORT or self.done == self.total:
            self.line.send(("codes", self.done - self.told))
            self.told, self.sent = self.done, time.monotonic()


def _work(line: Connection, source: Source, device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # closes files and threads on the way
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # the parent has loaded the same files and passed on what they gave cause for

    def progress(label: str, total: int | None = None) -> Bar:
        if label == "codes":
            return CountingBar(line, label, total)
        line.send(("note", label))
        return silent(label, total)

    try:
        job: Job = line.recv()
        torch.set_num_threads(job.threads)
        sampler = source.load(device)
        if _files(sampler.origin) != _files(job.origin):
            raise InputError(f"{source.model} was changed while it was being loaded; run the same command again")
        with closing(save_images(sampler, job.out, job.items, job.limits, progress)) as saved:
            for _ in saved:
                line.send(("image", None))
        line.send(("done", None))
    except (InputError, OSError, ModuleNotFoundError) as error:
        _tell(line, error)
    except Exception:
        _tell(line, traceback.format_exc())


def _files(origin: Origin) -> tuple[str, str, str]:
    return origin.checkpoint, origin.tokenizer, origin.dtype


def _tell(line: Connection, failure: object) -> None:
    with suppress(OSError):  # the parent is gone, which was the failure
        line.send(("failed", failure))


def _end_with_parent() -> None:
    """A parent that was killed stops nobody: its children do it themselves."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)
