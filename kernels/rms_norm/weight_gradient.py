"""The weight's gradient: a fixed number of programs each add up their rows, then one kernel adds up the programs.

No atomics: the rows of a program, the order within it and the order of the programs are the same in every run.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from retinar.kernels.launch import FLOATS, TYPES, Kernel, Variant

#: Multiprocessors of the A100 and of the H100 and H200: what "a fixed number of programs" counts in. It is a constant
#: of the architecture, not of the device, so that equal architectures add in equal order.
MULTIPROCESSORS: Mapping[int, int] = {80: 108, 90: 132}
MOST, COLUMNS, WARPS = 1024, 16, 8


@triton.jit(do_not_specialize=["programs", "width"])
def _rms_norm_backward_weight(
    partial, out, programs: tl.int64, width: tl.int64, MOST: tl.constexpr, COLUMNS: tl.constexpr
):
    """COLUMNS of ``out`` [width] from ``partial`` [programs, width]: one read, then a tree over the programs."""
    program = tl.arange(0, MOST)[:, None].to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    values = tl.load(partial + program * width + column, mask=(program < programs) & (column < width), other=0.0)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(out + column, tl.sum(values, 0).to(out.dtype.element_ty), mask=column < width)


def _table(architecture: int) -> Iterator[Variant]:
    for dtype in FLOATS:
        yield Variant(architecture, ("fp32", TYPES[dtype]), (("MOST", MOST), ("COLUMNS", COLUMNS)), WARPS)


SUM_PARTIALS = Kernel("rms_norm", _rms_norm_backward_weight, _table)


def sum_partials(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """[width] in the weight's dtype from [programs, width] in fp32."""
    programs, width = partial.shape
    out = partial.new_empty(width, dtype=dtype if dtype in FLOATS else torch.float32)
    constants = {"MOST": MOST, "COLUMNS": COLUMNS}
    SUM_PARTIALS.launch((triton.cdiv(width, COLUMNS),), (partial, out, programs, width), constants, WARPS)
    return out.to(dtype)
