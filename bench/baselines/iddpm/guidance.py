"""Classes: leaving labels out in training, and classifier-free guidance (Ho & Salimans 2022) in sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from retinar.bench.baselines.iddpm.unet import UNet
from retinar.engine.errors import InputError

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(noisy images [B, C, H, W], times [B]) -> [B, C or 2 C, H, W]: the noise, then the variance channels."""


def drop_labels(labels_B: Tensor, model: UNet, generator: torch.Generator) -> Tensor:
    """The labels with each one, by ``class_dropout_prob``, replaced by "no class". Drawn on the generator's device."""
    probability, null = model.config.class_dropout_prob, model.config.null_label
    if null is None or probability == 0:
        return labels_B
    drawn_B = torch.rand(labels_B.shape, generator=generator, device=generator.device).to(labels_B.device)
    return labels_B.masked_fill(drawn_B < probability, null)


def denoiser(model: UNet, labels_B: Tensor | None = None, cfg_scale: float = 1.0) -> Denoiser:
    """``model`` for these images' classes (int64 [B]; None where it has none).

    The noise is null + cfg_scale * (conditional - null), from one pass over twice the images; at scale 1 it is the
    conditional one, from one pass over the images. The variance is always the conditional one. Raises InputError for
    labels out of range, and for guidance of a model that has no null class.
    """
    config = model.config
    if labels_B is not None:
        known = config.class_rows
        if not bool(((labels_B >= 0) & (labels_B < known)).all()):
            raise InputError(
                f"Expected labels from 0 to {known - 1}, found {int(labels_B.min())} to {int(labels_B.max())}: "
                "correct them."
            )
    if cfg_scale == 1.0:
        return lambda x_BCHW, times_B: model(x_BCHW, times_B, labels_B)
    if labels_B is None or config.null_label is None:
        raise InputError(
            f"Expected cfg_scale 1 with a model without a null class, found {cfg_scale}: leave guidance out, or train "
            "with null_class."
        )
    both_R = torch.cat([labels_B, torch.full_like(labels_B, config.null_label)])

    def guided(x_BCHW: Tensor, times_B: Tensor) -> Tensor:
        given, null = model(x_BCHW.repeat(2, 1, 1, 1), times_B.repeat(2), both_R).chunk(2)
        channels = x_BCHW.shape[1]
        noise = null[:, :channels] + cfg_scale * (given[:, :channels] - null[:, :channels])
        return torch.cat([noise, given[:, channels:]], dim=1)

    return guided
