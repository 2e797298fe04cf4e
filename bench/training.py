"""A training step as `retinar train gpt` makes it: the paper's recipe on random codes, for profiles and times.

``python -m retinar.bench.training [--upstream CLONE]`` measures its speed beside LlamaGen's loop (`training_speed`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
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


def main(argv: Sequence[str]) -> int:
    """0: all right; 1: something does not train; 2: bad input, in one sentence."""
    from retinar.bench import report_training, training_contenders, training_speed
    from retinar.bench.baselines.upstream import check_clone
    from retinar.bench.run import check_device
    from retinar.engine.config import GPT_SIZES
    from retinar.engine.errors import InputError

    about = "Training speed: our step against LlamaGen's loop, eager and compiled, in turns."
    parser = argparse.ArgumentParser(prog="python -m retinar.bench.training", description=about, allow_abbrev=False)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--upstream", type=Path, help="a clone of LlamaGen; without one its loop around a model in plain torch")
    add("--size", choices=sorted(GPT_SIZES), help="GPT-XL on a GPU, GPT-B on a CPU")
    add("--images", type=int, help="of a step (32 on a GPU, 4 on a CPU)")
    add("--grid", type=int, help="codes per side of an image (32)")
    add("--turns", type=int, help="of each (5)")
    add("--eager", action="store_true", help="compile nothing")
    add("--minutes", type=float, default=9.0, help="for everything (9); the rest is left out")
    add("--out", type=Path, default=Path("bench/results"), help="folder of results (bench/results)")
    add("--exercise", action="store_true", help="all of it at a tiny size, in fp32, eager; its times say nothing")
    flags = parser.parse_args(argv)
    try:
        check_device(flags.device)
        clone = None if flags.upstream is None else check_clone(flags.upstream)
        given = {"model": flags.size, "images": flags.images, "grid": flags.grid, "turns": flags.turns}
        changes: dict[str, object] = {name: value for name, value in given.items() if value is not None}
        if wrong := [name for name, value in changes.items() if isinstance(value, int) and value < 1]:
            raise InputError(f"Expected --{wrong[0]} of at least 1, found {changes[wrong[0]]}: give another.")
        if flags.eager:
            changes["compiled"] = (False,)
        size = training_contenders.SIZES["exercise" if flags.exercise else flags.device]
        size = dataclasses.replace(size, **changes)  # type: ignore[arg-type]
        path, content = training_speed.measure(
            flags.out, size, flags.device, clone, flags.minutes, exercise=flags.exercise
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    wrong_steps = [f"WRONG  {sentence}" for sentence in content["tests"]["failed"]]
    print("\n".join([*wrong_steps, *report_training.lines(content), "", f"written to {path}"]))
    return 1 if wrong_steps else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
