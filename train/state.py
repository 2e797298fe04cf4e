"""A run's folder on disk: its config, its checkpoints (whole or absent), the random states, the exported model.

::

    RUN/config.json                       the complete config, commit and versions
    RUN/metrics.jsonl, RUN/tensorboard/   what was reported
    RUN/checkpoints/step-0000100/         torch.distributed.checkpoint, also with one process
        .metadata, __0_0.distcp           the tensors
        rng-00000.json                    the random states of process 0
        checkpoint.json                   step, loop state, digests of the other files; written last
    RUN/model/                            the exported folder, at the end

A checkpoint is written under a hidden name and renamed when complete, so whatever kills the process, a folder named
``step-...`` is whole; its digests tell whether the disk kept it so.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from retinar.engine.errors import InputError
from retinar.engine.files import sha256_file, write_json
from retinar.train.config import MUTABLE_KEYS, flatten
from retinar.train.rng import restore_rng, rng_state
from retinar.train.versions import session

_STEP = re.compile(r"step-(\d{7,})")
_MANIFEST = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder that passed its digests."""

    path: Path
    step: int
    loop: dict[str, Any]


class RunFolder:
    """One run's folder, held by one process at a time. Make it with :meth:`open`; a context manager."""

    def __init__(self, path: Path, lock: Any) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self._lock = lock

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        task: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> RunFolder:
        """Start a run in a new or empty folder, or go on with the one that is there (``resume``).

        ``config`` is the complete config as JSON values; ``inputs`` names what else decides the run's course by content
        (digests of data and of initial weights, not paths). InputError when the folder holds a run and ``resume`` is
        not set, holds something else, is in use, or when more than ``config.MUTABLE_KEYS`` differs from the stored run.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise InputError(f"Expected a folder for the run, found the file {path}: choose another --out.")
        strangers = sorted(entry.name for entry in path.iterdir() if entry.name[0] != ".") if path.exists() else []
        if strangers and not (path / "config.json").exists():
            raise InputError(
                f"Expected an empty folder for the run, found {strangers[0]} in {path}: choose another --out."
            )
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "a")  # noqa: SIM115 (held while the run folder is)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise InputError(
                f"Expected a free run folder, found another process at work in {path}: wait for it."
            ) from None
        folder = cls(path, lock)
        try:
            folder._enter_config(task, dict(config), dict(inputs or {}), resume)
            for leftover in [*path.glob(".*.partial"), *folder.checkpoints.glob(".*.partial")]:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        except BaseException:
            folder.close()
            raise
        return folder

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _enter_config(self, task: str, config: dict[str, Any], inputs: dict[str, Any], resume: bool) -> None:
        file = self.path / "config.json"
        if not file.exists():
            if resume:
                print(f"no run to resume in {self.path}: starting at step 0.", file=sys.stderr)
            write_json(
                file, {"format": 1, "task": task, **session(), "config": config, "inputs": inputs, "resumed": []}
            )
            return
        if not resume:
            raise InputError(
                f"Expected a new folder for the run, found a run in {self.path}: add --resume to go on with it, "
                "or choose another --out."
            )
        stored = read_run(self.path)
        if stored["task"] != task:
            raise InputError(f"Expected a {task} run to resume in {self.path}, found a {stored['task']} run.")
        before, after = flatten(stored["config"]), flatten(config)
        changed = [
            f"{key} ({before.get(key)!r}, now {after.get(key)!r})"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key) and key not in MUTABLE_KEYS
        ]
        changed += [
            f"{key} ({'none given' if inputs[key] is None else 'other contents'})"
            for key in sorted(inputs)
            if stored["inputs"].get(key) != inputs[key]
        ]
        if changed:
            raise InputError(
                f"Expected the config of the run in {self.path}, found other values of {', '.join(changed)}: "
                "set them back, or start a new run in another --out."
            )
        stored["config"] = config
        stored["resumed"].append(session())
        write_json(file, stored)

    # --- checkpoints

    def steps(self) -> list[int]:
        """Steps of the checkpoints present, newest first."""
        if not self.checkpoints.is_dir():
            return []
        matches = (_STEP.fullmatch(entry.name) for entry in self.checkpoints.iterdir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def save(self, step: int, state: Mapping[str, Any], loop: Mapping[str, Any], *, keep_last: int) -> Path:
        """Write the checkpoint of ``step`` (unless it is there) and remove all but the newest ``keep_last``.

        ``state``: nested dicts of tensors; ``loop``: JSON values of the loop itself. InputError when it cannot be
        written (disk full); nothing half-written is left then, and older checkpoints stay.
        """
        final = self.checkpoints / f"step-{step:07d}"
        if final.exists():
            return final
        partial = self.checkpoints / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            _save_tensors(state, partial)
            write_json(partial / "rng-00000.json", rng_state())
            digests = {entry.name: sha256_file(entry) for entry in sorted(partial.iterdir())}
            write_json(partial / _MANIFEST, {"format": 1, "step": step, "loop": dict(loop), "sha256": digests})
            _sync_folder(partial)
            os.rename(partial, final)
            _sync_folder(self.checkpoints)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, (OSError, RuntimeError)):
                raise InputError(
                    f"Expected to write the checkpoint {final}, found {error}: make room or fix the disk, then go on "
                    "with --resume."
                ) from error
            raise
        for old in self.steps()[keep_last:]:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            gone = self.checkpoints / f".step-{old:07d}.partial"
            shutil.rmtree(gone, ignore_errors=True)
            os.rename(self.checkpoints / f"step-{old:07d}", gone)
            shutil.rmtree(gone)
        return final

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files have their digests; None when there is none at all.

        A damaged one is set aside (renamed to ``step-N.damaged``) with a printed line and the one before is taken;
        InputError when all are damaged.
        """
        steps = self.steps()
        for step in steps:
            path = self.checkpoints / f"step-{step:07d}"
            try:
                manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
                for name, digest in manifest["sha256"].items():
                    if sha256_file(path / name) != digest:
                        raise ValueError(f"{name} has another digest")
                return Checkpoint(path, int(manifest["step"]), manifest["loop"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                aside = path.with_name(f"{path.name}.damaged")
                print(f"checkpoint {path} is damaged ({error}): set aside as {aside.name}.", file=sys.stderr)
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)
        if steps:
            raise InputError(
                f"Expected a whole checkpoint in {self.checkpoints}, found {len(steps)} damaged: start a new run in "
                "another --out."
            )
        return None

    def load(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        """Read the checkpoint into ``state``'s tensors in place, and set the random states to those saved."""
        try:
            with _quiet():
                dcp.load(state, checkpoint_id=checkpoint.path, no_dist=True)
        except CheckpointException as error:
            cause = _cause(error)
            raise InputError(
                f"Expected the checkpoint {checkpoint.path} to hold this run's tensors, found: {cause}"
            ) from cause
        restore_rng(json.loads((checkpoint.path / "rng-00000.json").read_text(encoding="utf-8")))


def read_run(path: Path | str) -> dict[str, Any]:
    """A run folder's config.json; InputError when it is missing or no run's."""
    file = Path(path) / "config.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if not all(key in stored for key in ("task", "config", "inputs", "resumed")):
            raise ValueError("it lacks a run's keys")
    except FileNotFoundError:
        raise InputError(f"Expected a run in {path}, found no config.json: check the path.") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"Expected the config of a run in {file}, found something else ({error}).") from None
    return stored


# --- torch.distributed.checkpoint without its noise


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _save_tensors(state: Mapping[str, Any], folder: Path) -> None:
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    try:
        with _quiet():
            dcp.save(dict(state), storage_writer=writer, no_dist=True)
    except CheckpointException as error:
        _reraise(error)


def _reraise(error: CheckpointException) -> NoReturn:
    cause = _cause(error)
    raise cause from None


def _cause(error: CheckpointException) -> BaseException:
    """CheckpointException is no Exception and hides the reason in a dict: the first process's reason."""
    return next(iter(error.failures.values()))[0]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
