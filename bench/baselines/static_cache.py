"""A decode step as one writes it in plain torch for torch.compile: a dense cache of fixed size, and a mask.

All rows are at one position, and attention is over the whole cache, whatever has been written: shapes never change, so
a step is compiled once and replayed as a CUDA graph. Weights and cache are buffers, which a graph may keep where they
are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from retinar.kernels import ops

_MATRICES = ("attention_norm", "wqkv", "wo", "ffn_norm", "w13", "w2")


class StaticCacheStep(nn.Module):
    """One step of ``images`` guided images with the same weights as ``ops.decode_step``.

    The cache holds keys (rotated) and values [2 * images, G, ``length``, D] for each layer. ``fused``: attention as
    products and sums, which a compiler makes one loop of, instead of SDPA; for a CPU, where bf16 SDPA is slow for one
    query.
    """

    def __init__(self, weights: ops.DecodeWeights, images: int, length: int, *, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.heads, self.groups, self.eps = weights.n_head, weights.n_kv_head, weights.eps
        width = weights.tok_embedding_VD.shape[1]
        self.head_dim, self.layers = width // weights.n_head, len(weights.wqkv)
        for name in ("cls_embedding_CD", "tok_embedding_VD", "norm_D", "output_VD", "rope_NC2"):
            self.register_buffer(name, getattr(weights, name))
        for name in _MATRICES:
            for layer, each in enumerate(getattr(weights, name)):
                self.register_buffer(f"{name}_{layer}", each)
        shape, like = (2 * images, self.groups, length, self.head_dim), weights.output_VD
        for layer in range(self.layers):
            self.register_buffer(f"k_{layer}", like.new_zeros(shape))
            self.register_buffer(f"v_{layer}", like.new_zeros(shape))

    def forward(self, tokens_B: Tensor, position_1: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(the next tokens [B] int64, each pair's the same; fp32 logits [B, V]) from the tokens at one position.

        tokens_B: the class label at position 0, else the code; position_1: int64 [1].
        """
        logits_BV = self._logits(tokens_B, position_1)
        cond_IV, null_IV = logits_BV.chunk(2)
        probabilities_IV = F.softmax(null_IV + (cond_IV - null_IV) * scale, dim=-1)
        # Exact sampling without waiting for the device: the first of independent exponential arrivals.
        codes_I = (probabilities_IV / torch.empty_like(probabilities_IV).exponential_(1.0)).argmax(-1)
        return codes_I.repeat(2), logits_BV

    def _logits(self, tokens_B: Tensor, position_1: Tensor) -> Tensor:
        first = position_1 == 0
        label_BE = self._of("cls_embedding_CD")[torch.where(first, tokens_B, 0)]
        x_BE = torch.where(first[:, None], label_BE, self._of("tok_embedding_VD")[torch.where(first, 0, tokens_B)])
        rope_1C2 = self._of("rope_NC2")[position_1]
        seen_N = torch.arange(self._of("k_0").shape[2], device=tokens_B.device) <= position_1
        for layer in range(self.layers):
            x_BE = self._layer(layer, x_BE, position_1, rope_1C2, seen_N)
        return F.linear(self._norm(x_BE, "norm_D"), self._of("output_VD")).float()

    def _layer(self, layer: int, x_BE: Tensor, position_1: Tensor, rope_1C2: Tensor, seen_N: Tensor) -> Tensor:
        heads, groups = self.heads, self.groups
        qkv_BHD = F.linear(self._norm(x_BE, f"attention_norm_{layer}"), self._of(f"wqkv_{layer}"))
        q_BHD, k_BGD, v_BGD = qkv_BHD.unflatten(-1, (-1, self.head_dim)).split([heads, groups, groups], dim=1)
        k_BGND, v_BGND = self._of(f"k_{layer}"), self._of(f"v_{layer}")
        k_BGND.index_copy_(2, position_1, _rotate(k_BGD, rope_1C2)[:, :, None])
        v_BGND.index_copy_(2, position_1, v_BGD[:, :, None])
        q_BHD = _rotate(q_BHD, rope_1C2)
        if self.fused:
            o_BHD = _fused_attention(q_BHD, k_BGND, v_BGND, seen_N)
        else:
            o_BHD = F.scaled_dot_product_attention(
                q_BHD[:, :, None], k_BGND, v_BGND, attn_mask=seen_N[None, None, None], enable_gqa=groups != heads
            )
        x_BE = x_BE + F.linear(o_BHD.flatten(1), self._of(f"wo_{layer}"))
        gate_BF, up_BF = F.linear(self._norm(x_BE, f"ffn_norm_{layer}"), self._of(f"w13_{layer}")).chunk(2, -1)
        return x_BE + F.linear(F.silu(gate_BF) * up_BF, self._of(f"w2_{layer}"))

    def _norm(self, x_BE: Tensor, weight: str) -> Tensor:
        wide_BE = x_BE.float()
        scale_B1 = torch.rsqrt(wide_BE.square().mean(-1, keepdim=True) + self.eps)
        return (wide_BE * scale_B1).to(x_BE.dtype) * self._of(weight)

    def _of(self, name: str) -> Tensor:
        return getattr(self, name)


def _fused_attention(q_BHD: Tensor, k_BGND: Tensor, v_BGND: Tensor, seen_N: Tensor) -> Tensor:
    """In fp32 from first to last: bf16 is read, and nothing but the output written."""
    q_BGRD = q_BHD.unflatten(1, (k_BGND.shape[1], -1)).float()
    scores_BGRN = (q_BGRD[:, :, :, None] * k_BGND[:, :, None].float()).sum(-1) * q_BHD.shape[-1] ** -0.5
    weight_BGRN = torch.where(seen_N, scores_BGRN, float("-inf")).softmax(-1)
    return (weight_BGRN[..., None] * v_BGND[:, :, None].float()).sum(-2).flatten(1, 2).to(q_BHD.dtype)


def _rotate(x_BHD: Tensor, rope_1C2: Tensor) -> Tensor:
    """In fp32, pairs (2i, 2i + 1), then cast back."""
    even_BHC, odd_BHC = x_BHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos_1C, sin_1C = rope_1C2.unbind(-1)
    turned = torch.stack([even_BHC * cos_1C - odd_BHC * sin_1C, odd_BHC * cos_1C + even_BHC * sin_1C], dim=-1)
    return turned.flatten(-2).to(x_BHD.dtype)


def compiled(module: nn.Module, device: str, size: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Through torch.compile, on a GPU as CUDA graphs; the exercise takes all of it but the code generator."""
    if size == "exercise":
        return torch.compile(module, backend="aot_eager", fullgraph=True)
    mode = "reduce-overhead" if device == "cuda" else "default"
    return torch.compile(module, mode=mode, fullgraph=True)


def frozen(module: nn.Module, size: str, *example: object) -> Callable[..., tuple[Tensor, Tensor]]:
    """Through torch.compile with the weights as constants, which oneDNN packs: on a CPU. Compiled when this returns.

    What it gives takes arguments like ``example``, without gradients. The exercise as of `compiled`.
    """
    made = torch.compile(module.eval(), backend="aot_eager" if size == "exercise" else "inductor", fullgraph=True)
    with torch.no_grad(), torch._inductor.config.patch(freezing=size != "exercise"):
        made(*example)
    return made


def copy_cache(module: StaticCacheStep, k_LPSGD: Tensor, v_LPSGD: Tensor, table_BM: Tensor) -> None:
    """Take over what a paged cache holds for the rows of a block table."""
    length = module._of("k_0").shape[2]
    for name, cache_LPSGD in (("k", k_LPSGD), ("v", v_LPSGD)):
        for layer in range(module.layers):
            rows_BNGD = cache_LPSGD[layer][table_BM.long()].flatten(1, 2)[:, :length]
            module._of(f"{name}_{layer}")[:, :, : rows_BNGD.shape[1]] = rows_BNGD.transpose(1, 2)


def disagrees(found_BV: Tensor, expected_BV: Tensor) -> str | None:
    """Why a time of it would mislead: its logits are not our reference's, compared loosely (a tenth of the norm)."""
    error = float((found_BV.double() - expected_BV.double()).norm() / expected_BV.double().norm())
    return None if error <= 0.1 else f"its logits differ from our reference's by {error:.2g} of their norm"
