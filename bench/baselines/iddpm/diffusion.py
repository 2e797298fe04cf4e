"""The diffusion process: adding noise, reading a network's output, and what it is trained on.

Shapes: B images, C channels, H and W pixels, D = C or 2 C channels of a network's output, T steps. Images are fp32 of
scale [-1, 1]; steps t (int64) count from 0. Tables are float64 [T] and enter in fp32. Sources: Ho et al. 2020 (DDPM),
Nichol & Dhariwal 2021 (learned variance, equation 15; hybrid objective, equation 16).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from retinar.bench.baselines.iddpm.config import IDDPMConfig
from retinar.bench.baselines.iddpm.guidance import Denoiser
from retinar.bench.baselines.iddpm.likelihood import bits, discretized_log_likelihood, mean_square, normal_kl
from retinar.bench.baselines.iddpm.noise import Source, normal
from retinar.bench.baselines.iddpm.schedule import Respacing, schedule
from retinar.engine.errors import InputError


class Prediction(NamedTuple):
    """The normal distribution p(x_{t-1} | x_t), and the image without noise that it comes from; each [B, C, H, W]."""

    mean: Tensor
    log_variance: Tensor
    x_start: Tensor


class Losses(NamedTuple):
    """fp32 [B] each. ``loss`` is what to minimise; what it does not consist of is None."""

    loss: Tensor
    mse: Tensor | None
    vb: Tensor | None
    """The term of the variational bound, in bits a channel and pixel, as it enters ``loss``."""


class Bound(NamedTuple):
    """The variational bound of each image (L_vlb), in bits a channel and pixel."""

    total_B: Tensor
    prior_B: Tensor
    terms_BT: Tensor
    """Step 0 first."""


def column(values_B: Tensor, like: Tensor) -> Tensor:
    """One value an image, in fp32 and shaped to multiply images ``like`` [B, ...]."""
    return values_B.float().view(-1, *[1] * (like.ndim - 1))


class Diffusion:
    """The process that ``config`` describes, or the steps of it that ``respacing`` takes (see ``schedule.Respacing``).

    ``device`` is where images will lie. Raises InputError for a spacing that the steps do not allow.
    """

    def __init__(self, config: IDDPMConfig, respacing: Respacing = None, *, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        self.schedule = schedule(config.noise_schedule, config.diffusion_steps, respacing)
        beta_T = torch.from_numpy(self.schedule.betas_T)
        alpha_bar_T = (1 - beta_T).cumprod(0)
        before_T = torch.cat([alpha_bar_T.new_ones(1), alpha_bar_T[:-1]])
        posterior_T = beta_T * (1 - before_T) / (1 - alpha_bar_T)
        # Step 0's posterior variance is 0, and the next one's stands in; a process of one step has none to lend.
        first = posterior_T[1:2] if len(beta_T) > 1 else beta_T
        self.timesteps_T = torch.from_numpy(self.schedule.timesteps_T).to(self.device)
        self.beta_T = beta_T.to(self.device)
        self.alpha_bar_T = alpha_bar_T.to(self.device)
        self.before_T = before_T.to(self.device)
        """``alpha_bar`` a step earlier, 1 at step 0."""
        self.posterior_variance_T = posterior_T.to(self.device)
        """Beta-tilde: the variance of q(x_{t-1} | x_t, x_0)."""
        self.log_small_T = torch.cat([first, posterior_T[1:]]).log().to(self.device)
        self.log_large_T = torch.cat([first, beta_T[1:]]).log().to(self.device)

    def __len__(self) -> int:
        return len(self.schedule)

    def q_sample(self, x_start: Tensor, t_B: Tensor, noise: Tensor) -> Tensor:
        """q(x_t | x_0): images after step t, with this standard normal noise."""
        alpha_bar_B = self.alpha_bar_T[t_B]
        return column(alpha_bar_B.sqrt(), x_start) * x_start + column((1 - alpha_bar_B).sqrt(), x_start) * noise

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log variance, that of step 1 at step 0) of q(x_{t-1} | x_t, x_0); the second is [B, 1, 1, 1]."""
        beta_B, alpha_bar_B, before_B = self.beta_T[t_B], self.alpha_bar_T[t_B], self.before_T[t_B]
        of_start = column(beta_B * before_B.sqrt() / (1 - alpha_bar_B), x_t)
        of_noisy = column((1 - before_B) * (1 - beta_B).sqrt() / (1 - alpha_bar_B), x_t)
        return of_start * x_start + of_noisy * x_t, column(self.log_small_T[t_B], x_t)

    def run(self, model: Denoiser, x_t: Tensor, t_B: Tensor) -> Tensor:
        """The network's output, fp32 [B, D, H, W], told the step as it was trained to be."""
        times_B = self.timesteps_T[t_B]
        if self.config.rescale_timesteps:
            times_B = times_B.float() * (1000.0 / self.schedule.trained_steps)
        output = model(x_t, times_B).float()
        self._check_output(output, x_t)
        return output

    def _check_output(self, output: Tensor, x_t: Tensor) -> None:
        channels = x_t.shape[1] * (2 if self.config.variance == "learned_range" else 1)
        expected = (x_t.shape[0], channels, *x_t.shape[2:])
        if output.shape != expected:
            raise InputError(
                f"Expected an output of shape {list(expected)} with variance {self.config.variance}, "
                f"found {list(output.shape)}: give the config that the network was made from."
            )

    def predict(self, output: Tensor, x_t: Tensor, t_B: Tensor, *, clip: bool = True) -> Prediction:
        """p(x_{t-1} | x_t) from a network's output; ``clip`` holds the image without noise in [-1, 1]."""
        self._check_output(output, x_t)
        noise, values = output.split([x_t.shape[1], output.shape[1] - x_t.shape[1]], dim=1)
        alpha_bar_B = self.alpha_bar_T[t_B]
        x_start = column((1 / alpha_bar_B).sqrt(), x_t) * x_t - column((1 / alpha_bar_B - 1).sqrt(), x_t) * noise
        if clip:
            x_start = x_start.clamp(-1, 1)
        mean, log_small = self.q_posterior(x_start, x_t, t_B)
        if self.config.variance == "learned_range":
            share = (values + 1) / 2
            log_variance = share * column(self.beta_T[t_B].log(), x_t) + (1 - share) * log_small
        elif self.config.variance == "fixed_small":
            log_variance = log_small.expand_as(x_t)
        else:
            log_variance = column(self.log_large_T[t_B], x_t).expand_as(x_t)
        return Prediction(mean, log_variance, x_start)

    def bound_term(self, output: Tensor, x_start: Tensor, x_t: Tensor, t_B: Tensor, *, clip: bool = False) -> Tensor:
        """The bound's term of step t, [B], in bits a channel and pixel: KL(q || p), at step 0 -log p(x_0 | x_1)."""
        mean, log_variance = self.q_posterior(x_start, x_t, t_B)
        found = self.predict(output, x_t, t_B, clip=clip)
        kl_B = bits(normal_kl(mean, log_variance, found.mean, found.log_variance))
        nll_B = bits(-discretized_log_likelihood(x_start, found.mean, 0.5 * found.log_variance))
        return torch.where(t_B == 0, nll_B, kl_B)

    def losses(self, model: Denoiser, x_start: Tensor, t_B: Tensor, noise: Tensor) -> Losses:
        """What to minimise at steps ``t_B``, drawn evenly by the caller as ``noise`` is.

        hybrid: the mean squared error of the noise; with a learned variance plus the bound's term, whose gradient does
        not reach the noise that the network predicts. vlb: T times the bound's term. InputError for other shapes.
        """
        if noise.shape != x_start.shape or t_B.shape != x_start.shape[:1]:
            raise InputError(
                f"Expected noise as the images {list(x_start.shape)} and one step each, found {list(noise.shape)} and "
                f"{list(t_B.shape)}: make them fit."
            )
        x_t = self.q_sample(x_start, t_B, noise)
        output = self.run(model, x_t, t_B)
        if self.config.objective == "vlb":
            vb_B = self.bound_term(output, x_start, x_t, t_B) * len(self)
            return Losses(vb_B, None, vb_B)
        predicted, values = output.split([noise.shape[1], output.shape[1] - noise.shape[1]], dim=1)
        mse_B = mean_square(noise, predicted)
        if self.config.variance != "learned_range":
            return Losses(mse_B, mse_B, None)
        weight = len(self) / 1000 if self.config.rescale_learned_sigmas else 1.0
        frozen = torch.cat([predicted.detach(), values], dim=1)
        vb_B = self.bound_term(frozen, x_start, x_t, t_B) * weight
        return Losses(mse_B + vb_B, mse_B, vb_B)

    def prior_term(self, x_start: Tensor) -> Tensor:
        """The bound's part that no network changes, [B], in bits: KL(q(x_T | x_0) || N(0, 1))."""
        alpha_bar_1 = self.alpha_bar_T[-1:]
        zero = torch.zeros_like(x_start)
        mean = column(alpha_bar_1.sqrt(), x_start) * x_start
        return bits(normal_kl(mean, column((1 - alpha_bar_1).log(), x_start), zero, zero))

    @torch.no_grad()
    def bound(self, model: Denoiser, x_start: Tensor, source: Source, *, clip: bool = True) -> Bound:
        """The whole bound, one pass of the network a step, with noise drawn from ``source`` (last step first)."""
        terms = []
        for step in reversed(range(len(self))):
            t_B = torch.full(x_start.shape[:1], step, device=x_start.device)
            x_t = self.q_sample(x_start, t_B, normal(x_start.shape, source, x_start.device))
            terms.append(self.bound_term(self.run(model, x_t, t_B), x_start, x_t, t_B, clip=clip))
        terms_BT = torch.stack(terms[::-1], dim=1)
        prior_B = self.prior_term(x_start)
        return Bound(terms_BT.sum(1) + prior_B, prior_B, terms_BT)
