"""Tokenizer training that reads photographs as LlamaGen's does, and writes its lines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from retinar.engine.tokenizer import VQTokenizer
from retinar.train import loop
from retinar.train.config import TokenizerTrainConfig
from retinar.train.losses import adversarial_weight
from retinar.train.perceptual import PerceptualLoss
from retinar.train.tokenizer import TokenizerTask
from retinar.train.upstream.image_folder import ImageFolder
from retinar.train.upstream.log import Log
from retinar.train.upstream.random_crops import RandomCrops
from retinar.train.world import World


class UpstreamTokenizerTask(TokenizerTask):
    """A TokenizerTask on photographs of any size, with upstream's crops and log. ``workers``: threads that crop."""

    epoch = -1

    def __init__(
        self,
        model: VQTokenizer,
        config: TokenizerTrainConfig,
        images: ImageFolder,
        *,
        steps: int,
        perceptual: PerceptualLoss | None,
        world: World,
        workers: int,
        log: Log,
    ) -> None:
        super().__init__(model, config, images, steps=steps, perceptual=perceptual, world=world)
        size = model.config.image_size
        self.crops = RandomCrops(images, size=size, seed=config.seed, workers=workers, order=self.order.batch)
        self.log = log
        self._losses: list[Tensor] = []
        self._since = time.monotonic()

    def step(self, step: int) -> loop.Values:
        """A step, and the lines that are due."""
        epoch = step * self.config.batch_size // len(self.images)
        if epoch > self.epoch:
            self.epoch = epoch
            self.log.info(f"Beginning epoch {epoch}...")
        values = super().step(step)
        if "loss" in values:
            self._losses.append(torch.as_tensor(values["loss"]) + torch.as_tensor(values.get("disc_loss", 0.0)))
        if (step + 1) % self.config.log_every == 0 and self._losses:
            self._tell_parts(step, values)
            loss = float(self.world.mean(torch.stack(self._losses).double().mean().cpu()))
            now = time.monotonic()
            speed = len(self._losses) / (now - self._since)
            self.log.info(f"(step={step + 1:07d}) Train Loss: {loss:.4f}, Train Steps/Sec: {speed:.2f}")
            self._losses, self._since = [], now
        return values

    def _tell_parts(self, step: int, values: loop.Values) -> None:
        weight = adversarial_weight(self.config, step)
        self.log.info(
            f"(Generator) rec_loss: {_number(values, 'reconstruction')}, "
            f"perceptual_loss: {_number(values, 'perceptual')}, vq_loss: {_number(values, 'codebook')}, "
            f"commit_loss: {_number(values, 'commitment')}, entropy_loss: 0.0000, "
            f"codebook_usage: {_number(values, 'usage')}, generator_adv_loss: {_number(values, 'adversarial')}, "
            f"disc_adaptive_weight: 1.0000, disc_weight: {weight:.4f}"
        )
        if "disc_loss" in values:
            self.log.info(
                f"(Discriminator) discriminator_adv_loss: {_number(values, 'disc_loss')}, disc_weight: {weight:.4f}, "
                f"logits_real: {_number(values, 'logits_real')}, logits_fake: {_number(values, 'logits_fake')}"
            )

    def export(self, folder: Path) -> None:
        """Nothing: `retinar convert CHECKPOINT FOLDER` makes our folder of any of them."""


def _number(values: Mapping[str, float | Tensor], name: str) -> str:
    return f"{float(values.get(name, 0.0)):.4f}"
