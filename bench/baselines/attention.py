"""Other people's attention: torch's SDPA with FlashAttention inside, and the package flash-attn."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from retinar.bench.baselines.plain import compile_absent, compiled
from retinar.bench.baselines.table import Baseline, Run
from retinar.kernels import ops
from retinar.kernels.spec import Inputs, OpSpec, attention_parts

NAMES = ("rope_attention", "rope_attention_packed", "rope_attention_dropout")
ROTATED = "compiled rotation + SDPA flash"


def _sdpa(i: Inputs) -> tuple[torch.Tensor]:
    """Without the rotation. RuntimeError where torch has no FlashAttention for the call."""
    q, k, v = attention_parts(i)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return (
            F.scaled_dot_product_attention(
                q, k, v, dropout_p=i["dropout_p"], is_causal=True, enable_gqa=k.shape[1] != q.shape[1]
            ),
        )


def _rotation(i: Inputs) -> tuple[torch.Tensor, ...]:
    return ops.apply_rope(i["q"], i["rope"]), ops.apply_rope(i["k"], i["rope"])


def _rotated_sdpa(spec: OpSpec, device: str, size: str) -> Run:
    rotate = compiled(_rotation, size)

    def run(i: Inputs) -> tuple[torch.Tensor]:
        q, k, v = attention_parts(i)
        q, k = rotate({"q": q, "k": k, "rope": i["rope"]})
        return _sdpa({"q": q, "k": k, "v": v, "dropout_p": i["dropout_p"]})

    return run


def _flash_attention(spec: OpSpec, device: str, size: str) -> Run:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found,unused-ignore]

    def run(i: Inputs) -> tuple[torch.Tensor]:
        q, k, v = (each.transpose(1, 2) for each in attention_parts(i))
        return (flash_attn_func(q, k, v, dropout_p=i["dropout_p"], causal=True).transpose(1, 2),)

    return run


def _flash_absent(device: str, size: str) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    return None if device == "cuda" else "flash-attn needs a CUDA device"


BASELINES = (
    Baseline(ROTATED, NAMES, compile_absent, _rotated_sdpa),
    Baseline("SDPA flash alone", NAMES, lambda device, size: None, lambda spec, device, size: _sdpa, same=False),
    Baseline("FlashAttention alone", NAMES, _flash_absent, _flash_attention, same=False),
)
