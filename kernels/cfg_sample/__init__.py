"""Classifier-free guidance and sampling: one code for each image from its rows of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.cfg_sample import reference
from retinar.kernels.dispatch import Op, same_device
from retinar.kernels.launch import triton_backend

SAMPLE = Op(
    "cfg_sample(Tensor logits, Tensor cond_row, Tensor null_row, Tensor cfg_scale, Tensor temperature, Tensor top_k, "
    "Tensor top_p, Tensor seed, Tensor index, Tensor position) -> Tensor",
    reference=reference.cfg_sample,
    fake=lambda logits, cond_row, *_: logits.new_empty(cond_row.shape, dtype=torch.int64),
)
MIX = Op(
    "cfg_mix(Tensor cond, Tensor null, Tensor scale) -> Tensor",
    reference=reference.cfg_mix,
    fake=lambda cond, null, scale: cond.new_empty(cond.shape),
)
FILTER = Op(
    "filter_logits(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p) -> Tensor",
    reference=reference.filter_logits,
    fake=lambda logits, *_: logits.new_empty(logits.shape),
)


def _triton_unsupported(logits: Tensor, *_: Tensor) -> str | None:
    return None if logits.dtype == torch.float32 else f"it takes torch.float32, found {logits.dtype}"


for _op in (SAMPLE, MIX, FILTER):
    _op.register("triton", triton_backend("cfg_sample", _op.name, unsupported=_triton_unsupported))


def cfg_mix(cond_XV: Tensor, null_XV: Tensor, scale: Tensor | float, *, backend: str | None = None) -> Tensor:
    """Guided logits ``null + (cond - null) * scale``.

    Args:
        cond_XV, null_XV: [..., V] of one shape and floating dtype.
        scale: a number, or a tensor that broadcasts to their shape.
        backend: "triton" (CUDA; fp32), "reference", or None to choose by device.
    """
    if cond_XV.shape != null_XV.shape or cond_XV.dtype != null_XV.dtype:
        raise ValueError(
            f"cfg_mix: expected conditional and null logits of one shape and dtype, found {tuple(cond_XV.shape)} "
            f"{cond_XV.dtype} and {tuple(null_XV.shape)} {null_XV.dtype}"
        )
    scale = torch.as_tensor(scale, dtype=cond_XV.dtype, device=cond_XV.device)
    return MIX(cond_XV.contiguous(), null_XV.contiguous(), scale, backend=backend)


def filter_logits(
    logits_IV: Tensor, temperature_I: Tensor, top_k_I: Tensor, top_p_I: Tensor, *, backend: str | None = None
) -> Tensor:
    """Temperature, top-k, top-p: the logits whose softmax is drawn from, -inf where dropped.

    In this order: divide by max(T, 1e-5); drop logits strictly below the k-th largest (ties stay); order by falling
    logit, then by code, and drop where the softmax summed before a code exceeds p (the first always stays).

    Args:
        logits_IV: fp32 [I, V].
        temperature_I: fp32 [I]; top_k_I: int32 [I], 0 or >= V for off; top_p_I: fp32 [I] in [0, 1], 1 for off.
        backend: "triton" (CUDA), "reference", or None to choose by device.

    Returns:
        fp32 [I, V]. The bits of an image depend on its own row and parameters alone.
    """
    _check_rows("filter_logits", logits_IV)
    parameters = {"temperature": temperature_I, "top_k": top_k_I, "top_p": top_p_I}
    _check_images("filter_logits", logits_IV, parameters, logits_IV.shape[0])
    return FILTER(logits_IV.contiguous(), temperature_I, top_k_I, top_p_I, backend=backend)


def cfg_sample(
    logits_BV: Tensor,
    cond_row_I: Tensor,
    null_row_I: Tensor,
    cfg_scale_I: Tensor,
    temperature_I: Tensor,
    top_k_I: Tensor,
    top_p_I: Tensor,
    seed_I: Tensor,
    index_I: Tensor,
    position_I: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Draws one code for each image: mix, filter, add the image's Gumbel noise, take the argmax (lowest code on ties).

    Args:
        logits_BV: fp32 [B, V], one row for each sequence.
        cond_row_I: int32 [I], the image's conditional row; null_row_I: int32 [I], its null row, or -1 for unguided.
        cfg_scale_I: fp32 [I]; temperature_I: fp32 [I]; top_k_I: int32 [I]; top_p_I: fp32 [I]: see
            :func:`filter_logits`.
        seed_I: int64 [I]; index_I: int64 [I]; position_I: int32 [I]: the counter of the noise, see
            :func:`retinar.kernels.philox.gumbel_noise`.
        backend: "triton" (CUDA), "reference", or None to choose by device.

    Returns:
        int64 [I]. An image's code depends on its own rows and parameters alone.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run.
    """
    _check_rows("cfg_sample", logits_BV)
    parameters = {
        "cond_row": cond_row_I,
        "null_row": null_row_I,
        "cfg_scale": cfg_scale_I,
        "temperature": temperature_I,
        "top_k": top_k_I,
        "top_p": top_p_I,
        "seed": seed_I,
        "index": index_I,
        "position": position_I,
    }
    _check_images("cfg_sample", logits_BV, parameters, cond_row_I.shape[0] if cond_row_I.dim() else -1)
    return SAMPLE(logits_BV, *parameters.values(), backend=backend)


_DTYPES = {
    "cond_row": torch.int32,
    "null_row": torch.int32,
    "cfg_scale": torch.float32,
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "seed": torch.int64,
    "index": torch.int64,
    "position": torch.int32,
}


def _check_rows(op: str, logits: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.dtype != torch.float32:
        raise ValueError(f"{op}: expected fp32 logits [rows, V >= 1], found {logits.dtype} {tuple(logits.shape)}")


def _check_images(op: str, logits: Tensor, parameters: dict[str, Tensor], images: int) -> None:
    for name, tensor in parameters.items():
        if tensor.shape != (images,) or tensor.dtype != _DTYPES[name]:
            raise ValueError(
                f"{op}: expected {name} as {_DTYPES[name]} with one entry for each of {images} images, found "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )
    same_device(op, logits, *parameters.values())
