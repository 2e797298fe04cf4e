"""The layers of a decode step, once for every backend that is made of other ops."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from retinar.kernels.decode_step.types import DecodeWeights

Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float, bool, bool], Tensor]
"""(x, weight, norm, residual, eps, gate, wide) -> out: an implementation of `retinar.kernels.linear`. It may write the
result over the residual, which nobody reads again."""
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q_BHD, k_BGD, v_BGD, k_cache_PSGD, v_cache_PSGD) -> o_BHD: paged_attention at the step's positions."""


def compose(
    weights: DecodeWeights, caches_LPSGD: tuple[Tensor, Tensor], x_BE: Tensor, linear: Linear, attention: Attention
) -> Tensor:
    """fp32 logits [B, V] from the rows' embeddings: five ops a layer, since norms, gate and residuals ride along with
    the products."""
    heads, groups, head_dim, eps = weights.n_head, weights.n_kv_head, caches_LPSGD[0].shape[-1], weights.eps
    layers = zip(
        weights.attention_norm,
        weights.wqkv,
        weights.wo,
        weights.ffn_norm,
        weights.w13,
        weights.w2,
        *caches_LPSGD,
        strict=True,
    )
    for attention_norm, wqkv, wo, ffn_norm, w13, w2, k_cache_PSGD, v_cache_PSGD in layers:
        qkv_BHD = linear(x_BE, wqkv, attention_norm, None, eps, False, False).unflatten(-1, (-1, head_dim))
        q_BHD, k_BGD, v_BGD = qkv_BHD.split([heads, groups, groups], dim=1)
        o_BHD = attention(q_BHD, k_BGD, v_BGD, k_cache_PSGD, v_cache_PSGD)
        x_BE = linear(o_BHD.flatten(1), wo, None, x_BE, eps, False, False)
        gated_BF = linear(x_BE, w13, ffn_norm, None, eps, True, False)
        x_BE = linear(gated_BF, w2, None, x_BE, eps, False, False)
    return linear(x_BE, weights.output_VD, weights.norm_D, None, eps, False, True)
