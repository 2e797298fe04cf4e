"""From logits to codes: guidance, temperature, top-k, top-p, and an exact draw by the Gumbel-max trick.

Images are filtered one at a time, on shapes that depend on V alone, so that an image's bits do not depend on the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.philox.reference import DOMAIN_SAMPLE, gumbel_noise

MINIMUM_TEMPERATURE = 1e-5


def cfg_mix(cond: Tensor, null: Tensor, scale: Tensor | float) -> Tensor:
    return null + (cond - null) * scale


def filter_logits(logits_IV: Tensor, temperature_I: Tensor, top_k_I: Tensor, top_p_I: Tensor) -> Tensor:
    filtered_IV = logits_IV / temperature_I.clamp(min=MINIMUM_TEMPERATURE)[:, None]
    limits = zip(filtered_IV, top_k_I.tolist(), top_p_I.tolist(), strict=True)
    for logits_V, top_k, top_p in limits:
        if 0 < top_k < len(logits_V):
            _drop_below_kth(logits_V, top_k)
        if top_p < 1:
            _drop_beyond_nucleus(logits_V, top_p)
    return filtered_IV


def cfg_sample(
    logits_BV: Tensor,
    cond_row_I: Tensor,
    null_row_I: Tensor,
    cfg_scale_I: Tensor,
    temperature_I: Tensor,
    top_k_I: Tensor,
    top_p_I: Tensor,
    seed_I: Tensor,
    index_I: Tensor,
    position_I: Tensor,
) -> Tensor:
    cond_IV = logits_BV[cond_row_I.long()]
    null_IV = logits_BV[null_row_I.clamp(min=0).long()]
    guided_I1 = (null_row_I >= 0)[:, None]
    mixed_IV = torch.where(guided_I1, cfg_mix(cond_IV, null_IV, cfg_scale_I[:, None]), cond_IV)
    filtered_IV = filter_logits(mixed_IV, temperature_I, top_k_I, top_p_I)
    noise_IV = gumbel_noise(seed_I, index_I, position_I, logits_BV.shape[1], DOMAIN_SAMPLE)
    return (filtered_IV + noise_IV).argmax(-1)  # the first, that is the lowest, of equal maxima


def _drop_below_kth(logits_V: Tensor, k: int) -> None:
    kth = torch.topk(logits_V, k).values[-1]
    logits_V.masked_fill_(logits_V < kth, float("-inf"))


def _drop_beyond_nucleus(logits_V: Tensor, p: float) -> None:
    """Drops a code where the probability summed before it, by falling logit and then by code, exceeds p."""
    ordered_V, code_V = torch.sort(logits_V, descending=True, stable=True)
    before_V = ordered_V.softmax(-1).cumsum(-1).roll(1)
    before_V[0] = 0
    logits_V[code_V[before_V > p]] = float("-inf")
