"""Configs: overrides typed by their fields, JSON and back, values refused at the door."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinar.engine.errors import InputError
from retinar.train import recipes
from retinar.train.config import (
    GPTTrainConfig,
    OptimConfig,
    TokenizerTrainConfig,
    apply_overrides,
    flatten,
    from_dict,
    to_dict,
)

GPT = recipes.fundus_tiny()
VQ = recipes.vq8_tiny()


def test_overrides_reach_every_level_and_leave_the_rest() -> None:
    changed = apply_overrides(GPT, ["optim.lr=1e-4", "model.n_layer=3", "batch_size=6", "accumulation=3"])
    assert (changed.optim.lr, changed.model.n_layer, changed.batch_size, changed.accumulation) == (1e-4, 3, 6, 3)
    before, after = flatten(to_dict(GPT)), flatten(to_dict(changed))
    assert {key for key in before if before[key] != after[key]} == {
        "optim.lr",
        "model.n_layer",
        "batch_size",
        "accumulation",
    }
    assert recipes.fundus_tiny() == GPT, "the recipe itself is untouched"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("perceptual=none", "perceptual", "none"),  # a choice called none, not None
        ("crop_size=none", "crop_size", None),
        ("crop_size=64", "crop_size", 64),
        ("ema_decay=null", "ema_decay", None),
        ("mirror=off", "mirror", False),
        ("compile=TRUE", "compile", True),
        ("model.ch_mult=1,2,4", "model.ch_mult", (1, 2, 4)),
        ("optim.betas=(0.5, 0.9)", "optim.betas", (0.5, 0.9)),
        ("perceptual_weights=a=b.safetensors", "perceptual_weights", "a=b.safetensors"),
        (" disc_weight = 0 ", "disc_weight", 0.0),
    ],
)
def test_values_are_read_as_their_field(text: str, key: str, value: object) -> None:
    changed: object = apply_overrides(VQ, [text])
    for part in key.split("."):
        changed = getattr(changed, part)
    assert changed == value and type(changed) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr=1", ["'lr'", "optim.lr"]),
        ("optim.lrr=1", ["optim.lrr", "optim.lr"]),
        ("batchsize=1", ["batchsize", "batch_size"]),
        ("optim.lr.x=1", ["optim.lr.x"]),
        ("zzzz=1", ["zzzz", "--print-config"]),
        ("optim=1", ["group", "optim.lr"]),
        ("batch_size", ["key=value", "batch_size"]),
        ("=3", ["key=value"]),
        ("batch_size=1.5", ["whole number", "batch_size", "1.5"]),
        ("batch_size=0", ["batch_size", "at least 1"]),
        ("accumulation=3", ["accumulation", "batch_size 16"]),
        ("optim.lr=nan", ["finite", "optim.lr"]),
        ("optim.lr=inf", ["finite", "optim.lr"]),
        ("optim.lr=-1", ["above 0", "optim.lr"]),
        ("optim.lr=fast", ["finite number", "fast"]),
        ("optim.betas=0.9", ["2 comma-separated", "optim.betas"]),
        ("optim.betas=0.9,1.0", ["optim.betas", "[0, 1)"]),
        ("precision=fp8", ["fp32", "bf16", "fp8"]),
        ("compile=maybe", ["true or false", "maybe"]),
        ("keep_last=none", ["whole number", "keep_last"]),
        ("ema_decay=1", ["ema_decay", "(0, 1)"]),
        ("steps=none", ["steps and epochs"]),
        (f"seed={2**64}", ["seed from 0"]),
        ("model.n_head=3", ["n_head"]),
        ("model.token_dropout_p=1.5", ["token_dropout_p"]),
    ],
)
def test_bad_overrides_are_one_sentence(text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        apply_overrides(GPT, [text])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@given(
    st.floats(min_value=1e-30, max_value=1e30),
    st.integers(min_value=1, max_value=10**9),
    st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    st.one_of(st.none(), st.integers(1, 10**6)),
)
def test_any_value_survives_text_and_json(
    lr: float, seed: int, betas: tuple[float, float], crop_size: int | None
) -> None:
    texts = [f"optim.lr={lr!r}", f"seed={seed}", f"optim.betas={betas[0]!r},{betas[1]!r}", f"crop_size={crop_size}"]
    changed = apply_overrides(VQ, texts)
    assert (changed.optim.lr, changed.seed, changed.optim.betas, changed.crop_size) == (lr, seed, betas, crop_size)
    assert from_dict(TokenizerTrainConfig, json.loads(json.dumps(to_dict(changed)))) == changed


@given(st.text(max_size=40))
def test_any_text_is_applied_or_refused(text: str) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(apply_overrides(GPT, [text]), GPTTrainConfig)


def test_stored_configs_of_another_version_are_named() -> None:
    stored = to_dict(GPT)
    with pytest.raises(InputError, match="surprise"):
        from_dict(GPTTrainConfig, {**stored, "surprise": 1})
    del stored["model"]
    with pytest.raises(InputError, match="model"):
        from_dict(GPTTrainConfig, stored)


def test_length_is_steps_or_epochs() -> None:
    assert dataclasses.replace(GPT, steps=7).total_steps(10**6) == 7
    by_epochs = dataclasses.replace(GPT, steps=None, epochs=3, batch_size=4, accumulation=1)
    assert by_epochs.total_steps(10) == 7  # 30 images in batches of 4, the rest dropped
    assert by_epochs.total_steps(1) == 1


def test_no_clipping_is_none() -> None:
    assert apply_overrides(GPT, ["optim.grad_clip=none"]).optim.grad_clip is None
    with pytest.raises(InputError, match="grad_clip"):
        OptimConfig(grad_clip=-math.pi)
