"""Terms of the variational bound, entry by entry, and their mean in bits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_STEP = 1 / 255
"""Half the distance of neighbouring 8-bit values on the scale [-1, 1]."""
EDGE = 0.999
"""Beyond it a value is the first or the last, which take the tails."""
TINY = 1e-12


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(other)) in nats, of broadcast shape."""
    spread = -1.0 + other_log_variance - log_variance + torch.exp(log_variance - other_log_variance)
    return 0.5 * (spread + (mean - other_mean) ** 2 * torch.exp(-other_log_variance))


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability (nats) that a normal distribution, rounded to 8 bits, gives the 8-bit values x of [-1, 1].

    The distribution function is the tanh approximation that Ho et al. 2020 used.
    """
    distance, inverse = x - mean, torch.exp(-log_scale)
    above = _normal_cdf(inverse * (distance + HALF_STEP))
    below = _normal_cdf(inverse * (distance - HALF_STEP))
    inside = torch.where(x > EDGE, 1.0 - below, above - below)
    return torch.where(x < -EDGE, above, inside).clamp(min=TINY).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bits(nats: Tensor) -> Tensor:
    """[B, ...] in nats -> its mean an image, [B], in bits."""
    return nats.flatten(1).mean(1) / math.log(2.0)


def mean_square(x: Tensor, other: Tensor) -> Tensor:
    """The mean squared difference of each image: [B]."""
    return F.mse_loss(x, other, reduction="none").flatten(1).mean(1)
