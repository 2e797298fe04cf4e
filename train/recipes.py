"""Recipes: functions that return a complete config. One place for every number of a run; add recipes, not flags."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TypeVar

from retinar.engine.config import gpt_config, tokenizer_config
from retinar.engine.errors import InputError
from retinar.train.config import GPTTrainConfig, OptimConfig, TokenizerTrainConfig

Recipe = TypeVar("Recipe")


def fundus_xl() -> GPTTrainConfig:
    """The paper's transformer (its Table 2 and section 3.5): GPT-XL on 32x32 codes of VQ-8, two classes."""
    return GPTTrainConfig(
        recipe="fundus-xl",
        model=gpt_config(
            "GPT-XL",
            vocab_size=16384,
            grid=32,
            num_classes=2,
            token_dropout_p=0.1,
            attn_dropout_p=0.1,
            resid_dropout_p=0.1,
            ffn_dropout_p=0.1,
            class_dropout_prob=0.1,
        ),
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, grad_clip=1.0, schedule="constant"),
        batch_size=32,
        epochs=300,
        precision="bf16",
        compile=True,
    )


def _llamagen(recipe: str, size: str) -> GPTTrainConfig:
    """The defaults of LlamaGen's ``train_c2i.py``: ImageNet at 256 pixels, codes of VQ-16 (16x16)."""
    return GPTTrainConfig(
        recipe=recipe,
        model=gpt_config(size, vocab_size=16384, grid=16, num_classes=1000),
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, grad_clip=1.0, schedule="constant"),
        batch_size=256,
        epochs=300,
        precision="bf16",
        compile=True,
        log_every=100,
        checkpoint_every=5000,
    )


def llamagen_b() -> GPTTrainConfig:
    """LlamaGen's GPT-B, class-conditional ImageNet."""
    return _llamagen("llamagen-b", "GPT-B")


def llamagen_l() -> GPTTrainConfig:
    """LlamaGen's GPT-L, class-conditional ImageNet."""
    return _llamagen("llamagen-l", "GPT-L")


def llamagen_xl() -> GPTTrainConfig:
    """LlamaGen's GPT-XL, class-conditional ImageNet."""
    return _llamagen("llamagen-xl", "GPT-XL")


def fundus_small() -> GPTTrainConfig:
    """20 to 25 M parameters (4,096 codes) for one GPU; no attention dropout: torch's fused attention can run."""
    return GPTTrainConfig(
        recipe="fundus-small",
        model=gpt_config("GPT-small", vocab_size=4096, grid=32, num_classes=2),
        fit_to_codes=True,
        optim=OptimConfig(lr=6e-4, schedule="cosine", warmup_steps=200, final_lr_ratio=0.05),
        batch_size=64,
        epochs=None,
        steps=6000,
        precision="bf16",
        ema_decay=0.999,
        log_every=20,
        eval_every=500,
        checkpoint_every=500,
    )


def fundus_cpu() -> GPTTrainConfig:
    """5 to 6 M parameters (1,024 codes) on the 16x16 grid of ``vq8-cpu``: about half an hour on one core.

    Small dropouts: so short a training underfits.
    """
    return GPTTrainConfig(
        recipe="fundus-cpu",
        model=gpt_config(
            "GPT-mini",
            vocab_size=1024,
            grid=16,
            num_classes=2,
            token_dropout_p=0.05,
            resid_dropout_p=0.05,
            ffn_dropout_p=0.05,
        ),
        fit_to_codes=True,
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=50, final_lr_ratio=0.05),
        batch_size=16,
        epochs=None,
        steps=1000,
        precision="bf16",
        ema_decay=0.99,
        log_every=10,
        eval_every=150,
        eval_images=64,
        checkpoint_every=150,
    )


def fundus_tiny() -> GPTTrainConfig:
    """About 1 M parameters for the demo's phantoms: a minute on two cores at small grids, too short for dropout."""
    return GPTTrainConfig(
        recipe="fundus-tiny",
        model=gpt_config(
            "GPT-tiny",
            vocab_size=1024,
            grid=8,
            num_classes=2,
            token_dropout_p=0.0,
            resid_dropout_p=0.0,
            ffn_dropout_p=0.0,
        ),
        fit_to_codes=True,
        optim=OptimConfig(lr=2e-3, schedule="cosine", warmup_steps=20, final_lr_ratio=0.05),
        batch_size=16,
        epochs=None,
        steps=480,
        precision="fp32",
        ema_decay=0.98,
        log_every=10,
        eval_every=100,
        eval_images=64,
        checkpoint_every=100,
        keep_last=1,
        tensorboard=False,
    )


def vq8() -> TokenizerTrainConfig:
    """LlamaGen's VQ-8 from scratch: L2 + LPIPS (VGG) + codebook + 0.25 commitment + 0.5 PatchGAN (hinge) from step
    20,000; Adam without weight decay, lr 1e-4, batch 128, 40 epochs."""
    adam = OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1.0, schedule="constant")
    return TokenizerTrainConfig(
        recipe="vq8",
        model=tokenizer_config("VQ-8"),
        optim=adam,
        disc_optim=adam,
        batch_size=128,
        epochs=40,
        precision="bf16",
        compile=True,
        disc_start=20_000,
        disc_weight=0.5,
    )


def vq8_finetune() -> TokenizerTrainConfig:
    """The paper's tokenizer: VQ-8 fine-tuned on fundus photographs from a checkpoint, with the losses of ``vq8``."""
    adam = OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1.0, schedule="constant")
    return TokenizerTrainConfig(
        recipe="vq8-finetune",
        model=tokenizer_config("VQ-8"),
        start="checkpoint",
        optim=adam,
        disc_optim=adam,
        batch_size=32,
        epochs=100,
        precision="bf16",
        disc_start=20_000,
        disc_weight=0.5,
    )


def vq8_narrow() -> TokenizerTrainConfig:
    """A narrow VQ-8 (4,096 codes) from scratch on one GPU, on crops; the small released model's tokenizer."""
    adam = OptimConfig(
        lr=4e-4, betas=(0.9, 0.95), weight_decay=0.0, schedule="cosine", warmup_steps=200, final_lr_ratio=0.1
    )
    return TokenizerTrainConfig(
        recipe="vq8-narrow",
        model=tokenizer_config("VQ-8-narrow"),
        optim=adam,
        disc_optim=OptimConfig(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0),
        batch_size=32,
        epochs=None,
        steps=8000,
        crop_size=128,
        whole_from=0.85,
        precision="bf16",
        ema_decay=0.999,
        revive_after=200,
        quantize_from=500,
        disc_start=5000,
        disc_weight=0.5,
        log_every=20,
        eval_every=1000,
        eval_images=256,
        checkpoint_every=1000,
    )


def vq8_cpu() -> TokenizerTrainConfig:
    """A light VQ-8 (1,024 codes) with LPIPS for 128 px photographs, from scratch: about half an hour on one core.

    Chosen for speed there (see TokenizerTrainConfig for the options): a plain autoencoder first, then codes, then the
    perceptual loss on a quarter of each image; L1, since it counts thin vessels for more than L2 does; unused codes
    revived; no discriminator. For 256 px: ``--set model.image_size=256 crop_size=128 whole_from=0.85 steps=5000``.
    """
    adam = OptimConfig(
        lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0, schedule="cosine", warmup_steps=50, final_lr_ratio=0.02
    )
    return TokenizerTrainConfig(
        recipe="vq8-cpu",
        model=tokenizer_config("VQ-8-light", image_size=128),
        optim=adam,
        batch_size=4,
        epochs=None,
        steps=2000,
        precision="bf16",
        reconstruction_loss="l1",
        perceptual_side=0.5,
        perceptual_from=1000,
        revive_after=100,
        quantize_from=300,
        disc_weight=0.0,
        log_every=20,
        eval_every=200,
        eval_images=16,
        checkpoint_every=100,
    )


def vq8_tiny() -> TokenizerTrainConfig:
    """The smallest VQ-8 (1,024 codes) on crops, L2 alone: minutes on two cores."""
    adam = OptimConfig(
        lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0, schedule="cosine", warmup_steps=20, final_lr_ratio=0.1
    )
    return TokenizerTrainConfig(
        recipe="vq8-tiny",
        model=tokenizer_config("VQ-8-tiny"),
        optim=adam,
        disc_optim=OptimConfig(weight_decay=0.0),
        batch_size=16,
        epochs=None,
        steps=300,
        crop_size=64,
        precision="fp32",
        perceptual="none",
        disc_weight=0.0,
        log_every=10,
        eval_every=100,
        eval_images=32,
        checkpoint_every=100,
        keep_last=1,
        tensorboard=False,
    )


def vq4_tiny() -> TokenizerTrainConfig:
    """The demo's tokenizer: 4x4 pixels a code (256 codes), whole pictures of 48 pixels, L2 alone; a minute or two on
    two cores. At so few pixels a lesion is as large as a code of VQ-8 would be, and would be lost."""
    adam = OptimConfig(
        lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, schedule="cosine", warmup_steps=20, final_lr_ratio=0.1
    )
    return TokenizerTrainConfig(
        recipe="vq4-tiny",
        model=tokenizer_config("VQ-8-tiny", ch_mult=(1, 2, 4), codebook_size=256, image_size=48),
        optim=adam,
        disc_optim=OptimConfig(weight_decay=0.0),
        batch_size=4,
        epochs=None,
        steps=1100,
        quantize_from=400,
        revive_after=20,
        precision="fp32",
        perceptual="none",
        disc_weight=0.0,
        log_every=20,
        eval_every=350,
        eval_images=16,
        checkpoint_every=200,
        keep_last=1,
        tensorboard=False,
    )


GPT_RECIPES: Mapping[str, Callable[[], GPTTrainConfig]] = {
    "fundus-xl": fundus_xl,
    "fundus-small": fundus_small,
    "fundus-cpu": fundus_cpu,
    "fundus-tiny": fundus_tiny,
    "llamagen-b": llamagen_b,
    "llamagen-l": llamagen_l,
    "llamagen-xl": llamagen_xl,
}
TOKENIZER_RECIPES: Mapping[str, Callable[[], TokenizerTrainConfig]] = {
    "vq8-finetune": vq8_finetune,
    "vq8": vq8,
    "vq8-narrow": vq8_narrow,
    "vq8-cpu": vq8_cpu,
    "vq8-tiny": vq8_tiny,
    "vq4-tiny": vq4_tiny,
}


def gpt_recipe(name: str) -> GPTTrainConfig:
    """The transformer recipe of that name; InputError names the known ones."""
    return _known(name, "gpt", GPT_RECIPES)()


def tokenizer_recipe(name: str) -> TokenizerTrainConfig:
    """The tokenizer recipe of that name; InputError names the known ones."""
    return _known(name, "tokenizer", TOKENIZER_RECIPES)()


def _known(name: str, kind: str, recipes: Mapping[str, Callable[[], Recipe]]) -> Callable[[], Recipe]:
    if name not in recipes:
        other = "tokenizer" if kind == "gpt" else "gpt"
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(recipes)}."
        if name in (TOKENIZER_RECIPES if kind == "gpt" else GPT_RECIPES):
            hint = f"that one is for `train {other}`; known are {', '.join(recipes)}."
        raise InputError(f"Expected a recipe for `train {kind}`, found {name!r}: {hint}")
    return recipes[name]
