"""Nearest code by cosine, in chunks: the full N x K matrix of similarities never exists."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retinar.kernels.numerics import LANES, widen

CHUNK_ELEMENTS = 1 << 22


def vq_lookup(z_NC: Tensor, codebook_KC: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes' normalised rows in fp32, and the codes. Of equal similarities the lowest code wins."""
    z = F.normalize(widen(z_NC), dim=-1)
    codebook = F.normalize(codebook_KC.to(z.dtype).contiguous(), dim=-1)
    count = codebook.shape[0]
    # Whole SIMD steps of codes: BLAS sums its last columns in another order, and equal rows would not tie.
    padded_KC = codebook.new_zeros(-(-count // LANES) * LANES, codebook.shape[1])
    padded_KC[:count] = codebook
    rows = max(1, CHUNK_ELEMENTS // padded_KC.shape[0])
    codes_N = torch.empty(z.shape[0], dtype=torch.int64, device=z.device)
    for start in range(0, z.shape[0], rows):
        similarity = z[start : start + rows] @ padded_KC.t()
        codes_N[start : start + rows] = similarity[:, :count].argmax(-1)
    return codebook[codes_N], codes_N


def normalize_backward(grad_NC: Tensor, z_NC: Tensor) -> Tensor:
    """Gradient through z / max(|z|, eps): the part of grad along the unit vector is removed, the rest shrunk by |z|."""
    grad, z = widen(grad_NC), widen(z_NC)
    length = z.norm(dim=-1, keepdim=True)
    safe = length.clamp(min=1e-12)
    unit = z / safe
    along = (grad * unit).sum(-1, keepdim=True) * (length >= 1e-12)
    return ((grad - unit * along) / safe).to(z_NC.dtype)
