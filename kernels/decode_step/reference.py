"""One whole decode step, composed of the other references."""

from __future__ import annotations

from torch import Tensor, where

from retinar.kernels.cfg_sample.reference import cfg_sample
from retinar.kernels.decode_step.compose import compose
from retinar.kernels.decode_step.types import DecodeWeights, StepInputs
from retinar.kernels.linear.reference import linear
from retinar.kernels.paged_attention.reference import attend, plan_rows


def decode_step(
    weights: DecodeWeights, k_cache_LPSGD: Tensor, v_cache_LPSGD: Tensor, inputs: StepInputs
) -> tuple[Tensor, Tensor]:
    positions_B = inputs.positions_B.long()
    rope_BC2 = weights.rope_NC2[positions_B]
    plan = plan_rows(inputs.block_table_BM, inputs.positions_B, k_cache_LPSGD.shape[2])
    scale = k_cache_LPSGD.shape[-1] ** -0.5

    def attention(q_BHD: Tensor, k_BGD: Tensor, v_BGD: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return attend(q_BHD, k_BGD, v_BGD, k_cache, v_cache, plan, rope_BC2, scale)

    caches = k_cache_LPSGD, v_cache_LPSGD
    logits_BV = compose(weights, caches, embed(weights, inputs.tokens_B, positions_B), linear, attention)
    return sample(logits_BV, inputs), logits_BV


def sample(logits_BV: Tensor, inputs: StepInputs) -> Tensor:
    return cfg_sample(
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


def embed(weights: DecodeWeights, tokens_B: Tensor, positions_B: Tensor) -> Tensor:
    """The class's row at position 0, the code's row elsewhere."""
    first_B = positions_B == 0
    label_B, code_B = where(first_B, tokens_B, 0), where(first_B, 0, tokens_B)
    return where(first_B[:, None], weights.cls_embedding_CD[label_B], weights.tok_embedding_VD[code_B])
