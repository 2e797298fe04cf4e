"""Recipes hold the published values."""

from __future__ import annotations

import json

import pytest

from retinar.engine.errors import InputError
from retinar.train import recipes
from retinar.train.config import GPTTrainConfig, TokenizerTrainConfig, from_dict, to_dict


def test_fundus_xl_is_the_papers() -> None:
    """Table 2 and section 3.5 of the paper."""
    config = to_dict(recipes.gpt_recipe("fundus-xl"))
    model, optim = config["model"], config["optim"]
    assert (model["n_layer"], model["dim"], model["n_head"], model["n_kv_head"]) == (36, 1280, 20, None)
    assert (model["vocab_size"], model["grid"], model["num_classes"], model["cls_token_num"]) == (16384, 32, 2, 1)
    assert model["token_dropout_p"] == model["attn_dropout_p"] == 0.1
    assert model["ffn_dropout_p"] == model["resid_dropout_p"] == 0.1
    assert model["class_dropout_prob"] == 0.1 and model["drop_path_rate"] == 0.0
    assert (model["norm_eps"], model["rope_base"], model["initializer_range"]) == (1e-5, 10000.0, 0.02)
    assert (optim["lr"], optim["betas"], optim["weight_decay"], optim["grad_clip"]) == (1e-4, [0.9, 0.95], 0.05, 1.0)
    assert (optim["schedule"], optim["warmup_steps"]) == ("constant", 0)
    assert (config["batch_size"], config["accumulation"]) == (32, 1)
    assert (config["epochs"], config["steps"]) == (300, None)
    assert config["precision"] == "bf16" and config["compile"] is True
    assert recipes.fundus_xl().model.block_size == 1024
    # 774.7 M with 1000 classes (LLAMAGEN.md); 998 class rows of 1280 fewer here.
    assert recipes.fundus_xl().model.parameter_count == pytest.approx(774.7e6 - 998 * 1280, abs=0.05e6)


@pytest.mark.parametrize(("name", "millions"), [("b", 110.9), ("l", 342.9), ("xl", 774.7)])
def test_llamagen_defaults(name: str, millions: float) -> None:
    config = recipes.gpt_recipe(f"llamagen-{name}")
    assert (config.batch_size, config.epochs, config.seed, config.precision) == (256, 300, 0, "bf16")
    assert (config.log_every, config.checkpoint_every, config.ema_decay) == (100, 5000, None)
    assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (1e-4, (0.9, 0.95), 0.05)
    assert config.optim.grad_clip == 1.0
    model = config.model
    assert (model.vocab_size, model.grid, model.num_classes, model.class_dropout_prob) == (16384, 16, 1000, 0.1)
    assert (model.token_dropout_p, model.resid_dropout_p, model.ffn_dropout_p) == (0.1, 0.1, 0.1)
    assert (model.attn_dropout_p, model.drop_path_rate) == (0.0, 0.0)
    assert model.parameter_count / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", ["vq8", "vq8-finetune"])
def test_tokenizer_losses_are_the_papers(name: str) -> None:
    config = recipes.tokenizer_recipe(name)
    assert (config.reconstruction_loss, config.reconstruction_weight) == ("l2", 1.0)
    assert (config.perceptual, config.perceptual_weight, config.codebook_weight) == ("vgg", 1.0, 1.0)
    assert config.model.commit_loss_beta == 0.25
    assert (config.disc_weight, config.disc_start, config.disc_channels, config.disc_layers) == (0.5, 20_000, 64, 3)
    for optim in (config.optim, config.disc_optim):
        assert (optim.lr, optim.betas, optim.weight_decay) == (1e-4, (0.9, 0.95), 0.0)
    assert config.start == ("checkpoint" if name == "vq8-finetune" else "scratch")
    assert (config.model.ch, config.model.ch_mult, config.model.codebook_size) == (128, (1, 2, 2, 4), 16384)


def test_small_recipes_are_small() -> None:
    counts = {name: recipes.gpt_recipe(name).model.parameter_count / 1e6 for name in recipes.GPT_RECIPES}
    assert counts["fundus-tiny"] < 1.5
    assert 5 <= counts["fundus-cpu"] <= 6 and recipes.fundus_cpu().model.grid == 16
    assert 20 <= counts["fundus-small"] <= 25 and recipes.fundus_small().model.grid == 32


@pytest.mark.parametrize("name", [*recipes.GPT_RECIPES, *recipes.TOKENIZER_RECIPES])
def test_every_recipe_is_complete_and_survives_json(name: str) -> None:
    if name in recipes.GPT_RECIPES:
        config: GPTTrainConfig | TokenizerTrainConfig = recipes.gpt_recipe(name)
    else:
        config = recipes.tokenizer_recipe(name)
    assert config.recipe == name
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_unknown_recipes_name_the_known() -> None:
    with pytest.raises(InputError, match=r"'fundus-xxl'.*did you mean fundus-xl"):
        recipes.gpt_recipe("fundus-xxl")
    with pytest.raises(InputError, match=r"zzz.*known are fundus-xl, fundus-small"):
        recipes.gpt_recipe("zzz")
    with pytest.raises(InputError, match="train tokenizer"):
        recipes.gpt_recipe("vq8")
