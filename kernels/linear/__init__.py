"""x W^T for inference, with a fixed order over K."""

from __future__ import annotations

from torch import Tensor

from retinar.kernels.dispatch import Op, refuse_gradients, same_device
from retinar.kernels.launch import triton_backend
from retinar.kernels.linear import reference
from retinar.kernels.numerics import wide as wide_dtype

LINEAR = Op(
    "linear(Tensor x, Tensor weight, Tensor? norm, Tensor? residual, float eps, bool gate, bool wide) -> Tensor",
    reference=reference.linear,
    fake=lambda x, weight, norm, residual, eps, gate, wide: x.new_empty(
        *x.shape[:-1], weight.shape[0] // (2 if gate else 1), dtype=wide_dtype(x.dtype) if wide else x.dtype
    ),
)


LINEAR.register("triton", triton_backend("linear", "linear", products=True))


def linear(
    x_XK: Tensor,
    weight_NK: Tensor,
    *,
    norm_K: Tensor | None = None,
    residual_XN: Tensor | None = None,
    eps: float = 1e-5,
    gate: bool = False,
    wide: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``x W^T`` whose bits, row by row, do not depend on the number of rows or on the other rows.

    A decode step is bound by reading weights, so what stands around its products goes along with them: an RMSNorm in
    front; behind it one of the gate, the addition of the residual, and the change to fp32.

    Args:
        x_XK: [..., K], any strides, any floating dtype.
        weight_NK: [N, K] in x's dtype; copied first where it is not contiguous.
        norm_K: [K], weight of an RMSNorm with ``eps`` of x's rows in front, as :func:`rms_norm`.
        residual_XN: [..., N] in x's dtype, added to the result.
        gate: the result's halves are gate and up, as in :func:`swiglu`; N is even.
        wide: the result in fp32, for logits.
        backend: "triton" (GPU; fp32, bf16, fp16; made for few rows), "reference", or None to choose by device.

    Returns:
        [..., N], with ``gate`` [..., N / 2], in x's dtype or fp32, contiguous. Inference only. A backend may round once
        where the reference rounds after every part.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, more than one thing behind the product, inputs that ask
            for gradients, or a backend that cannot run.
    """
    if x_XK.dim() == 0 or weight_NK.dim() != 2 or x_XK.shape[-1] != weight_NK.shape[1]:
        raise ValueError(
            f"linear: expected x [..., K] and weight [N, K], found {tuple(x_XK.shape)} and {tuple(weight_NK.shape)}"
        )
    others = [each for each in (norm_K, residual_XN) if each is not None]
    if not x_XK.is_floating_point() or any(x_XK.dtype != each.dtype for each in (weight_NK, *others)):
        found = ", ".join(str(each.dtype) for each in (x_XK, weight_NK, *others))
        raise ValueError(f"linear: expected x, weight, norm and residual of one floating dtype, found {found}; cast")
    if norm_K is not None and norm_K.shape != x_XK.shape[-1:]:
        raise ValueError(f"linear: expected a norm [{x_XK.shape[-1]}], found {tuple(norm_K.shape)}")
    outer = weight_NK.shape[0]
    if residual_XN is not None and residual_XN.shape != (*x_XK.shape[:-1], outer):
        raise ValueError(f"linear: expected a residual {(*x_XK.shape[:-1], outer)}, found {tuple(residual_XN.shape)}")
    if gate + wide + (residual_XN is not None) > 1:
        raise ValueError("linear: expected at most one of gate, residual and wide, found several; add the others apart")
    if gate and outer % 2:
        raise ValueError(f"linear: expected an even number of outputs [gate | up], found {outer}")
    same_device("linear", x_XK, weight_NK, *others)
    refuse_gradients("linear", x_XK, weight_NK, *others)
    return LINEAR(x_XK, weight_NK, norm_K, residual_XN, float(eps), gate, wide, backend=backend)
