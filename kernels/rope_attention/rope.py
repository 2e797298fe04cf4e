"""LlamaGen's 2D rotary embedding: the table of angles, and the rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.numerics import wide


def rope_table(
    grid_h: int,
    grid_w: int,
    head_dim: int,
    *,
    base: float = 10000.0,
    cls_tokens: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """cos and sin for every position of a sequence: the class tokens, then the grid's cells row by row.

    The first half of the rotation pairs turns with the cell's row, the second half with its column. The rows of the
    class tokens are zeros, not the identity: their rotated q and k vanish, as in LlamaGen.

    Returns:
        fp32 [cls_tokens + grid_h * grid_w, head_dim // 2, 2].

    Raises:
        ValueError: a head_dim that is not a multiple of 4 (two axes of pairs), or an empty grid.
    """
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"rope_table: expected a head_dim that is a multiple of 4, found {head_dim}")
    if grid_h < 1 or grid_w < 1 or cls_tokens < 0:
        raise ValueError(
            f"rope_table: expected a grid of at least 1 x 1, found {grid_h} x {grid_w}, {cls_tokens} class"
        )
    half = head_dim // 2
    frequencies = 1.0 / (base ** (torch.arange(0, half, 2, dtype=torch.float32) / half))
    rows = torch.outer(torch.arange(grid_h, dtype=torch.float32), frequencies)
    columns = torch.outer(torch.arange(grid_w, dtype=torch.float32), frequencies)
    angles_HWC = torch.cat(
        [rows[:, None].expand(-1, grid_w, -1), columns[None].expand(grid_h, -1, -1)],
        dim=-1,
    )
    angles = angles_HWC.reshape(grid_h * grid_w, half)
    table = torch.stack([angles.cos(), angles.sin()], -1)
    return torch.cat([torch.zeros(cls_tokens, half, 2), table]).to(device)


def rotate(x_XD: Tensor, rope_XC2: Tensor) -> Tensor:
    """Turns the interleaved pairs (2i, 2i+1) by the table's angles, in fp32; rope broadcasts against [..., D/2]."""
    x_pairs = x_XD.to(wide(x_XD.dtype)).unflatten(-1, (-1, 2))
    even, odd = x_pairs.unbind(-1)
    cos, sin = rope_XC2.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x_XD.dtype)


def rotate_back(grad_XD: Tensor, rope_XC2: Tensor) -> Tensor:
    """The transpose of :func:`rotate`: its backward. Zero rows of the table stay zero."""
    cos, sin = rope_XC2.unbind(-1)
    return rotate(grad_XD, torch.stack([cos, -sin], -1))


def apply_rope(x_BHND: Tensor, rope_NC2: Tensor) -> Tensor:
    """Rotates q or k.

    Args:
        x_BHND: [B, H, N, D], any strides, any floating dtype.
        rope_NC2: fp32 [at least N, D // 2, 2], of which the first N rows are used.

    Returns:
        [B, H, N, D] in x's dtype. Rotation in fp32, then cast. Plain torch, differentiable in x.
    """
    check_rope("apply_rope", rope_NC2, x_BHND.shape[-2], x_BHND.shape[-1])
    return rotate(x_BHND, rope_NC2[: x_BHND.shape[-2]])


def check_rope(op: str, rope_NC2: Tensor, positions: int, head_dim: int) -> None:
    """Raises unless the table covers the positions, fits the head dimension and is fp32 (fp64 for tests)."""
    if rope_NC2.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: expected a rope table in float32, as rope_table makes it, found {rope_NC2.dtype}")
    if rope_NC2.dim() != 3 or rope_NC2.shape[0] < positions or rope_NC2.shape[1:] != (head_dim // 2, 2) or head_dim % 2:
        raise ValueError(
            f"{op}: expected a rope table [>= {positions}, {head_dim // 2}, 2] for an even head dim, found "
            f"{tuple(rope_NC2.shape)} with head dim {head_dim}"
        )
