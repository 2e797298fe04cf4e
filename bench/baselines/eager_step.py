"""A decode step as LlamaGen's modules make it, op by op: what a user of plain torch has today.

A dense cache of fixed length, attention by SDPA over all of it with a mask, keys and values copied for the queries'
heads even where there are as many of both, gate and up as two products, a softmax and a multinomial draw.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retinar.kernels import ops


class EagerStep:
    """One step of ``images`` guided images with the same weights as ``ops.decode_step``.

    The cache holds keys (rotated) and values [2 * images, G, ``length``, D] for each layer.
    """

    def __init__(self, weights: ops.DecodeWeights, images: int, length: int) -> None:
        self.weights, self.layers = weights, len(weights.wqkv)
        self.head_dim = weights.tok_embedding_VD.shape[1] // weights.n_head
        shape = (2 * images, weights.n_kv_head, length, self.head_dim)
        self.k = [weights.output_VD.new_zeros(shape) for _ in range(self.layers)]
        self.v = [weights.output_VD.new_zeros(shape) for _ in range(self.layers)]
        self.causal_NN = torch.ones(length, length, dtype=torch.bool).tril()

    def __call__(self, tokens_B: Tensor, position_1: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(the next tokens [B], each pair's the same; fp32 logits [B, V]) from the codes at one position above 0."""
        weights = self.weights
        x_B1E = weights.tok_embedding_VD[tokens_B][:, None]
        mask_BHNN = self.causal_NN[None, None, position_1].expand(len(tokens_B), 1, -1, -1)
        rope_C2 = weights.rope_NC2[position_1][0]
        for layer in range(self.layers):
            normed_B1E = self._norm(x_B1E, weights.attention_norm[layer])
            x_B1E = x_B1E + self._attention(layer, normed_B1E, position_1, rope_C2, mask_BHNN)
            normed_B1E = self._norm(x_B1E, weights.ffn_norm[layer])
            gate_FE, up_FE = weights.w13[layer].chunk(2)
            wide_B1F = F.silu(F.linear(normed_B1E, gate_FE)) * F.linear(normed_B1E, up_FE)
            x_B1E = x_B1E + F.linear(wide_B1F, weights.w2[layer])
        logits_BV = F.linear(self._norm(x_B1E, weights.norm_D), weights.output_VD).float()[:, -1]
        cond_IV, null_IV = logits_BV.chunk(2)
        probabilities_IV = F.softmax(null_IV + (cond_IV - null_IV) * scale, dim=-1)
        return torch.multinomial(probabilities_IV, 1)[:, 0].repeat(2), logits_BV

    def load(self, k_LPSGD: Tensor, v_LPSGD: Tensor, table_BM: Tensor) -> None:
        """Take over what a paged cache holds for the rows of a block table."""
        for dense, paged_LPSGD in ((self.k, k_LPSGD), (self.v, v_LPSGD)):
            for layer in range(self.layers):
                rows_BNGD = paged_LPSGD[layer][table_BM.long()].flatten(1, 2)[:, : dense[layer].shape[2]]
                dense[layer][:, :, : rows_BNGD.shape[1]] = rows_BNGD.transpose(1, 2)

    def _attention(self, layer: int, x_B1E: Tensor, position_1: Tensor, rope_C2: Tensor, mask_BHNN: Tensor) -> Tensor:
        heads, groups = self.weights.n_head, self.weights.n_kv_head
        qkv_B1E = F.linear(x_B1E, self.weights.wqkv[layer])
        parts = qkv_B1E.split([heads * self.head_dim, groups * self.head_dim, groups * self.head_dim], dim=-1)
        q_B1HD, k_B1GD, v_B1GD = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        self.k[layer][:, :, position_1] = _rotate(k_B1GD, rope_C2).transpose(1, 2)
        self.v[layer][:, :, position_1] = v_B1GD.transpose(1, 2)
        k_BHND = self.k[layer].repeat_interleave(heads // groups, dim=1)
        v_BHND = self.v[layer].repeat_interleave(heads // groups, dim=1)
        q_BH1D = _rotate(q_B1HD, rope_C2).transpose(1, 2)
        o_BH1D = F.scaled_dot_product_attention(q_BH1D, k_BHND, v_BHND, attn_mask=mask_BHNN)
        return F.linear(o_BH1D.transpose(1, 2).flatten(2), self.weights.wo[layer])

    def _norm(self, x_B1E: Tensor, weight_E: Tensor) -> Tensor:
        wide_B1E = x_B1E.float()
        scale_B11 = torch.rsqrt(wide_B1E.square().mean(-1, keepdim=True) + self.weights.eps)
        return (wide_B1E * scale_B11).type_as(x_B1E) * weight_E


def _rotate(x_B1HD: Tensor, rope_C2: Tensor) -> Tensor:
    """In fp32, pairs (2i, 2i + 1), then cast back."""
    pairs = x_B1HD.float().unflatten(-1, (-1, 2))
    even, odd, cos_C, sin_C = pairs[..., 0], pairs[..., 1], rope_C2[:, 0], rope_C2[:, 1]
    return torch.stack([even * cos_C - odd * sin_C, odd * cos_C + even * sin_C], dim=-1).flatten(-2).type_as(x_B1HD)
