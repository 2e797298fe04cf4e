"""What decoding on a CPU is measured with, and the names of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from retinar.bench.baselines.gguf_model import BF16, Q8_0
from retinar.bench.sampling_sizes import TINY
from retinar.engine.config import GPTConfig, gpt_config
from retinar.kernels import ops

EAGER = "upstream-like, eager"
STATIC = "torch.compile, static cache"
CUT = "torch.compile, cache cut to the context"
OURS = "ours"
INT8 = "ours, int8 weights"
INT8_CACHE = "ours, int8 weights and cache"
COMPILED = (STATIC, CUT)
"""With the weights as constants, attention as products and sums. A cache that ends where the context does is read no
further than ours; a whole image would need a compilation for every length."""
LLAMA_CPP = {BF16: "llama.cpp BF16", Q8_0: "llama.cpp Q8_0"}
"""Beside ours at the same width of weights."""


@dataclass(frozen=True)
class Case:
    """``seconds``: what all of it is taken to need; of llama.cpp each kind of weights may take as long again."""

    model: str
    images: int
    seconds: float = 60.0


@dataclass(frozen=True)
class DecodingSize:
    """``context``: slots that a step attends over. ``read_bytes``, ``side``: of the limits' loops. Each row takes about
    ``seconds``, but at least ``least`` steps and at most ``most``. ``clocked``: steps by the decoder's own clock.
    """

    cases: tuple[Case, ...]
    context: int
    page_size: int
    read_bytes: int
    side: int
    seconds: float
    least: int = 5
    most: int = 200
    clocked: int = 20
    changes: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16

    def config(self, case: Case) -> GPTConfig:
        return gpt_config(case.model, **self.changes)


SIZES: Mapping[str, DecodingSize] = {
    "cpu": DecodingSize(
        cases=(
            Case("GPT-B", 1),
            Case("GPT-B", 4),
            Case("GPT-B", 16),
            Case("GPT-XL", 1, seconds=150.0),
            Case("GPT-XL", 4, seconds=150.0),
        ),
        context=512,
        page_size=16,
        read_bytes=768 * 2**20,
        side=2048,
        seconds=2.0,
        changes={"vocab_size": 16384, "grid": 32},
    ),
    # Two layers, nine codes, and no code generator.
    "exercise": DecodingSize(
        cases=(Case("GPT-tiny", 1), Case("GPT-tiny", 2)),
        context=6,
        page_size=4,
        read_bytes=2**20,
        side=64,
        seconds=0.0,
        least=2,
        clocked=2,
        changes={**TINY, "vocab_size": 64, "num_classes": 2, "grid": 3},
    ),
}


def random_weights(config: GPTConfig, dtype: torch.dtype) -> ops.DecodeWeights:
    """Random numbers of the size that training starts with; of a layer those of the first, in another order, which
    takes seconds less and leaves no two equal (a compiler keeps equal constants once)."""
    generator = torch.Generator().manual_seed(0)
    width, hidden = config.dim, config.ffn_hidden

    def matrix(outer: int, inner: int = width) -> torch.Tensor:
        return torch.randn(outer, inner, generator=generator).mul_(config.initializer_range).to(dtype)

    def matrices(outer: int, inner: int = width) -> list[torch.Tensor]:
        first = matrix(outer, inner)
        return [first.roll(layer, 0) for layer in range(config.n_layer)]

    def norms() -> list[torch.Tensor]:
        return [torch.ones(width, dtype=dtype) for _ in range(config.n_layer)]

    return ops.DecodeWeights(
        cls_embedding_CD=matrix(config.class_rows),
        tok_embedding_VD=matrix(config.vocab_size),
        attention_norm=norms(),
        wqkv=matrices((config.n_head + 2 * config.kv_heads) * config.head_dim),
        wo=matrices(width, config.n_head * config.head_dim),
        ffn_norm=norms(),
        w13=matrices(2 * hidden),
        w2=matrices(width, hidden),
        norm_D=torch.ones(width, dtype=dtype),
        output_VD=matrix(config.vocab_size),
        n_head=config.n_head,
        n_kv_head=config.kv_heads,
        eps=config.norm_eps,
        rope_NC2=ops.rope_table(config.grid, config.grid, config.head_dim, base=config.rope_base),
    )
