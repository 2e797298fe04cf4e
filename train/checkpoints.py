"""Checkpoints of a run: ``torch.distributed.checkpoint`` folders that are whole or absent, written beside the training.

::

    step-0000100/
        .metadata, __R_0.distcp       the tensors, a file a process
        rng-00000.json                the random states of process 0, and so on
        checkpoint.json               step, loop state, digests of the other files; written last

A save copies the tensors to the host and returns; a thread writes them under a hidden name, and the main process
renames the folder when every process has written its part. So whatever kills a process, a folder named ``step-...`` is
whole; its digests tell whether the disk kept it so. Tensors are stored by name and by their place in the whole, so that
any number of processes in any mode can read them.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from retinar.engine.errors import InputError
from retinar.engine.files import sha256_file, write_json
from retinar.train.rng import restore_rng, rng_state, seed_new_process
from retinar.train.world import World

_STEP = re.compile(r"step-(\d{7,})")
_MANIFEST = "checkpoint.json"

# Said from torch's own thread for every run of one process; a filter around the call would not reach it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class Stateful(Protocol):
    """What has a state: nested dicts of tensors, given as they are and read into in place."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder that passed its digests."""

    path: Path
    step: int
    loop: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder. All processes of ``world`` call every method, in the same order."""

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="retinar-checkpoint")
        self._pending: Future[Any] | None = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints present, newest first."""
        if not self.path.is_dir():
            return []
        matches = (_STEP.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        loop: Mapping[str, Any],
        *,
        keep_last: int,
        value: float | None = None,
        keep_best: bool = False,
    ) -> None:
        """Begin to write the checkpoint of ``step`` (unless it is there); older ones go when it is whole.

        ``state``: nested dicts of tensors, copied before the call returns; ``loop``: JSON values of the loop itself;
        ``value``: how good the model is, lower is better. All but the newest ``keep_last`` are removed, and with
        ``keep_best`` the one of the lowest value stays. Waits for the save before. What goes wrong (disk full) is
        raised by the next call or :meth:`wait` as an InputError; nothing half-written is left then.
        """
        self.wait()
        final = self.path / f"step-{step:07d}"
        partial = self.path / f".{final.name}.partial"
        if self.world.on_main(final.exists):
            return
        self.world.on_main(lambda: _fresh(partial, final))
        self.world.together(lambda: _writing(final, lambda: self._own_part(partial)))
        written = self._begin(state, partial, final)
        if self.world.main:
            manifest = {"format": 1, "step": step, "loop": dict(loop), "value": value, "processes": self.world.size}
            written = self._writer.submit(self._complete, written, manifest, final, keep_last, keep_best)
        self._pending = written

    def wait(self) -> None:
        """Until the save in progress is complete. InputError when it failed, in any process."""
        pending, self._pending = self._pending, None
        if self.world.largest(int(pending is not None)):
            self.world.together(lambda: None if pending is None else _finished(pending))

    def close(self) -> None:
        """Let a save in progress end, whatever becomes of it; at the end of a run, :meth:`wait` comes before."""
        if self._pending is not None:
            self._pending.exception()
        self._writer.shutdown()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files have their digests; None when there is none at all.

        A damaged one is set aside (renamed to ``step-N.damaged``) with a printed line and the one before is taken;
        InputError when all are damaged.
        """
        return self.world.on_main(self._newest)

    def load(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        """Read the checkpoint into ``state``'s tensors in place, and set the random states to those saved.

        A process that the saved run did not have begins random numbers of its own, as (rank, step) gives them.
        """
        self.world.together(lambda: self._load(checkpoint, state))

    # --- parts of the above

    def _own_part(self, partial: Path) -> None:
        write_json(partial / f"rng-{self.world.rank:05d}.json", rng_state())

    def _begin(self, state: Mapping[str, Any], partial: Path, final: Path) -> Future[Any]:
        """Copy the tensors; their writing goes on behind the future."""
        writer = dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True)
        alone = self.world.size == 1

        def begin() -> Future[Any]:
            return dcp.async_save(  # type: ignore[return-value]
                dict(state), storage_writer=writer, process_group=self.world.writing, no_dist=alone
            )

        return self.world.together(lambda: _writing(final, begin))

    def _complete(
        self, written: Future[Any], manifest: dict[str, Any], final: Path, keep_last: int, keep_best: bool
    ) -> None:
        """In the main process's thread: all is written; describe it, give it its name, remove what is too old."""
        partial = final.with_name(f".{final.name}.partial")
        try:
            written.result()
            digests = {entry.name: sha256_file(entry) for entry in sorted(partial.iterdir())}
            write_json(partial / _MANIFEST, {**manifest, "sha256": digests})
            _sync_folder(partial)
            os.rename(partial, final)
            _sync_folder(self.path)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _unwritten(final, error) from error
        kept = {*self.steps()[:keep_last], *(self._best() if keep_best else ())}
        for old in self.steps():
            if old in kept:
                continue
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            gone = self.path / f".step-{old:07d}.partial"
            with suppress(OSError):  # the new one is whole: what cannot be removed may stay
                shutil.rmtree(gone, ignore_errors=True)
                os.rename(self.path / f"step-{old:07d}", gone)
                shutil.rmtree(gone)

    def _best(self) -> list[int]:
        """The step of the lowest value, the newest of equals; [] when none has a value."""
        values = {}
        for step in self.steps():
            try:
                manifest = json.loads((self.path / f"step-{step:07d}" / _MANIFEST).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            value = manifest.get("value") if isinstance(manifest, dict) else None
            if isinstance(value, float) and math.isfinite(value):
                values[step] = value
        return [min(values, key=lambda step: (values[step], -step))] if values else []

    def _newest(self) -> Checkpoint | None:
        steps = self.steps()
        for step in steps:
            path = self.path / f"step-{step:07d}"
            try:
                manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
                for name, digest in manifest["sha256"].items():
                    if sha256_file(path / name) != digest:
                        raise ValueError(f"{name} has another digest")
                return Checkpoint(path, int(manifest["step"]), manifest["loop"])
            except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
                aside = path.with_name(f"{path.name}.damaged")
                print(f"checkpoint {path} is damaged ({error}): set aside as {aside.name}.", file=sys.stderr)
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)
        damaged = len(list(self.path.glob("step-*.damaged")))
        if damaged:  # of this call or of one before
            raise InputError(
                f"Expected a whole checkpoint in {self.path}, found {damaged} damaged: start a new run in "
                "another --out."
            )
        return None

    def _load(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        try:
            dcp.load(
                state, checkpoint_id=checkpoint.path, process_group=self.world.control, no_dist=self.world.size == 1
            )
        except CheckpointException as error:
            cause = _cause(error)
            if isinstance(cause, KeyboardInterrupt):
                raise cause from error
            raise InputError(
                f"Expected the checkpoint {checkpoint.path} to hold this run's tensors, found: {cause}"
            ) from cause
        states = checkpoint.path / f"rng-{self.world.rank:05d}.json"
        if states.exists():
            restore_rng(json.loads(states.read_text(encoding="utf-8")))
        else:
            seed_new_process(self.world.rank, checkpoint.step)


def _fresh(partial: Path, final: Path) -> None:
    def make() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    _writing(final, make)


def _writing(final: Path, work: Any) -> Any:
    """``work()``; what the file system refuses is an InputError."""
    try:
        return work()
    except (OSError, RuntimeError, CheckpointException) as error:
        raise _unwritten(final, error) from error


def _finished(pending: Future[Any]) -> None:
    try:
        pending.result()
    except CheckpointException as error:
        raise InputError(f"Expected to write a checkpoint, found {_cause(error)}: go on with --resume.") from error


def _unwritten(final: Path, error: BaseException) -> BaseException:
    cause = _cause(error) if isinstance(error, CheckpointException) else error
    if not isinstance(cause, (OSError, RuntimeError)):
        return cause
    return InputError(
        f"Expected to write the checkpoint {final}, found {cause}: make room or fix the disk, then go on with --resume."
    )


def _cause(error: BaseException) -> BaseException:
    """CheckpointException is no Exception and hides the reason in a dict: the first process's reason."""
    while isinstance(error, CheckpointException):
        found = next(iter(error.failures.values()))
        error = found[0] if isinstance(found, tuple) else found
    return error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
