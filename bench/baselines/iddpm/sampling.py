"""Sampling: the ancestral sampler, and DDIM (Song et al. 2021). A respaced process takes fewer steps with either.

Shapes as in ``diffusion``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retinar.bench.baselines.iddpm.diffusion import Diffusion, column
from retinar.bench.baselines.iddpm.guidance import Denoiser
from retinar.bench.baselines.iddpm.noise import Source, normal
from retinar.engine.errors import InputError


class Step(NamedTuple):
    """Images a step earlier, and what they are expected to become; each [B, C, H, W]."""

    x: Tensor
    x_start: Tensor


def p_sample(
    diffusion: Diffusion, model: Denoiser, x_t: Tensor, t_B: Tensor, noise: Tensor, *, clip: bool = True
) -> Step:
    """x_{t-1} ~ p(x_{t-1} | x_t), with this standard normal noise (unused at step 0)."""
    found = diffusion.predict(diffusion.run(model, x_t, t_B), x_t, t_B, clip=clip)
    scale = column(t_B != 0, x_t) * torch.exp(0.5 * found.log_variance)
    return Step(found.mean + scale * noise, found.x_start)


def ddim_sample(
    diffusion: Diffusion,
    model: Denoiser,
    x_t: Tensor,
    t_B: Tensor,
    noise: Tensor | None = None,
    *,
    eta: float = 0.0,
    clip: bool = True,
) -> Step:
    """DDIM's step. ``eta``: from 0 (deterministic, ``noise`` may be None) to 1 (the variance of "fixed_small").

    The noise that leads on is the one that the clipped image implies. Raises InputError where eta needs noise and gets
    none, or is out of range.
    """
    _check_eta(eta)
    if eta > 0 and noise is None:
        raise InputError(f"Expected noise with eta {eta}, found none: pass it, or eta 0.")
    found = diffusion.predict(diffusion.run(model, x_t, t_B), x_t, t_B, clip=clip)
    alpha_bar_B, before_B = diffusion.alpha_bar_T[t_B], diffusion.before_T[t_B]
    implied = column((1 / alpha_bar_B).sqrt(), x_t) * x_t - found.x_start
    implied = implied / column((1 / alpha_bar_B - 1).sqrt(), x_t)
    variance_B = eta**2 * diffusion.posterior_variance_T[t_B]
    # All in float64 until here: near step 0 these are small differences of numbers near 1.
    onward = column((1 - before_B - variance_B).clamp(min=0).sqrt(), x_t)
    x = found.x_start * column(before_B.sqrt(), x_t) + onward * implied
    if noise is not None:
        x = x + column(variance_B.sqrt(), x_t) * noise
    return Step(x, found.x_start)


def trajectory(
    diffusion: Diffusion,
    model: Denoiser,
    x_BCHW: Tensor,
    source: Source,
    *,
    eta: float | None = None,
    clip: bool = True,
) -> Iterator[Step]:
    """The steps from noise to images, last step first, ``len(diffusion)`` of them; the last one's ``x`` are the images.

    ``x_BCHW`` is standard normal noise. eta None: the ancestral sampler; a number: DDIM. With eta 0 nothing is drawn
    from ``source``.
    """
    if eta is not None:
        _check_eta(eta)
    for step in reversed(range(len(diffusion))):
        t_B = torch.full(x_BCHW.shape[:1], step, device=x_BCHW.device)
        with torch.no_grad():
            noise = normal(x_BCHW.shape, source, x_BCHW.device) if eta != 0 and step > 0 else torch.zeros_like(x_BCHW)
            if eta is None:
                found = p_sample(diffusion, model, x_BCHW, t_B, noise, clip=clip)
            else:
                found = ddim_sample(diffusion, model, x_BCHW, t_B, noise, eta=eta, clip=clip)
        yield found
        x_BCHW = found.x


def sample(
    diffusion: Diffusion,
    model: Denoiser,
    shape: Sequence[int],
    source: Source,
    *,
    eta: float | None = None,
    clip: bool = True,
) -> Tensor:
    """Images of ``shape`` [B, C, H, W], in [-1, 1] where clipped: fp32 on the process's device.

    ``model`` is what ``guidance.denoiser`` gives, in evaluation mode. The same generators in the same state give the
    same images; with a generator an image they do not depend on each other.
    """
    x_BCHW = normal(shape, source, diffusion.device)
    for found in trajectory(diffusion, model, x_BCHW, source, eta=eta, clip=clip):
        x_BCHW = found.x
    return x_BCHW


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise InputError(f"Expected eta from 0 (deterministic) to 1, found {eta}: choose another.")
