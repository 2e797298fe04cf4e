"""x W^T for inference, with a fixed order over K."""

from __future__ import annotations

from torch import Tensor

from retinar.kernels.dispatch import Op, refuse_gradients, same_device
from retinar.kernels.launch import triton_backend
from retinar.kernels.linear import reference

LINEAR = Op(
    "linear(Tensor x, Tensor weight) -> Tensor",
    reference=reference.linear,
    fake=lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
LINEAR.register("triton", triton_backend("linear", "linear", products=True))


def linear(x_XK: Tensor, weight_NK: Tensor, *, backend: str | None = None) -> Tensor:
    """``x W^T`` whose bits, row by row, do not depend on the number of rows or on the other rows.

    Args:
        x_XK: [..., K], any strides, any floating dtype.
        weight_NK: [N, K] in x's dtype; copied first where it is not contiguous.
        backend: "triton" (GPU; fp32, bf16, fp16; made for few rows), "reference", or None to choose by device.

    Returns:
        [..., N] in x's dtype, contiguous. Inference only.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, inputs that ask for gradients, or a backend that cannot
            run.
    """
    if x_XK.dim() == 0 or weight_NK.dim() != 2 or x_XK.shape[-1] != weight_NK.shape[1]:
        raise ValueError(
            f"linear: expected x [..., K] and weight [N, K], found {tuple(x_XK.shape)} and {tuple(weight_NK.shape)}"
        )
    if x_XK.dtype != weight_NK.dtype or not x_XK.is_floating_point():
        raise ValueError(
            f"linear: expected x and weight of one floating dtype, found {x_XK.dtype} and {weight_NK.dtype}; cast one"
        )
    same_device("linear", x_XK, weight_NK)
    refuse_gradients("linear", x_XK, weight_NK)
    return LINEAR(x_XK, weight_NK, backend=backend)
