"""The model card that a checkpoint gets when its writer gives none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retinar.engine.model import GPT
from retinar.engine.tokenizer import VQTokenizer


def model_card(model: GPT | VQTokenizer, fields: Mapping[str, Any]) -> str:
    """README.md from the model and the fields of its config.json."""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    if isinstance(model, GPT):
        labels = ", ".join(fields.get("classes", ())) or f"0 to {model.config.num_classes - 1}"
        body = (
            f"An autoregressive transformer over {model.config.grid}x{model.config.grid} codes, "
            f"{millions:.1f} M parameters.\n\nLabels: {labels}.\n\n"
            "    retinar generate --model . --label LABEL --count 16 --out images\n\n"
            "What it draws is synthetic and no basis for a diagnosis.\n"
        )
    else:
        body = (
            f"A VQ tokenizer: {model.config.downsample}x{model.config.downsample} pixels a code, "
            f"{model.config.codebook_size} codes, {millions:.1f} M parameters.\n\n"
            "    retinar encode PHOTOGRAPHS --tokenizer . --out CODES\n"
        )
    origin = f"Written by retinar {fields['retinar']}. Weights: SHA-256 {fields['sha256']}."
    return f"# retinar {fields['kind']}\n\n{body}\n{origin}\n"
