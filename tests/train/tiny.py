"""Tiny codes and a tiny run, shared by the tests of transformer training and by the processes they kill."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from retinar.engine.config import GPTConfig
from retinar.train.config import GPTTrainConfig, OptimConfig

CLASSES = ["healthy", "npdr"]
GRID, VOCAB = 4, 64


def write_codes(folder: Path, *, images: int = 12, views: int = 2, seed: int = 0, **meta: Any) -> Path:
    """Packed codes that can be learned: every image repeats a few codes of its class."""
    random = np.random.default_rng(seed)
    labels = np.arange(images, dtype=np.int64) % 2
    codes = random.integers(0, 8, size=(images, views, GRID * GRID)) + 8 * labels[:, None, None]
    folder.mkdir(parents=True)
    np.save(folder / "codes.npy", codes.astype(np.uint16))
    np.save(folder / "labels.npy", labels)
    described = {
        "format": 1,
        "kind": "codes",
        "classes": CLASSES,
        "grid": GRID,
        "views": views,
        "split": "train",
        "tokenizer_config": {"codebook_size": VOCAB},
        "tokenizer_digest": None,
    }
    (folder / "meta.json").write_text(json.dumps(described | meta))
    return folder


def tiny_config(**changes: Any) -> GPTTrainConfig:
    """Every dropout, the average, accumulation, two views: all that a resume could get wrong."""
    model = GPTConfig(
        n_layer=2,
        n_head=2,
        dim=32,
        multiple_of=32,
        vocab_size=VOCAB,
        num_classes=2,
        grid=GRID,
        token_dropout_p=0.1,
        attn_dropout_p=0.1,
        resid_dropout_p=0.1,
        ffn_dropout_p=0.1,
        class_dropout_prob=0.1,
    )
    values: dict[str, Any] = {
        "recipe": "tiny",
        "model": model,
        "optim": OptimConfig(lr=3e-3, warmup_steps=2, schedule="cosine", final_lr_ratio=0.1),
        "batch_size": 8,
        "accumulation": 2,
        "steps": 14,
        "precision": "fp32",
        "ema_decay": 0.9,
        "log_every": 3,
        "eval_every": 4,
        "checkpoint_every": 4,
        "device": "cpu",
        "tensorboard": False,
        "meters": False,
    }
    return GPTTrainConfig(**{**values, **changes})


def quiet_config(**changes: Any) -> GPTTrainConfig:
    """tiny_config without any dropout."""
    config = tiny_config(**changes)
    names = ("token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p", "class_dropout_prob")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **dict.fromkeys(names, 0.0)))
