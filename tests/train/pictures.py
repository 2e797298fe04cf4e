"""Small pictures to train and encode: a disc with a bright spot and a few lines, as prepared class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from retinar.engine.config import TokenizerConfig
from retinar.train.config import OptimConfig, TokenizerTrainConfig

SIZE = 32
MODEL = TokenizerConfig(
    ch=8,
    ch_mult=(1, 1, 2),
    z_channels=16,
    codebook_size=32,
    codebook_embed_dim=8,
    image_size=SIZE,
    num_res_blocks=1,
    attention=False,
)


def draw(seed: int, size: int = SIZE) -> np.ndarray:
    """uint8 [size, size, 3]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / (size - 1) - 0.5
    picture = np.zeros((size, size, 3))
    picture[:] = np.array([0.8, 0.35, 0.1]) * random.uniform(0.7, 1.1)
    for _ in range(3):
        angle, offset = random.uniform(0, np.pi), random.uniform(-0.3, 0.3)
        line = np.abs(np.cos(angle) * x + np.sin(angle) * y - offset) < 1.0 / size
        picture[line] *= 0.5
    spot_x, spot_y = random.uniform(-0.25, 0.25, size=2)
    picture[(x - spot_x) ** 2 + (y - spot_y) ** 2 < 0.01] = [1.0, 0.9, 0.6]
    picture[x**2 + y**2 > 0.23] = 0.0
    return (255 * picture.clip(0, 1)).astype(np.uint8)


def write_pictures(root: Path, *, train: int = 4, valid: int = 2, size: int = SIZE) -> Path:
    """``root/{train,valid}/{healthy,npdr}/*.png``, so many of each class."""
    for number, (split, count) in enumerate((("train", train), ("valid", valid))):
        for label, name in enumerate(("healthy", "npdr")):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(draw(1000 * number + 100 * label + i, size)).save(folder / f"{name}{i}.png")
    return root


def picture_config(**changes: object) -> TokenizerTrainConfig:
    """All that a resume could get wrong: crops, then whole images, mirrors, parts, average, revival, PatchGAN."""
    adam = OptimConfig(lr=3e-3, weight_decay=0.0, warmup_steps=2, schedule="cosine", final_lr_ratio=0.1)
    values: dict[str, object] = {
        "recipe": "pictures",
        "model": MODEL,
        "optim": adam,
        "disc_optim": adam,
        "batch_size": 4,
        "accumulation": 2,
        "steps": 8,
        "crop_size": 16,
        "whole_from": 0.75,
        "precision": "fp32",
        "ema_decay": 0.9,
        "perceptual": "none",
        "revive_after": 2,
        "disc_start": 3,
        "disc_channels": 8,
        "disc_layers": 1,
        "log_every": 2,
        "eval_every": 4,
        "checkpoint_every": 3,
        "tensorboard": False,
        "meters": False,
        "device": "cpu",
    }
    return TokenizerTrainConfig(**{**values, **changes})  # type: ignore[arg-type]
