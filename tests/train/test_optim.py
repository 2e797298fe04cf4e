"""AdamW's groups and state, schedules, clipping, the moving average, the order of images, the golden trajectory."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from retinar.engine.checkpoint import file_weights, load_gpt
from retinar.train.config import OptimConfig
from retinar.train.optim import (
    EMA,
    build_adamw,
    clip_gradients,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from retinar.train.order import Order


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 5))


def test_decay_is_for_matrices_and_embeddings() -> None:
    model = network()
    optimizer = build_adamw(model, OptimConfig(weight_decay=0.05))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.05,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.05,
        "2.bias": 0.0,
    }


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = build_adamw(model, OptimConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    assert "0.weight" not in optimizer_state(model, optimizer)
    assert "0.weight" not in EMA(model, 0.9).averages


def test_state_is_there_from_the_start_and_changes_nothing() -> None:
    """Five steps equal those of a plain torch AdamW that allocates its state lazily."""
    ours, theirs = network(), network()
    optimizer = build_adamw(ours, OptimConfig(lr=0.01, betas=(0.9, 0.95), weight_decay=0.0))
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    assert all(state["step"] == 0 for state in optimizer_state(ours, optimizer).values())
    for step in range(5):
        for model, its in ((ours, optimizer), (theirs, plain)):
            model(torch.tensor([step, 1, 2])).square().sum().backward()
            its.step()
            its.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_optimizer_state_is_by_name_in_place_and_loads() -> None:
    model = network()
    optimizer = build_adamw(model, OptimConfig())
    model(torch.tensor([1, 2])).square().sum().backward()
    optimizer.step()
    state = optimizer_state(model, optimizer)
    assert state["2.weight"]["exp_avg"] is optimizer.state[model[2].weight]["exp_avg"]
    other = network()
    fresh = build_adamw(other, OptimConfig())
    load_optimizer_state(other, fresh, state)
    for name, tensors in optimizer_state(other, fresh).items():
        assert all(torch.equal(tensors[key], state[name][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_constant_and_cosine_schedules() -> None:
    constant = OptimConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(constant, step, 100) for step in (0, 1, 3, 4, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = OptimConfig(lr=2.0, schedule="cosine", warmup_steps=10, final_lr_ratio=0.1)
    assert learning_rate(cosine, 9, 111) == learning_rate(cosine, 10, 111) == 2.0
    assert learning_rate(cosine, 60, 111) == pytest.approx(1.1)  # half way: the mean of 2 and 0.2
    assert learning_rate(cosine, 110, 111) == pytest.approx(0.2)
    assert learning_rate(cosine, 500, 111) == pytest.approx(0.2)


@given(st.integers(0, 50), st.integers(1, 200), st.floats(0, 1))
def test_schedules_stay_within_bounds(warmup: int, total: int, final: float) -> None:
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=warmup, final_lr_ratio=final)
    rates = [learning_rate(config, step, total) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates[:warmup])
    after = rates[warmup:]
    assert all(final - 1e-9 <= rate <= 1 for rate in after)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))


def test_clipping_returns_the_norm_before() -> None:
    model = nn.Linear(2, 1, bias=False)
    for max_norm, expected in ((1.0, [0.6, 0.8]), (None, [3.0, 4.0]), (10.0, [3.0, 4.0])):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clip_gradients(model.parameters(), max_norm) == pytest.approx(5.0)
        assert model.weight.grad.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_the_average_follows_its_formula() -> None:
    model = network()
    ema = EMA(model, decay=0.75)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(torch.randn_like(p))
                expected[name] = 0.75 * expected[name] + 0.25 * p
        ema.update(model)
    assert ema.averages.keys() == expected.keys()
    for name, average in ema.averages.items():
        torch.testing.assert_close(average, expected[name])
    other = EMA(network(), 0.75)
    other.load(ema.averages)
    assert all(torch.equal(other.averages[name], ema.averages[name]) for name in ema.averages)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 17), st.integers(1, 3), st.integers(0, 2**40))
def test_every_pass_sees_every_image_once(images: int, batch_size: int, views: int, seed: int) -> None:
    order = Order(images, batch_size, seed=seed, views=views)
    steps = math.ceil(3 * images / batch_size)
    batches = [order.batch(step) for step in range(steps)]
    seen = np.concatenate([batch[0] for batch in batches])
    for epoch in range(3):
        assert sorted(seen[epoch * images : (epoch + 1) * images]) == list(range(images))
    drawn = np.concatenate([batch[1] for batch in batches])
    assert drawn.min() >= 0 and drawn.max() < views
    # The same from any step on: nothing but (seed, step) decides.
    late = Order(images, batch_size, seed=seed, views=views).batch(steps - 1)
    assert all(np.array_equal(a, b) for a, b in zip(late, batches[-1], strict=True))


def test_passes_and_views_differ() -> None:
    order = Order(1000, 1000, seed=0, views=2)
    (first, first_views), (second, second_views) = order.batch(0), order.batch(1)
    assert not np.array_equal(first, second) and not np.array_equal(first_views, second_views)
    assert 400 < first_views.sum() < 600
    assert not np.array_equal(first, Order(1000, 1000, seed=1).batch(0)[0])
    with pytest.raises(ValueError, match="at least one image"):
        Order(0, 4, seed=0)


def test_golden_trajectory(golden: Path) -> None:
    """Five AdamW steps from upstream's weights: losses, gradient norms and final weights of the public code."""
    model = load_gpt(golden / "gpt_ddp.pt", golden / "gpt_config.json").train()
    batch = load_file(golden / "gpt_expected.safetensors")
    expected = load_file(golden / "gpt_training.safetensors")
    config = OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, grad_clip=1.0)
    optimizer = build_adamw(model, config)
    losses, norms = [], []
    for step in range(5):
        set_learning_rate(optimizer, learning_rate(config, step, 5))
        loss = model.loss(batch["tokens"], batch["labels"])
        loss.backward()
        norms.append(clip_gradients(model.parameters(), config.grad_clip))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses), expected["loss"].flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(norms), expected["grad_norm"].flatten(), rtol=1e-4, atol=1e-5)
    weights = file_weights(model)
    finals = {key.removeprefix("final."): value for key, value in expected.items() if key.startswith("final.")}
    assert finals.keys() == weights.keys()
    for name, value in finals.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
