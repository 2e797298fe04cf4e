"""What is sampled when sampling is measured: the paper's GPT-XL, or a tiny model as an exercise; names of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from retinar.engine.config import GPTConfig, TokenizerConfig, gpt_config, tokenizer_config
from retinar.engine.model import GPT

CFG_SCALE = 2.0

OURS = "ours"
INVARIANT = "ours, batch invariant"
TO_PNG = "ours, to PNG"
REFERENCE = "our references, eager"
STATIC = "static cache, torch.compile"
UPSTREAM = {"eager": "LlamaGen, eager", "compile": "LlamaGen, --compile"}


@dataclass(frozen=True)
class Size:
    """``batches``: images at once, ours, the most important first; ``invariant``: those once more, batch invariant.

    ``traced``: images of the step whose trace is written. ``references``, ``static``, ``upstream``: images of the
    baselines; ``window``: steps that are measured of one that would take too long. ``slots`` at once of ``to_png``
    images end to end.
    """

    model: str
    batches: tuple[int, ...]
    invariant: tuple[int, ...]
    traced: int
    references: tuple[int, ...]
    static: tuple[int, ...]
    upstream: tuple[int, ...]
    slots: int
    to_png: int
    window: int
    dtype: torch.dtype
    page_size: int = 16
    changes: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = "VQ-8"
    tokenizer_changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> GPTConfig:
        return gpt_config(self.model, **self.changes)

    @property
    def tokenizer_config(self) -> TokenizerConfig:
        return tokenizer_config(self.tokenizer, **self.tokenizer_changes)


TINY = {"n_layer": 2, "n_head": 1, "dim": 32, "multiple_of": 32}
SIZES: Mapping[str, Size] = {
    "cuda": Size(
        model="GPT-XL",
        batches=(1, 64, 8, 256),
        invariant=(256, 64, 1, 8),
        traced=64,
        references=(1, 64),
        static=(1, 64),
        upstream=(1, 64, 128, 8),
        slots=64,
        to_png=128,
        window=32,
        dtype=torch.bfloat16,
    ),
    # On a CPU only an exercise: two layers, nine codes.
    "exercise": Size(
        model="GPT-tiny",
        batches=(1, 2),
        invariant=(1,),
        traced=1,
        references=(1,),
        static=(1,),
        upstream=(1, 2),
        slots=1,
        to_png=1,
        window=2,
        dtype=torch.float32,
        changes={**TINY, "vocab_size": 64, "num_classes": 2, "grid": 3},
        tokenizer="VQ-8-tiny",
        tokenizer_changes={"codebook_size": 64, "image_size": 24},
    ),
}


def make_gpt(size: Size, device: str) -> GPT:
    """Random weights, made on the device. The output's too: products with zeros are faster than a model's."""
    torch.manual_seed(0)
    with torch.device(device):
        gpt = GPT(size.config)
    torch.nn.init.normal_(gpt.output.weight, std=size.config.initializer_range)
    return gpt.to(size.dtype).eval().requires_grad_(False)
