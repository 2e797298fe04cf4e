"""One whole decode step, composed of the other references."""

from __future__ import annotations

from torch import Tensor, where

from retinar.kernels.cfg_sample.reference import cfg_sample
from retinar.kernels.decode_step.types import DecodeWeights, StepInputs
from retinar.kernels.linear.reference import linear
from retinar.kernels.paged_attention.reference import attend, plan_rows
from retinar.kernels.rms_norm.reference import rms_norm
from retinar.kernels.swiglu.reference import swiglu


def decode_step(
    weights: DecodeWeights, k_cache_LPSGD: Tensor, v_cache_LPSGD: Tensor, inputs: StepInputs
) -> tuple[Tensor, Tensor]:
    positions = inputs.positions_B.long()
    x_BE = embed(weights, inputs.tokens_B, positions)
    rope_BC2 = weights.rope_NC2[positions]
    plan = plan_rows(inputs.block_table_BM, inputs.positions_B, k_cache_LPSGD.shape[2])
    heads, groups, head_dim = weights.n_head, weights.n_kv_head, k_cache_LPSGD.shape[-1]
    layers = zip(
        weights.attention_norm,
        weights.wqkv,
        weights.wo,
        weights.ffn_norm,
        weights.w13,
        weights.w2,
        k_cache_LPSGD,
        v_cache_LPSGD,
        strict=True,
    )
    for attention_norm, wqkv, wo, ffn_norm, w13, w2, k_cache, v_cache in layers:
        qkv_BHD = linear(rms_norm(x_BE, attention_norm, weights.eps), wqkv).unflatten(-1, (-1, head_dim))
        q_BHD, k_BGD, v_BGD = qkv_BHD.split([heads, groups, groups], dim=1)
        o_BHD = attend(q_BHD, k_BGD, v_BGD, k_cache, v_cache, plan, rope_BC2, head_dim**-0.5)
        x_BE = x_BE + linear(o_BHD.flatten(1), wo)
        gate_BF, up_BF = linear(rms_norm(x_BE, ffn_norm, weights.eps), w13).chunk(2, -1)
        x_BE = x_BE + linear(swiglu(gate_BF, up_BF), w2)
    logits_BV = linear(rms_norm(x_BE, weights.norm_D, weights.eps), weights.output_VD).float()
    codes_I = cfg_sample(
        logits_BV,
        inputs.cond_row_I,
        inputs.null_row_I,
        inputs.cfg_scale_I,
        inputs.temperature_I,
        inputs.top_k_I,
        inputs.top_p_I,
        inputs.seed_I,
        inputs.index_I,
        inputs.positions_B[inputs.cond_row_I.long()],
    )
    return codes_I, logits_BV


def embed(weights: DecodeWeights, tokens_B: Tensor, positions_B: Tensor) -> Tensor:
    """The class's row at position 0, the code's row elsewhere."""
    first_B = positions_B == 0
    label_B, code_B = where(first_B, tokens_B, 0), where(first_B, 0, tokens_B)
    return where(first_B[:, None], weights.cls_embedding_CD[label_B], weights.tok_embedding_VD[code_B])
