"""A diffusion model that trains in seconds on pictures of 16 pixels, and what several processes do with it.

``python -m tests.bench.iddpm_tiny OUT PICTURES MODE...``: a short training in each mode (or of the bound, "vlb") one
after another; the main process writes what came out to OUT/MODE.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from retinar.bench.baselines.iddpm import UNet, iddpm_config
from retinar.bench.baselines.iddpm.train_config import IDDPMTrainConfig
from retinar.bench.baselines.iddpm.training import IDDPMTask
from retinar.train.config import OptimConfig
from retinar.train.data.images import ImageSet
from retinar.train.parallel import gathered
from retinar.train.rng import seed_everything
from retinar.train.world import World, joined

SIZE = 16
STEPS = 6
MODEL: dict[str, Any] = {
    "image_size": SIZE,
    "num_channels": 16,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
    "num_heads": 2,
    "norm_groups": 4,
    "noise_schedule": "cosine",
    "diffusion_steps": 40,
}

LEARNED: dict[str, Any] = {"model": {"objective": "vlb"}, "timesteps": "loss-second-moment"}


def tiny_config(model: dict[str, Any] | None = None, **changes: Any) -> IDDPMTrainConfig:
    """All that a resume could get wrong: mirrors, parts, dropout, labels left out, the average, a schedule."""
    values: dict[str, Any] = {
        "recipe": "tiny",
        "model": iddpm_config("iDDPM-tiny", **{**MODEL, **(model or {})}),
        "optim": OptimConfig(lr=2e-3, weight_decay=0.0, warmup_steps=2, schedule="cosine", final_lr_ratio=0.1),
        "batch_size": 8,
        "accumulation": 2,
        "epochs": None,
        "steps": STEPS,
        "precision": "fp32",
        "ema_decay": 0.9,
        "log_every": 1,
        "eval_every": 3,
        "eval_images": 5,
        "checkpoint_every": 4,
        "tensorboard": False,
        "meters": False,
        "device": "cpu",
    }
    return IDDPMTrainConfig(**{**values, **changes})


def train(world: World, pictures: str, **changes: Any) -> dict[str, Any]:
    """A few steps without dropout (which is a process's own): losses, norms, whole weights and averages, validation."""
    seed_everything(4)
    config = tiny_config(**changes)
    images, valid = ImageSet(pictures), ImageSet(pictures, "valid")
    task = IDDPMTask(UNet(config.model), config, images, steps=STEPS, valid=valid, world=world)
    values = [task.step(step) for step in range(STEPS)]
    own = torch.tensor([[float(each["loss"]), float(each["grad_norm"])] for each in values], dtype=torch.float64)
    valid_values = task.evaluate(STEPS)
    assert task.ema is not None
    return {
        "values": world.mean(own),
        "valid": valid_values,
        "model": gathered(task.model.state_dict(), world),
        "ema": gathered(task.ema.averages, world),
        "seen": task.timesteps.seen_T,
    }


def modes(out: str, pictures: str, *names: str) -> None:
    with joined("cpu") as world:
        for name in names:
            found = train(world, pictures, **(LEARNED if name == "vlb" else {"parallel": name}))
            if world.main:
                torch.save(found, Path(out) / f"{name}.pt")
            world.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    modes(*sys.argv[1:])
