"""Vector quantisation: the nearest l2-normalised code, straight-through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retinar.kernels.dispatch import Op, same_device
from retinar.kernels.launch import triton_backend
from retinar.kernels.numerics import wide
from retinar.kernels.vq_lookup import reference

LOOKUP = Op(
    "vq_lookup(Tensor z, Tensor codebook) -> (Tensor, Tensor)",
    reference=reference.vq_lookup,
    fake=lambda z, codebook: (
        z.new_empty(z.shape, dtype=wide(z.dtype)),
        z.new_empty(z.shape[0], dtype=torch.int64),
    ),
)
LOOKUP_BACKWARD = Op(
    "vq_lookup_backward(Tensor grad, Tensor z) -> Tensor",
    reference=reference.normalize_backward,
    fake=lambda grad, z: z.new_empty(z.shape),
)
LOOKUP.register("triton", triton_backend("vq_lookup", "vq_lookup"))
LOOKUP_BACKWARD.register("triton", triton_backend("vq_lookup", "normalize_backward"))


def vq_lookup(z_NC: Tensor, codebook_KC: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The nearest code of each vector, both sides l2-normalised in fp32 first.

    Args:
        z_NC: [N, C], any floating dtype.
        codebook_KC: [K, C], any floating dtype.
        backend: "triton" (CUDA; z in fp32, bf16 or fp16), "reference", or None to choose by device.

    Returns:
        (codes int64 [N], quantized fp32 [N, C]): the codes' normalised rows. Of equally near codes the lowest wins.
        Straight-through: the gradient of ``quantized`` reaches z as if it were the normalised z, and the codebook gets
        none (its own loss indexes the normalised codebook by the codes).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty codebook, or a backend that cannot run.

    Source: LlamaGen; Yu et al. 2021, "Vector-quantized Image Modeling with Improved VQGAN" (l2-normalised codes).
    """
    if z_NC.dim() != 2 or codebook_KC.dim() != 2 or z_NC.shape[1] != codebook_KC.shape[1] or codebook_KC.shape[0] == 0:
        raise ValueError(
            f"vq_lookup: expected z [N, C] and a codebook [K >= 1, C], found {tuple(z_NC.shape)} and "
            f"{tuple(codebook_KC.shape)}"
        )
    if not z_NC.is_floating_point() or not codebook_KC.is_floating_point():
        raise ValueError(f"vq_lookup: expected floating point tensors, found {z_NC.dtype} and {codebook_KC.dtype}")
    same_device("vq_lookup", z_NC, codebook_KC)
    quantized_NC, codes_N = LOOKUP(z_NC, codebook_KC, backend=backend)
    return codes_N, quantized_NC


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad_quantized_NC: Tensor, _: Any) -> tuple[Tensor, None]:
    backend = LOOKUP_BACKWARD.own(ctx.backend)
    return LOOKUP_BACKWARD(grad_quantized_NC, ctx.saved_tensors[0], backend=backend), None


LOOKUP.differentiate(_backward, _save)
