"""A run's folder on disk: its config, its checkpoints, what it reported, the exported model.

::

    RUN/config.json                       the complete config, commit and versions
    RUN/metrics.jsonl, RUN/tensorboard/   what was reported
    RUN/checkpoints/step-0000100/         see checkpoints.py
    RUN/model/, RUN/loss.png              the exported folder and the curves, at the end
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from retinar.engine.errors import InputError
from retinar.engine.files import write_json
from retinar.train.checkpoints import Checkpoint, Checkpoints, Stateful
from retinar.train.config import MUTABLE_KEYS, flatten
from retinar.train.versions import session
from retinar.train.world import World


class RunFolder:
    """One run's folder, held by one run at a time. Make it with :meth:`open`; a context manager."""

    again: str | None = "the same command with --resume"

    def __init__(self, path: Path, lock: Any, world: World) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self._lock, self._checkpoints = lock, Checkpoints(self.checkpoints, world)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        task: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
        resume: bool = False,
        defaults: Mapping[str, Any] | None = None,
        world: World | None = None,
    ) -> RunFolder:
        """Start a run in a new or empty folder, or go on with the one that is there (``resume``).

        ``config`` is the complete config as JSON values; ``inputs`` names what else decides the run's course by content
        (digests of data and of initial weights, not paths). InputError when the folder holds a run and ``resume`` is
        not set, holds something else, is in use, or when more than ``config.MUTABLE_KEYS`` differs from the stored run.
        What a stored config lacks, written by an older version, is taken as ``defaults`` has it.
        All processes of ``world`` (None: this one alone) call it; the main one holds the folder.
        """
        path, world = Path(path), world or World(torch.device("cpu"))
        held: list[RunFolder] = []
        world.on_main(
            lambda: held.append(
                cls._hold(path, task, dict(config), dict(inputs or {}), resume, dict(defaults or {}), world)
            )
        )
        return held[0] if held else cls(path, None, world)

    @classmethod
    def _hold(
        cls,
        path: Path,
        task: str,
        config: dict[str, Any],
        inputs: dict[str, Any],
        resume: bool,
        defaults: dict[str, Any],
        world: World,
    ) -> RunFolder:
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
        folder = cls(path, lock, world)
        try:
            folder._enter_config(task, config, inputs, resume, defaults)
            for leftover in [*path.glob(".*.partial"), *folder.checkpoints.glob(".*.partial")]:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        except BaseException:
            folder.close()
            raise
        return folder

    def close(self) -> None:
        """Let other runs have the folder, once a checkpoint in progress is through."""
        self._checkpoints.close()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _enter_config(
        self, task: str, config: dict[str, Any], inputs: dict[str, Any], resume: bool, defaults: dict[str, Any]
    ) -> None:
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
        before, after = flatten({**defaults, **stored["config"]}), flatten(config)
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

    # --- what the loop needs of it: see loop.Store

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, see :meth:`Checkpoints.newest`."""
        return self._checkpoints.newest()

    def load(self, checkpoint: Checkpoint, task: Stateful) -> None:
        """Bring a task's tensors and the random states to a checkpoint's."""
        state = task.state_dict()
        self._checkpoints.load(checkpoint, state)
        task.load_state_dict(state)

    def save(
        self,
        step: int,
        task: Stateful,
        loop: Mapping[str, Any],
        *,
        keep_last: int,
        value: float | None = None,
        keep_best: bool = False,
    ) -> None:
        """Begin to write a checkpoint, see :meth:`Checkpoints.save`."""
        self._checkpoints.save(step, task.state_dict(), loop, keep_last=keep_last, value=value, keep_best=keep_best)

    def wait(self) -> None:
        """Until the checkpoint in progress is complete."""
        self._checkpoints.wait()

    def steps(self) -> list[int]:
        """Steps of the checkpoints present, newest first."""
        return self._checkpoints.steps()


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
