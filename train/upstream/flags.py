"""Flags as LlamaGen's scripts take them: what cannot be read or done is one sentence, and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from retinar.engine.errors import InputError

PREFIX = "python -m retinar.train.upstream"


class Flags(argparse.ArgumentParser):
    """A parser whose complaints are InputErrors. ``script`` is LlamaGen's file without .py, ``about`` what it does."""

    def __init__(self, script: str, about: str) -> None:
        super().__init__(prog=f"{PREFIX}.{script}", description=about)

    def error(self, message: str) -> NoReturn:
        refuse(f"the flags of LlamaGen's {self.prog.rpartition('.')[2]}.py", message, f"see {self.prog} --help")

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        """The flags; ``None`` takes them from the command line. InputError for what is unknown, with a near match."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            self.error(f"unknown {flag}" + (f" (did you mean {near[0]}?)" if near else ""))
        return found


def refuse(expected: str, found: str, advice: str) -> NoReturn:
    """Raise the InputError "Expected ..., found ...: do ..."; all processes of a launch do, the first one prints it."""
    error = InputError(f"Expected {expected}, found {found}: {advice}.")
    error.elsewhere = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0"  # type: ignore[attr-defined]
    raise error


def refuse_srun() -> None:
    """Refuse processes that Slurm's srun started by itself: without torchrun's variables each would train alone."""
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        refuse(
            "the variables of torchrun (RANK, WORLD_SIZE, MASTER_ADDR)",
            f"{os.environ['SLURM_STEP_NUM_TASKS']} tasks of srun without them",
            "start one torchrun on each machine, as in srun --ntasks-per-node=1 torchrun --nnodes ... -m ...",
        )


def exit_code(work: Callable[[], int]) -> int:
    """What ``work`` returns; 2 after one sentence for bad input or a refusing file system, 130 after Ctrl-C."""
    try:
        return work()
    except InputError as error:
        if not getattr(error, "elsewhere", False):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        reason = " ".join((error.strerror or str(error) or type(error).__name__).split())
        where = error.filename if error.filename is not None else "the paths given"
        print(
            f"error: Expected to read and write {where}, found that it fails ({reason}): check the path and the disk.",
            file=sys.stderr,
            flush=True,
        )
        return 2
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr, flush=True)
        return 130
