"""What the tokenizer is trained on. Images are fp32 [B, 3, H, W] in [-1, 1]; every loss is a fp32 scalar.

total = reconstruction + perceptual + codebook + commitment + adversarial, each times its weight, as LlamaGen's VQLoss
with its training script's defaults: the adversarial weight is constant (upstream knows an adaptive one, off by
default), and both it and the discriminator's loss are 0 before ``disc_start``. Upstream's "non-saturating" losses
have input and target swapped and are not offered.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from retinar.train.config import TokenizerTrainConfig


class LossParts(NamedTuple):
    """The terms before their weights; ``perceptual`` and ``adversarial`` None where they take no part."""

    reconstruction: Tensor
    perceptual: Tensor | None
    codebook: Tensor
    commitment: Tensor
    """Already times the tokenizer's ``commit_loss_beta``."""
    adversarial: Tensor | None


def reconstruction_loss(reconstruction_BCHW: Tensor, images_BCHW: Tensor, kind: Literal["l2", "l1"]) -> Tensor:
    """Mean squared or absolute difference over all values."""
    loss = F.mse_loss if kind == "l2" else F.l1_loss
    return loss(reconstruction_BCHW.float(), images_BCHW.float())


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge: half of mean(relu(1 - real)) + mean(relu(1 + fake)); logits of any shape."""
    return 0.5 * (F.relu(1.0 - logits_real.float()).mean() + F.relu(1.0 + logits_fake.float()).mean())


def generator_loss(logits_fake: Tensor) -> Tensor:
    """The hinge game's other side: minus the mean logit of the reconstructions."""
    return -logits_fake.float().mean()


def adversarial_weight(config: TokenizerTrainConfig, step: int) -> float:
    """``disc_weight`` once the discriminator takes part, else 0.

    ``step`` counts from 0; ``disc_start`` counts steps from 1 as upstream does, so ``disc_start=N`` means that N - 1
    steps are made without it.
    """
    return config.disc_weight if step + 1 >= config.disc_start else 0.0


def total_loss(parts: LossParts, config: TokenizerTrainConfig, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum to differentiate, and its weighted terms by name (detached) for the log."""
    terms = {
        "reconstruction": config.reconstruction_weight * parts.reconstruction,
        "codebook": config.codebook_weight * parts.codebook,
        "commitment": parts.commitment,
    }
    if parts.perceptual is not None:
        terms["perceptual"] = config.perceptual_weight * parts.perceptual
    if parts.adversarial is not None:
        terms["adversarial"] = adversarial_weight(config, step) * parts.adversarial
    total = torch.stack([term.float() for term in terms.values()]).sum()
    return total, {name: term.detach() for name, term in terms.items()}
