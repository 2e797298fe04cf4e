"""paged_attention by way of whole libraries: rotation in plain torch, attention theirs. They write the cache too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retinar.kernels.rope_attention.rope import rotate

#: flash-attn wants pages of a multiple of so many slots.
FLASH_PAGE = 256


def sdpa(
    q_BHD: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    k_cache_PSGD: Tensor,
    v_cache_PSGD: Tensor,
    block_table_BM: Tensor,
    positions_B: Tensor,
    rope_NC2: Tensor,
    scale: float,
) -> Tensor:
    """torch's scaled_dot_product_attention over a dense copy of every row's pages, the whole table wide.

    Slots that hold nothing are replaced by zeros: a mask alone would let NaN through, which 0 times is NaN.
    """
    slots, positions_B1 = k_cache_PSGD.shape[1], positions_B.long()[:, None]
    column_M = torch.arange(block_table_BM.shape[1], device=q_BHD.device)
    place_N = torch.arange(len(column_M) * slots, device=q_BHD.device)
    page_BM = block_table_BM.long().where(column_M * slots <= positions_B1, 0)
    old_BN = place_N <= positions_B1
    q_BHD, k_BGD = _rotated(q_BHD, k_BGD, positions_B, rope_NC2)
    new_B = (page_BM.gather(1, positions_B1 // slots) * slots + positions_B1 % slots)[:, 0]
    dense = []
    for cache_PSGD, new_BGD in ((k_cache_PSGD, k_BGD), (v_cache_PSGD, v_BGD)):
        cache_PSGD.flatten(0, 1)[new_B] = new_BGD
        dense_BNGD = cache_PSGD[page_BM].flatten(1, 2)
        dense.append(dense_BNGD.where(old_BN[:, :, None, None], 0).transpose(1, 2))
    grouped = q_BHD.shape[1] != k_BGD.shape[1]
    k_BGND, v_BGND = dense
    o_BH1D = F.scaled_dot_product_attention(
        q_BHD[:, :, None], k_BGND, v_BGND, attn_mask=old_BN[:, None, None], scale=scale, enable_gqa=grouped
    )
    return o_BH1D[:, :, 0].contiguous()


def flash(
    q_BHD: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    k_cache_PSGD: Tensor,
    v_cache_PSGD: Tensor,
    block_table_BM: Tensor,
    positions_B: Tensor,
    rope_NC2: Tensor,
    scale: float,
) -> Tensor:
    """The package flash-attn: it writes the new keys and values and reads the pages where they lie."""
    from flash_attn import flash_attn_with_kvcache

    q_BHD, k_BGD = _rotated(q_BHD, k_BGD, positions_B, rope_NC2)
    o_B1HD = flash_attn_with_kvcache(
        q_BHD[:, None],
        k_cache_PSGD,
        v_cache_PSGD,
        k=k_BGD[:, None],
        v=v_BGD[:, None],
        cache_seqlens=positions_B.contiguous(),
        block_table=block_table_BM.contiguous(),
        softmax_scale=scale,
        causal=True,
    )
    return o_B1HD[:, 0].contiguous()


def flash_unsupported(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, *_: Any) -> str | None:
    head_dim, slots = q.shape[-1], k_cache.shape[1]
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, found {q.dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"it takes head dims that are multiples of 8 up to 256, found {head_dim}"
    if slots % FLASH_PAGE:
        return f"it takes pages of a multiple of {FLASH_PAGE} slots, found {slots}"
    return None


def _rotated(q_BHD: Tensor, k_BGD: Tensor, positions_B: Tensor, rope_NC2: Tensor) -> tuple[Tensor, Tensor]:
    rope_B1C2 = rope_NC2[positions_B.long()][:, None]
    return rotate(q_BHD, rope_B1C2), rotate(k_BGD, rope_B1C2)
