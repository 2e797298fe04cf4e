"""Codes that nothing uses any more are put back to work: the cure of codebook collapse."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from retinar.engine.tokenizer import VectorQuantizer

_STREAM = 3  # see train/crops.py


class CodeRevival:
    """Every ``after`` steps, the codes that no position took in that time move onto latents of the present batch.

    ``start``: the step from which latents are quantised at all; all codes (as many as there are latents) move onto
    latents just before it, none earlier. ``after`` None: never again after that.

    Latents are drawn in proportion to their squared distance from the nearest code (as k-means++ does): plain draws
    would mostly hit the black background. A fresh codebook, of which a fresh encoder's latents touch a small patch,
    thus spreads over the data at the first call. ``last_used_K`` (the step each code was last taken at, counted from
    1) is the only state.
    """

    def __init__(self, quantizer: VectorQuantizer, *, after: int | None, start: int = 0, seed: int) -> None:
        self.quantizer, self.after, self.start, self.seed = quantizer, after, start, seed
        weight_KC = quantizer.embedding.weight
        self.last_used_K = torch.zeros(len(weight_KC), dtype=torch.int64, device=weight_KC.device)

    def due(self, step: int) -> bool:
        """Whether codes may be moved after step ``step`` (counted from 0)."""
        done = step + 1
        return done == self.start > 0 or (self.after is not None and done > self.start and done % self.after == 0)

    @torch.no_grad()
    def note(self, step: int, codes: Tensor) -> None:
        """These codes were taken in ``step``."""
        self.last_used_K[codes.flatten()] = step + 1

    @torch.no_grad()
    def revive(self, step: int, latents_BChw: Tensor, tensors: list[tuple[Tensor, bool]]) -> int:
        """Move the unused codes onto latents; how many moved.

        ``tensors``: what else has a row per code, fp32 [K, C]: (the codebook's average, True) gets the new rows too,
        (an optimizer's moment, False) gets zeros there.
        """
        # At the start nothing has been noted yet, so every code counts as unused.
        since = 0 if self.after is None or step + 1 == self.start else step + 1 - self.after
        dead = (self.last_used_K <= since).nonzero().squeeze(1)
        z_NC = F.normalize(latents_BChw.permute(0, 2, 3, 1).flatten(0, 2).float(), dim=-1)
        dead = dead[: len(z_NC)]
        if not len(dead) or not z_NC.isfinite().all():  # NaN: the loop stops the run with a sentence
            return 0
        weight_KC = self.quantizer.embedding.weight
        chosen_NC = F.normalize(weight_KC[self.quantizer(latents_BChw)[1].flatten()].float(), dim=-1)
        distance_N = (z_NC - chosen_NC).square().sum(dim=1).double().cpu() + 1e-12
        seed = int(np.random.default_rng([self.seed, step, _STREAM]).integers(2**63 - 1))
        generator = torch.Generator().manual_seed(seed)
        rows = torch.multinomial(distance_N, len(dead), replacement=False, generator=generator).to(z_NC.device)
        weight_KC[dead] = z_NC[rows].to(weight_KC.dtype)
        for tensor_KC, follows in tensors:
            tensor_KC[dead] = z_NC[rows] if follows else 0.0
        self.last_used_K[dead] = step + 1
        return len(dead)
