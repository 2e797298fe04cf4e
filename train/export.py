"""The released folder: a trained transformer and its tokenizer in bf16, with a card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from retinar.engine.checkpoint import load_gpt, load_tokenizer, read_config, save_gpt
from retinar.engine.model import GPT
from retinar.engine.tokenizer import VQTokenizer

MAX_SHARD_BYTES = 15_000_000


def export_release(trained: Path, folder: Path, *, variant: str, stages: Mapping[str, Mapping[str, Any]]) -> int:
    """Write ``folder`` from a trained transformer's folder with its tokenizer inside; its size in bytes.

    ``stages``: how the tokenizer's and the transformer's training went, for config.json and the card.
    """
    model = load_gpt(trained, dtype=torch.bfloat16)
    tokenizer = load_tokenizer(trained / "tokenizer", dtype=torch.bfloat16)
    classes = tuple(read_config(trained)["classes"])
    save_gpt(
        folder,
        model,
        classes=classes,
        tokenizer=tokenizer,
        card=release_card(model, tokenizer, classes, variant, stages),
        extra={"release": {"variant": variant, "training": stages}},
        max_shard_bytes=MAX_SHARD_BYTES,
    )
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def release_card(
    model: GPT, tokenizer: VQTokenizer, classes: tuple[str, ...], variant: str, stages: Mapping[str, Mapping[str, Any]]
) -> str:
    """The text of README.md."""
    transformer, pixels = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, tokenizer))
    size, grid, names = tokenizer.config.image_size, model.config.grid, ", ".join(classes)
    runs = "\n".join(
        f"- {part}: {done['steps']} of {done['of']} steps; last figures "
        + ", ".join(f"{name} {value:.4g}" for name, value in done.items() if isinstance(value, float))
        for part, done in stages.items()
    )
    return f"""# A small model of colour fundus photographs

An autoregressive transformer ({transformer:.1f} M parameters) over {grid}x{grid} codes of a VQ tokenizer
({pixels:.1f} M parameters, {tokenizer.config.codebook_size} codes, {size}x{size} pixels), bf16. Classes: {names}.
Trained by `python -m retinar.train.released`, variant {variant}.

    retinar generate --model . --label {classes[0]} --count 16 --out images

{runs}

What it draws is synthetic: for research on methods, no basis for a diagnosis. It knows only the photographs that it was
trained on, with their cameras, people and mistakes.
"""
