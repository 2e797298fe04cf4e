"""Recipes of iDDPM: functions that return a complete config.

"iddpm-256" and "iddpm-128" are the public repository's LSUN-256 and ImageNet-64 recipes for two classes of
photographs; the others fit a CPU.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping

from retinar.bench.baselines.iddpm.config import iddpm_config
from retinar.bench.baselines.iddpm.train_config import PUBLIC, IDDPMTrainConfig
from retinar.engine.errors import InputError
from retinar.train.config import OptimConfig
from retinar.train.recipes import GPT_RECIPES, TOKENIZER_RECIPES


def iddpm_256() -> IDDPMTrainConfig:
    """LSUN at 256 pixels (linear schedule, 1,000 steps, added embeddings), with two classes and a null class."""
    return IDDPMTrainConfig(
        recipe="iddpm-256",
        model=iddpm_config("iDDPM-256"),
        optim=PUBLIC,
        batch_size=128,
        epochs=None,
        steps=200_000,
        precision="bf16",
        ema_decay=0.9999,
        log_every=100,
        eval_every=2500,
        checkpoint_every=5000,
    )


def iddpm_128() -> IDDPMTrainConfig:
    """ImageNet at 64 pixels (cosine schedule, 4,000 steps, scale and shift) with a level more for 128 pixels."""
    return dataclasses.replace(iddpm_256(), recipe="iddpm-128", model=iddpm_config("iDDPM-128"))


def _cpu(recipe: str, size: str, *, lr: float, batch_size: int, steps: int) -> IDDPMTrainConfig:
    """So short a training wants large steps that end small, and an average of its end alone: with the public decay it
    would still hold the first weights."""
    adam = OptimConfig(
        lr=lr,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        grad_clip=1.0,
        schedule="cosine",
        warmup_steps=50,
        final_lr_ratio=0.02,
    )
    return IDDPMTrainConfig(
        recipe=recipe,
        model=iddpm_config(size),
        optim=adam,
        batch_size=batch_size,
        epochs=None,
        steps=steps,
        precision="bf16",
        ema_decay=0.99,
        log_every=20,
        eval_every=400,
        eval_images=64,
        checkpoint_every=200,
    )


def iddpm_cpu() -> IDDPMTrainConfig:
    """1.6 M parameters for 128 px photographs, the linear schedule: about a quarter of an hour on one core.

    Few channels, so that there is time for many steps.
    """
    return _cpu("iddpm-cpu", "iDDPM-cpu", lr=1e-3, batch_size=4, steps=2400)


def iddpm_cpu_wide() -> IDDPMTrainConfig:
    """8 M parameters for 128 px photographs, the cosine schedule: as long, in fewer steps of more images."""
    return _cpu("iddpm-cpu-wide", "iDDPM-cpu-wide", lr=8e-4, batch_size=8, steps=850)


def iddpm_256_cpu() -> IDDPMTrainConfig:
    """``iddpm-cpu`` with a level more for 256 px photographs: about three quarters of an hour on one core."""
    return _cpu("iddpm-256-cpu", "iDDPM-256-cpu", lr=1e-3, batch_size=4, steps=2400)


def iddpm_tiny() -> IDDPMTrainConfig:
    """A small network for phantoms of 48 pixels: a minute or two on two cores."""
    return dataclasses.replace(
        iddpm_cpu(),
        recipe="iddpm-tiny",
        model=iddpm_config("iDDPM-tiny", image_size=48, attention_resolutions=(12,)),
        batch_size=8,
        steps=400,
        precision="fp32",
        eval_every=100,
        eval_images=32,
        checkpoint_every=100,
        keep_last=1,
        tensorboard=False,
    )


IDDPM_RECIPES: Mapping[str, Callable[[], IDDPMTrainConfig]] = {
    "iddpm-256": iddpm_256,
    "iddpm-128": iddpm_128,
    "iddpm-cpu": iddpm_cpu,
    "iddpm-cpu-wide": iddpm_cpu_wide,
    "iddpm-256-cpu": iddpm_256_cpu,
    "iddpm-tiny": iddpm_tiny,
}


def iddpm_recipe(name: str) -> IDDPMTrainConfig:
    """The recipe of that name; InputError names the known ones."""
    if name not in IDDPM_RECIPES:
        near = difflib.get_close_matches(name, IDDPM_RECIPES, n=1)
        known = ", ".join(IDDPM_RECIPES)
        hint = f"did you mean {near[0]}?" if near else f"known are {known}."
        for other, recipes in (("gpt", GPT_RECIPES), ("tokenizer", TOKENIZER_RECIPES)):
            if name in recipes:
                hint = f"that one is for `train {other}`; known are {known}."
        raise InputError(f"Expected a recipe for `train iddpm`, found {name!r}: {hint}")
    return IDDPM_RECIPES[name]()
