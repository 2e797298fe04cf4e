"""A training step as `retinar train gpt` makes it: the paper's recipe on random codes, for profiles and times."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from retinar.engine.model import GPT
from retinar.train.code_files import CodeSet, CodeWriter
from retinar.train.config import GPTTrainConfig
from retinar.train.gpt import GPTTask
from retinar.train.recipes import gpt_recipe
from retinar.train.rng import seed_everything

RECIPE = "fundus-xl"
BATCH = 8
# For a CPU: the same recipe (dropouts, AdamW, clipping) with a model that Triton's interpreter runs in a second or two.
TINY = {"n_layer": 1, "n_head": 2, "dim": 64, "multiple_of": 32, "vocab_size": 256, "grid": 4}


def step_config(device: str, *, compile_layers: bool | None = None) -> GPTTrainConfig:
    """The recipe with a batch that fits; on a CPU tiny, in fp32 (the interpreter cannot multiply bf16), uncompiled.

    ``compile_layers``: None as the recipe has it.
    """
    recipe = gpt_recipe(RECIPE)
    common = {"device": device, "tensorboard": False, "steps": 10, "epochs": None}
    if device == "cpu":
        model = dataclasses.replace(recipe.model, **TINY)  # type: ignore[arg-type]
        return dataclasses.replace(recipe, **common, model=model, batch_size=2, precision="fp32", compile=False)  # type: ignore[arg-type]
    wanted = recipe.compile if compile_layers is None else compile_layers
    return dataclasses.replace(recipe, **common, batch_size=BATCH, compile=wanted)  # type: ignore[arg-type]


def make_task(config: GPTTrainConfig, folder: Path) -> GPTTask:
    """Model, optimizer and random codes (written into ``folder``), ready for ``task.step(0)``."""
    seed_everything(config.seed)
    with torch.device(config.device):
        model = GPT(config.model)
    return GPTTask(model, config, random_codes(config, folder), steps=config.total_steps(config.batch_size))


def random_codes(config: GPTTrainConfig, folder: Path) -> CodeSet:
    """One batch of codes that nothing can be learned from."""
    model, images = config.model, config.batch_size
    random = np.random.default_rng(0)
    identity = {"images": images, "views": 1, "grid": model.grid, "split": "train"}
    writer = CodeWriter(folder, "packed", {**identity, "classes": [str(n) for n in range(model.num_classes)]})
    labels = random.integers(model.num_classes, size=images)
    writer.write(random.integers(model.vocab_size, size=(images, 1, model.grid**2)), labels)
    writer.finish(labels, {"tokenizer_config": {"codebook_size": model.vocab_size}, "tokenizer_digest": None})
    return CodeSet(folder)
