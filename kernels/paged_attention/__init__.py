"""Attention of one decode step over a paged key-value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retinar.kernels.dispatch import Implementation, Op, refuse_gradients, same_device
from retinar.kernels.launch import flash_missing, triton_backend
from retinar.kernels.paged_attention import libraries, reference
from retinar.kernels.rope_attention.rope import check_rope

PAGED = Op(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table, "
    "Tensor positions, Tensor rope, float scale) -> Tensor",
    reference=reference.paged_attention,
    fake=lambda q, *_: q.new_empty(q.shape),
)


def paged_attention(
    q_BHD: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    k_cache_PSGD: Tensor,
    v_cache_PSGD: Tensor,
    block_table_BM: Tensor,
    positions_B: Tensor,
    rope_NC2: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rotates q and the new k, writes k and v into the cache (the one mutation), attends over positions 0 .. own.

    Position p of row b lives in slot ``p % S`` of page ``block_table[b, p // S]``. The cache holds rotated keys. The
    bits of a row depend on that row alone: not on the batch, nor on page size or page numbers ("reference", "triton").

    Args:
        q_BHD: [B, H, D], any strides, D even; k_BGD, v_BGD: [B, G, D] with G dividing H; one floating dtype.
        k_cache_PSGD, v_cache_PSGD: [P, S, G, D] of the same dtype, contiguous; written in place.
        block_table_BM: int32 [B, M], page numbers, M * S > any position. Entries past a row's position are not read
            for it. Two rows must not write different numbers into one slot, nor one read a slot that another writes
            in this call. (Rows that fill up a batch may be equal ones at position 0 with one page for them all: they
            write the same into a slot that no other row reads.)
        positions_B: int32 [B], position of the new token, 0 for the class token.
        rope_NC2: fp32 [N, D // 2, 2] from :func:`retinar.kernels.rope_attention.rope_table`.
        scale: factor of the scores, 1 / sqrt(D) by default.
        backend: "triton" (GPU; head dims that are multiples of 4 up to 128), "reference", "sdpa" (a dense copy of the
            rows' pages, then torch's scaled_dot_product_attention), "flash" (the package flash-attn; GPU, bf16 and
            fp16, pages of a multiple of 256 slots), or None to choose by device.

    Returns:
        [B, H, D] in q's dtype. Inference only. "triton" and "flash" do not wait for the GPU and may be captured in a
        CUDA graph.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, inputs that ask for gradients, or a backend that cannot
            run. Positions and page numbers are trusted.

    Source: Kwon et al. 2023, "Efficient Memory Management for LLM Serving with PagedAttention".
    """
    if q_BHD.dim() != 3 or k_BGD.dim() != 3 or k_BGD.shape != v_BGD.shape:
        raise ValueError(
            f"paged_attention: expected q [B, H, D] and k, v [B, G, D], found {tuple(q_BHD.shape)}, "
            f"{tuple(k_BGD.shape)}, {tuple(v_BGD.shape)}"
        )
    batch, heads, head_dim = q_BHD.shape
    groups = k_BGD.shape[1]
    if k_BGD.shape != (batch, groups, head_dim) or groups == 0 or heads % groups:
        raise ValueError(
            f"paged_attention: expected k and v of q's batch and head dim with a head count that divides q's, found "
            f"q {tuple(q_BHD.shape)}, k {tuple(k_BGD.shape)}"
        )
    if not q_BHD.is_floating_point() or not q_BHD.dtype == k_BGD.dtype == v_BGD.dtype:
        raise ValueError(
            f"paged_attention: expected q, k and v of one floating dtype, found {q_BHD.dtype}, {k_BGD.dtype}, "
            f"{v_BGD.dtype}; cast them first"
        )
    check_cache("paged_attention", k_cache_PSGD, v_cache_PSGD, (groups, head_dim), q_BHD.dtype)
    check_table("paged_attention", block_table_BM, positions_B, batch)
    check_rope("paged_attention", rope_NC2, 1, head_dim)
    same_device(
        "paged_attention", q_BHD, k_BGD, v_BGD, k_cache_PSGD, v_cache_PSGD, block_table_BM, positions_B, rope_NC2
    )
    refuse_gradients("paged_attention", q_BHD, k_BGD, v_BGD)
    scale = head_dim**-0.5 if scale is None else float(scale)
    return PAGED(
        q_BHD, k_BGD, v_BGD, k_cache_PSGD, v_cache_PSGD, block_table_BM, positions_B, rope_NC2, scale, backend=backend
    )


MOST_PROGRAMS = 65535  # along the second and third axis of a GPU's grid


def _triton_unsupported(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> str | None:
    return triton_refusal(q.shape[0], q.shape[2], k_cache, v_cache)


def triton_refusal(batch: int, head_dim: int, *caches: Tensor) -> str | None:
    """Why the Triton kernels do not take so many rows, a head dim, or caches [P, S, G, D]; None when they do."""
    if head_dim % 4 or head_dim > 128:
        return f"it takes head dims that are multiples of 4 up to 128, found {head_dim}"
    if batch > MOST_PROGRAMS:
        return f"it takes up to {MOST_PROGRAMS} rows, found {batch}"
    if any(cache.data_ptr() % 16 for cache in caches):
        return "it takes caches that start at a multiple of 16 bytes"
    return None


PAGED.register(
    "triton", triton_backend("paged_attention", "paged_attention", products=True, unsupported=_triton_unsupported)
)
PAGED.register("sdpa", Implementation(libraries.sdpa))
PAGED.register("flash", Implementation(libraries.flash, ("cuda",), flash_missing, libraries.flash_unsupported))


def check_cache(op: str, k_cache: Tensor, v_cache: Tensor, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Raises unless both caches are contiguous [..., S, G, D] of the dtype."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape != k_cache.shape or tuple(cache.shape[-2:]) != heads or cache.dim() < 4:
            raise ValueError(
                f"{op}: expected {name} [pages, slots, {heads[0]}, {heads[1]}], found {tuple(cache.shape)}"
            )
        if cache.dtype != dtype or not cache.is_contiguous():
            raise ValueError(
                f"{op}: expected {name} contiguous in {dtype}, found {cache.dtype} with strides {cache.stride()}"
            )


def check_table(op: str, block_table_BM: Tensor, positions_B: Tensor, batch: int) -> None:
    """Raises unless the block table and the positions are int32 with one row for each sequence."""
    if block_table_BM.dim() != 2 or block_table_BM.shape[0] != batch or block_table_BM.dtype != torch.int32:
        raise ValueError(
            f"{op}: expected an int32 block table [{batch}, M], found {block_table_BM.dtype} "
            f"{tuple(block_table_BM.shape)}"
        )
    if positions_B.shape != (batch,) or positions_B.dtype != torch.int32:
        raise ValueError(
            f"{op}: expected int32 positions [{batch}], found {positions_B.dtype} {tuple(positions_B.shape)}"
        )
