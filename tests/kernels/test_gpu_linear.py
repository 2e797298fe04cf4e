"""linear's Triton kernel where the walk over all ops does not go: bits, gaps, addresses, tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retinar.kernels import ops
from retinar.kernels.dispatch import interpreting
from retinar.kernels.launch import ARCHITECTURES, FLOATS

pytestmark = pytest.mark.skipif(
    not interpreting(), reason="needs Triton's interpreter: TRITON_INTERPRET=1 (make test runs it)"
)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return ops.linear(x, weight, backend="triton")


def _inputs(rows: int, inner: int, outer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(inner)
    weight = torch.randn(outer, inner, generator=generator) * inner**-0.5
    return torch.randn(rows, inner, generator=generator).to(dtype), weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("inner", "outer"), [(33, 37), (256, 20), (200, 17)])
def test_a_row_depends_on_itself_alone(inner: int, outer: int, dtype: torch.dtype) -> None:
    """Bit by bit: any number of rows, any order, and neighbours that hold NaN."""
    x, weight = _inputs(130, inner, outer, dtype)
    expected = _linear(x, weight)
    for row in (0, 15, 16, 63, 64, 129):
        assert torch.equal(_linear(x[row : row + 1], weight), expected[row : row + 1]), row
    for rows in (2, 17, 64, 65):
        assert torch.equal(_linear(x[:rows], weight), expected[:rows]), rows
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert torch.equal(_linear(x[order], weight), expected[order])
    x[1::2] = float("nan")
    poisoned = _linear(x, weight)
    assert torch.equal(poisoned[::2], expected[::2])
    assert poisoned[1::2].isnan().all()


@pytest.mark.parametrize("outer", [3460, 6917])
def test_wide_weights(outer: int) -> None:
    """The other tiles: programs of 32 and of 64 rows of the weight."""
    x, weight = _inputs(3, 72, outer, torch.float16)
    actual = _linear(x, weight)
    torch.testing.assert_close(actual.float(), x.float() @ weight.float().t(), atol=2e-3, rtol=2e-3)
    assert torch.equal(_linear(x[1:2], weight), actual[1:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("inner", [1, 24, 127, 128, 136])
def test_nothing_is_read_beside_the_rows(inner: int, dtype: torch.dtype) -> None:
    """Rows with NaN between them and a weight in the middle of NaN, at any offset; against dense copies, bit by bit."""
    x, weight = _inputs(5, inner, 19, dtype)
    expected = _linear(x, weight)
    torch.testing.assert_close(expected.float(), x.float() @ weight.float().t(), atol=2e-3, rtol=2e-3)
    for gap, left, offset in ((8, 0, 16), (3, 1, 1)):
        wide = torch.full((7, inner + gap), float("nan"), dtype=dtype)
        view = wide[1:6, left : left + inner].copy_(x)
        memory = torch.full((weight.numel() + 64,), float("nan"), dtype=dtype)
        inside = memory[offset : offset + weight.numel()].view(weight.shape).copy_(weight)
        assert torch.equal(_linear(view, inside), expected), gap
    assert torch.equal(_linear(x, weight.t().contiguous().t()), expected)
    assert torch.equal(_linear(x.t().contiguous().t(), weight), expected)
    assert torch.equal(_linear(x.expand(2, 5, inner), weight), expected.expand(2, 5, 19))


def test_addresses_past_2_to_the_31() -> None:
    """Rows that lie 2^30 elements apart: the fourth is past what 32 bits reach. Untouched memory costs nothing."""
    x, weight = _inputs(4, 48, 20, torch.float16)
    apart = 2**30
    far = torch.empty(3 * apart + 48, dtype=torch.float16).as_strided((4, 48), (apart, 1))
    far.copy_(x)
    assert torch.equal(_linear(far, weight), _linear(x, weight))


def test_nothing_in_nothing_out() -> None:
    assert _linear(torch.ones(0, 8), torch.ones(5, 8)).shape == (0, 5)
    assert _linear(torch.ones(3, 8), torch.ones(0, 8)).shape == (3, 0)
    assert torch.equal(_linear(torch.ones(3, 0), torch.ones(5, 0)), torch.zeros(3, 5))


def test_fp64_is_refused_in_words() -> None:
    x, weight = torch.ones(2, 8).double(), torch.ones(3, 8).double()
    with pytest.raises(ValueError, match=r"it takes float32, float16 under the interpreter, found torch\.float64"):
        _linear(x, weight)


@settings(max_examples=300, deadline=None)
@given(
    arch=st.sampled_from(ARCHITECTURES),
    dtype=st.sampled_from(FLOATS),
    outer=st.integers(1, 60000),
    inner=st.integers(0, 20000),
)
def test_every_choice_is_in_the_tables(arch: int, dtype: torch.dtype, outer: int, inner: int) -> None:
    from retinar.kernels.linear import gpu

    assert gpu.variant_of(arch, dtype, outer, inner) in gpu.LINEAR.variants[arch]
    columns = gpu.columns_of(outer)
    assert columns == gpu.COLUMNS[-1] or -(-outer // columns) >= gpu.FEWEST
