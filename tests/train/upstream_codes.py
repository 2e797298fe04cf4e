"""Codes in LlamaGen's layout and short trainings on them, for the tests of its entry points.

``python -m tests.train.upstream_codes SCRIPT FLAGS...`` runs train_c2i or train_c2i_fsdp without class dropout, which
has no flag: then nothing is random, and a run is the same for any number of processes.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from retinar.train.config import GPTTrainConfig
from retinar.train.upstream import gpt_flags, train_c2i, train_c2i_fsdp, training

TOKENS, VOCAB = 256, 32  # of the smallest image size, at 16 pixels a code


def write_upstream_codes(
    path: Path, *, images: int = 8, views: int = 2, stem: str = "imagenet256", tokens: int = TOKENS, seed: int = 0
) -> Path:
    """``path``/{stem}_codes and _labels as LlamaGen's extraction leaves them; labels alternate between 0 and 1."""
    random = np.random.default_rng(seed)
    folders = [path / f"{stem}_{kind}" for kind in ("codes", "labels")]
    for folder in folders:
        folder.mkdir(parents=True)
    for i in range(images):
        codes = random.integers(0, VOCAB // 2, size=(1, views, tokens)) + VOCAB // 2 * (i % 2)
        np.save(folders[0] / f"{i}.npy", codes)
        np.save(folders[1] / f"{i}.npy", np.array([i % 2]))
    return path


def flags(root: Path, codes: Path, *more: str) -> list[str]:
    """A training of the smallest model: 4 steps an epoch at the 8 images above, everything random in use."""
    return [
        *("--code-path", str(codes), "--cloud-save-path", str(root / "cloud"), "--results-dir", str(root / "results")),
        *("--gpt-model", "GPT-tiny", "--vocab-size", str(VOCAB), "--num-classes", "2", "--lr", "1e-3", "--no-compile"),
        *("--global-batch-size", "2", "--log-every", "2", "--ckpt-every", "2", "--epochs", "1"),
        *more,
    ]


def quiet_config(args: Namespace) -> GPTTrainConfig:
    """What the flags mean, labels never dropped."""
    config = gpt_flags.config_of(args)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, class_dropout_prob=0.0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    training.config_of = quiet_config
    sys.exit({"train_c2i": train_c2i, "train_c2i_fsdp": train_c2i_fsdp}[sys.argv[1]].main(sys.argv[2:]))
