"""Several GPUs share the images of one folder: a process for each, and one that watches them.

The parent has checked everything, claimed the folder and found what is missing, as a single process would; its
children load the checkpoint and write their shares; the parent then completes the folder. Nothing in a file tells which
process made it: where bits do not depend on the batch (`Sampler`), the folder is to the byte the one of one process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from retinar.engine.children import Child, reporting, stop, watch, without_interrupts
from retinar.engine.errors import InputError
from retinar.engine.generate import Limits, save_images
from retinar.engine.image_folder import Item
from retinar.engine.progress import Bar, Progress, SilentBar, silent
from retinar.engine.provenance import Origin
from retinar.engine.request import Request
from retinar.engine.sampler import Sampler

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
    items: Sequence[Item[Request]]
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
        self, sampler: Sampler, out: Path, missing: Sequence[Item[Request]], limits: Limits, progress: Progress
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
                with without_interrupts():
                    for device in devices:
                        children.append(Child(_work, device, self.source, device))
                bar.advance(0, f"loading in {len(devices)} processes")
                for child, share in zip(children, shares, strict=True):
                    child.send(Job(out, share, limits, sampler.origin, torch.get_num_threads()))
                watch(children, bar, len(missing))
            finally:
                stop(children)


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
    def progress(label: str, total: int | None = None) -> Bar:
        if label == "codes":
            return CountingBar(line, label, total)
        line.send(("note", label))
        return silent(label, total)

    with reporting(line):
        job: Job = line.recv()
        torch.set_num_threads(job.threads)
        sampler = source.load(device)
        if _files(sampler.origin) != _files(job.origin):
            raise InputError(f"{source.model} was changed while it was being loaded; run the same command again")
        with closing(save_images(sampler, job.out, job.items, job.limits, progress)) as saved:
            for _ in saved:
                line.send(("image", None))


def _files(origin: Origin) -> tuple[str, str | None, str]:
    return origin.checkpoint, origin.tokenizer, origin.dtype
