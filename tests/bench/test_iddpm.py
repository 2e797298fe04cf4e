"""iDDPM's process: its golden vectors, and what must hold whatever the numbers. The network: test_iddpm_network.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from retinar.bench.baselines.iddpm import Denoiser, Diffusion, IDDPMConfig, ddim_sample, p_sample, sample, trajectory
from retinar.bench.baselines.iddpm.likelihood import discretized_log_likelihood
from retinar.bench.baselines.iddpm.noise import normal
from retinar.bench.baselines.iddpm.schedule import Respacing, schedule, spaced
from retinar.engine.errors import InputError

PROCESSES = {"cosine4000": ("cosine", 4000), "linear1000": ("linear", 1000), "cosine1000": ("cosine", 1000)}
GIVEN = {"x_start", "noise", "model_output", "t"}
VARIANCES = ("learned_range", "fixed_small", "fixed_large")
SHAPE = (4, 3, 8, 8)


def make(respacing: Respacing = None, **fields: Any) -> Diffusion:
    return Diffusion(IDDPMConfig(**{"noise_schedule": "cosine", "diffusion_steps": 100, **fields}), respacing)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(seed: int, shape: Sequence[int] = SHAPE) -> Tensor:
    return torch.randn(tuple(shape), generator=seeded(seed))


def constant(output: Tensor) -> Denoiser:
    return lambda x_BCHW, times_B: output


@pytest.mark.parametrize("name", PROCESSES)
def test_golden(golden: Path, name: str) -> None:
    """Every vector, to 1e-5 of each entry (and 1e-6 of scale 1, where clipped images cross zero)."""
    vectors = load_file(golden / "iddpm_expected.safetensors")
    expected = {key.removeprefix(f"{name}."): value for key, value in vectors.items() if key.startswith(name)}
    kind, steps = PROCESSES[name]
    fields: dict[str, Any] = {"noise_schedule": kind, "diffusion_steps": steps}
    x_start, noise, output, t_B = (expected[key] for key in ("x_start", "noise", "model_output", "t"))
    process = make(**fields)
    x_t = process.q_sample(x_start, t_B, noise)
    found = {"betas": torch.from_numpy(process.schedule.betas_T), "q_sample": x_t}
    prediction = process.predict(output, x_t, t_B)
    found |= {"p_mean": prediction.mean, "p_log_variance": prediction.log_variance, "pred_xstart": prediction.x_start}
    for rescaled in (0, 1):
        rescaling = make(**fields, rescale_learned_sigmas=bool(rescaled))
        losses = rescaling.losses(constant(output), x_start, t_B, noise)._asdict()
        found |= {f"loss.rescaled{rescaled}.{key}": value for key, value in losses.items()}
    for spacing in ("250", "50", "ddim25"):
        fewer = make(spacing, **fields)
        ends_B = torch.tensor([0, 1, len(fewer) // 2, len(fewer) - 1])
        mean, log_variance, _ = fewer.predict(output, x_start, ends_B)
        found[f"respace{spacing}.timestep_map"] = torch.from_numpy(fewer.schedule.timesteps_T)
        found[f"respace{spacing}.betas"] = torch.from_numpy(fewer.schedule.betas_T)
        found |= {f"respace{spacing}.p_mean": mean, f"respace{spacing}.p_log_variance": log_variance}
    assert found.keys() == expected.keys() - GIVEN
    for key, value in found.items():
        rtol, atol = (1e-10, 0.0) if value.dtype == torch.float64 else (1e-5, 1e-6)
        torch.testing.assert_close(value, expected[key], rtol=rtol, atol=atol, msg=lambda m, k=key: f"{k} {m}")


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_respacing_to_all_steps_is_the_whole_schedule(kind: str) -> None:
    whole = schedule(kind, 64)
    for respacing in ("", "64", 64, [64], "32,32", "ddim64"):
        again = schedule(kind, 64, respacing)
        assert np.array_equal(again.timesteps_T, whole.timesteps_T)
        np.testing.assert_allclose(again.betas_T, whole.betas_T, rtol=1e-11)


def test_respacing_keeps_what_is_left_of_the_image() -> None:
    whole = schedule("linear", 1000)
    fewer = schedule("linear", 1000, "10,15,20")
    left = np.cumprod(1 - whole.betas_T)[fewer.timesteps_T]
    np.testing.assert_allclose(np.cumprod(1 - fewer.betas_T), left, rtol=1e-10)


def test_steps_taken() -> None:
    assert spaced(300, "10,15,20")[:2] == [0, 11] and len(spaced(300, [10, 15, 20])) == 45
    assert spaced(1000, 3) == [0, 500, 999]  # 499.5 goes to the even neighbour
    assert spaced(1000, "ddim4") == [0, 250, 500, 750]
    assert spaced(7, [1, 2]) == [0, 4, 6]  # sections of 4 and 3
    for steps, respacing in ((10, "11"), (10, "ddim7"), (10, "ddimx"), (10, "a"), (10, "0"), (9, [5, 5]), (10, "-1")):
        with pytest.raises(InputError, match="Expected"):
            spaced(steps, respacing)


@pytest.mark.parametrize(("name", "steps"), [("sigmoid", 10), ("cosine", 0), ("linear", 20)])
def test_impossible_schedules_are_refused(name: str, steps: int) -> None:
    with pytest.raises(InputError, match="Expected"):
        schedule(name, steps)


def test_noisy_images_have_the_moments_of_q() -> None:
    process, count = make(), 40_000
    x_start = torch.full((count, 1, 1, 1), 0.7)
    for step in (0, 37, 99):
        x_t = process.q_sample(x_start, torch.full((count,), step), drawn(step, x_start.shape)).flatten()
        left = float(process.alpha_bar_T[step])
        # six standard errors
        assert abs(float(x_t.mean()) - 0.7 * math.sqrt(left)) < 6 * math.sqrt((1 - left) / count)
        assert abs(float(x_t.var()) / (1 - left) - 1) < 6 * math.sqrt(2 / count)


@pytest.mark.parametrize("respacing", [None, "20", "ddim10", "1"])
def test_the_learned_variance_lies_between_its_ends(respacing: Respacing) -> None:
    process = make(respacing)
    t_B, x_t = torch.arange(len(process)), torch.zeros(len(process), 3, 1, 2)
    output = torch.cat([x_t, drawn(0, x_t.shape).tanh()], dim=1)
    log_variance = process.predict(output, x_t, t_B).log_variance
    low, high = (values.float()[:, None, None, None] for values in (process.log_small_T, process.beta_T.log()))
    assert bool((log_variance >= torch.minimum(low, high) - 1e-6).all())
    assert bool((log_variance <= torch.maximum(low, high) + 1e-6).all())
    for value, end in ((-1.0, low), (1.0, high)):
        output[:, 3:] = value
        torch.testing.assert_close(process.predict(output, x_t, t_B).log_variance, end.expand_as(x_t))


def test_fixed_variances() -> None:
    t_B, x_t = torch.arange(100), torch.zeros(100, 3, 1, 1)
    small = make(variance="fixed_small").predict(x_t, x_t, t_B).log_variance[:, 0, 0, 0].exp()
    large = make(variance="fixed_large").predict(x_t, x_t, t_B).log_variance[:, 0, 0, 0].exp()
    process = make()
    torch.testing.assert_close(small[1:], process.posterior_variance_T[1:].float())
    torch.testing.assert_close(large[1:], process.beta_T[1:].float())
    assert small[0] == large[0] == small[1] and process.posterior_variance_T[0] == 0


def test_the_bounds_terms_are_not_negative_and_vanish_for_the_truth() -> None:
    process, count = make(variance="fixed_small"), 100
    x_start, noise, t_B = drawn(1, (count, 3, 4, 4)).clamp(-1, 1), drawn(2, (count, 3, 4, 4)), torch.arange(count)
    x_t = process.q_sample(x_start, t_B, noise)
    assert float(process.bound_term(drawn(3, noise.shape), x_start, x_t, t_B).min()) >= 0
    assert float(process.bound_term(noise, x_start, x_t, t_B)[1:].abs().max()) < 1e-4
    learned = make()
    assert float(learned.bound_term(drawn(4, (count, 6, 4, 4)), x_start, x_t, t_B).min()) >= 0


def test_probabilities_of_the_256_values_sum_to_one() -> None:
    values = torch.arange(256) / 127.5 - 1
    for mean, scale in ((0.0, 0.02), (0.3, 0.4), (-1.2, 1.0), (1.0, 0.003)):
        logs = discretized_log_likelihood(values, torch.full((256,), mean), torch.full((256,), math.log(scale)))
        assert abs(float(logs.exp().sum()) - 1) < 1e-5


def test_the_prior_term_is_the_distance_from_noise() -> None:
    process = make("2", noise_schedule="linear", diffusion_steps=1000)
    x_start = drawn(5).clamp(-1, 1)
    left = float(process.alpha_bar_T[-1])
    nats = 0.5 * (left * x_start.double().square() - left - math.log(1 - left))
    expected = nats.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(process.prior_term(x_start).double(), expected, rtol=0.1, atol=1e-7)
    assert float(make().prior_term(x_start).max()) < 1e-3


def test_what_the_losses_teach() -> None:
    x_start, noise, t_B = drawn(1).clamp(-1, 1), drawn(2), torch.tensor([0, 1, 50, 99])
    output = drawn(3, (4, 6, 8, 8)).requires_grad_()
    losses = make().losses(constant(output), x_start, t_B, noise)
    assert losses.vb is not None and losses.mse is not None
    torch.testing.assert_close(losses.loss, losses.mse + losses.vb)
    (of_bound,) = torch.autograd.grad(losses.vb.sum(), output, retain_graph=True)
    assert not of_bound[:, :3].any() and bool(of_bound[:, 3:].flatten(1).any(1).all())
    (of_error,) = torch.autograd.grad(losses.mse.sum(), output)
    torch.testing.assert_close(of_error[:, :3], 2 * (output[:, :3] - noise).detach() / noise[0].numel())
    assert not of_error[:, 3:].any()

    process = make(objective="vlb")
    whole = process.losses(constant(output), x_start, t_B, noise)
    x_t = process.q_sample(x_start, t_B, noise)
    torch.testing.assert_close(whole.loss, 100 * process.bound_term(output, x_start, x_t, t_B))
    assert whole.mse is None and bool(torch.autograd.grad(whole.loss.sum(), output)[0][:, :3].any())

    plain = make(variance="fixed_large").losses(constant(output[:, :3]), x_start, t_B, noise)
    assert plain.vb is None and torch.equal(plain.loss, losses.mse)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x_start, t_B = drawn(1), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InputError, match="one step each"):
        make().losses(constant(x_start), x_start, t_B[:3], x_start)
    with pytest.raises(InputError, match="learned_range"):
        make().losses(constant(x_start), x_start, t_B, x_start)


def oracle(process: Diffusion, image: Tensor) -> Denoiser:
    """Knows the one image that there is, and what of it is left after the step that it is told."""
    config = process.config
    left_T = np.cumprod(1 - schedule(config.noise_schedule, config.diffusion_steps).betas_T)

    def noise_in(x_BCHW: Tensor, times_B: Tensor) -> Tensor:
        scale = config.diffusion_steps / 1000 if config.rescale_timesteps else 1
        left = torch.from_numpy(left_T)[(times_B * scale).round().long()].view(-1, 1, 1, 1)
        noise = ((x_BCHW - left.sqrt() * image) / (1 - left).sqrt()).float()
        return torch.cat([noise, torch.zeros_like(noise)], dim=1) if config.variance == "learned_range" else noise

    return noise_in


@pytest.mark.parametrize("eta", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("respacing", [None, "10", "ddim20", "1"])
def test_a_network_that_knows_the_image_makes_it(respacing: Respacing, rescaled: bool, eta: float | None) -> None:
    process = make(respacing, rescale_timesteps=rescaled)
    image = drawn(7).clamp(-0.9, 0.9)
    found = sample(process, oracle(process, image), SHAPE, seeded(0), eta=eta)
    torch.testing.assert_close(found, image, rtol=0, atol=1e-4)


def test_ddim_with_eta_0_is_deterministic_and_draws_nothing() -> None:
    process = make("10")
    x_BCHW, source = drawn(1), seeded(3)
    before = source.get_state()
    model = constant(drawn(2, (4, 6, 8, 8)))
    one = [step.x for step in trajectory(process, model, x_BCHW, source, eta=0.0)]
    other = [step.x for step in trajectory(process, model, x_BCHW, seeded(4), eta=0.0)]
    assert len(one) == 10 and all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert torch.equal(source.get_state(), before)


def test_ddim_with_eta_1_is_the_ancestral_sampler_with_the_small_variance() -> None:
    process = make(variance="fixed_small")
    x_t, noise, t_B = drawn(1), drawn(2), torch.tensor([1, 2, 50, 99])
    model = constant(drawn(3))
    expected = p_sample(process, model, x_t, t_B, noise)
    found = ddim_sample(process, model, x_t, t_B, noise, eta=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="eta"):
        ddim_sample(process, model, x_t, t_B, eta=0.5)
    with pytest.raises(InputError, match="eta"):
        sample(process, model, SHAPE, seeded(0), eta=2.0)


@pytest.mark.parametrize("variance", VARIANCES)
def test_generators_decide_the_images(variance: str) -> None:
    process = make("10", variance=variance)

    def model(x_BCHW: Tensor, times_B: Tensor) -> Tensor:
        return x_BCHW.roll(1, -1).repeat(1, process.config.out_channels // 3, 1, 1) * 0.5

    one, same, other = (sample(process, model, SHAPE, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and float(one.abs().max()) <= 1
    each = sample(process, model, SHAPE, [seeded(seed) for seed in (5, 6, 7, 8)])
    alone = sample(process, model, (1, *SHAPE[1:]), [seeded(7)])
    assert torch.equal(each[2:3], alone) and not torch.equal(each[0], each[1])
    with pytest.raises(InputError, match="generator"):
        normal(SHAPE, [seeded(1)], "cpu")


def test_the_whole_bound() -> None:
    process = make("10")
    x_start = (drawn(1).clamp(-1, 1) * 127.5).round() / 127.5
    known = process.bound(oracle(process, x_start), x_start, seeded(0))
    guess = process.bound(constant(torch.zeros(4, 6, 8, 8)), x_start, seeded(0))
    torch.testing.assert_close(known.total_B, known.terms_BT.sum(1) + known.prior_B)
    assert known.terms_BT.shape == (4, 10) and float(known.terms_BT.min()) >= 0
    assert bool((known.total_B < guess.total_B).all())
