"""A training process that dies by SIGKILL at a chosen point: ``python -m tests.train.killed_run CODES RUN POINT [N]``.

Points: none; step N (after the backward pass of step N, before the optimizer's); tensors N (the Nth checkpoint, its
tensors written and its manifest not); rename N (all written, before the Nth rename); prune N (the first removal of an
old checkpoint half done).
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from retinar.engine.progress import silent
from retinar.train import checkpoints, gpt
from tests.train.tiny import tiny_config


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(module: Any, name: str, number: int, *, when: Any = lambda *_: True) -> None:
    """Replace ``module.name`` by a function that dies in its call ``number`` (from 1) among those ``when`` counts."""
    original, calls = getattr(module, name), [0]

    def counting(*arguments: Any, **keywords: Any) -> Any:
        if when(*arguments):
            calls[0] += 1
            if calls[0] == number:
                die()
        return original(*arguments, **keywords)

    setattr(module, name, counting)


def main(codes: str, run: str, point: str = "none", number: str = "1") -> None:
    torch.set_num_threads(1)
    count = int(number)
    if point == "step":
        die_at_call(gpt, "clip_gradients", count)
    elif point == "tensors":
        die_at_call(checkpoints, "write_json", count, when=lambda path, *_: Path(path).name == "checkpoint.json")
    elif point == "rename":
        die_at_call(checkpoints.os, "rename", count, when=lambda path, *_: str(path).endswith(".partial"))
    elif point == "prune":

        def half(path: Any, *_: Any, **__: Any) -> None:
            next(Path(path).glob("*.distcp")).unlink()
            die()

        original = shutil.rmtree
        checkpoints.shutil.rmtree = lambda path, *a, **k: (half if Path(path).exists() else original)(path, *a, **k)
    gpt.train_gpt(tiny_config(keep_last=1), codes, run, valid=codes, resume=True, progress=silent)


if __name__ == "__main__":
    main(*sys.argv[1:])
