"""rope_attention's Triton kernels where the walk over all ops does not go: dropout, long rows, addresses, tables."""

from __future__ import annotations

import math
from typing import Any

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

CASES = [
    # batch, heads, groups, positions, head dim
    (1, 2, 1, 70, 32),
    (2, 1, 1, 33, 64),
    (1, 4, 2, 20, 100),
    (1, 1, 1, 67, 128),
]


def _inputs(batch: int, heads: int, groups: int, positions: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(positions)
    side = math.isqrt(positions) + 1
    q, k, v, grad = (
        torch.randn(batch, count, positions, dim, generator=generator).to(dtype)
        for count in (heads, groups, groups, heads)
    )
    return q, k, v, grad, ops.rope_table(side, side, dim)


def _run(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rope: Tensor, backend: str, dropout_p: float
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = ops.rope_attention(*leaves, rope, dropout_p=dropout_p, seed=77, backend=backend)
    return o.detach(), *torch.autograd.grad(o, leaves, grad)


@pytest.mark.parametrize(("case", "dropout_p"), list(zip(CASES, (0.1, 0.6, 0.3, 0.1), strict=True)), ids=str)
def test_dropout_is_the_reference_s(case: tuple[int, int, int, int, int], dropout_p: float) -> None:
    """The same mask, forward and backward: one weight dropped otherwise would show as an error of a tenth."""
    inputs = _inputs(*case, torch.float32)
    actual = _run(*inputs, "triton", dropout_p)
    expected = _run(*inputs, "reference", dropout_p)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_long_rows_are_turned_first(dropout_p: float) -> None:
    """More positions than a kernel rotates inside: in fp16, against the same inputs in fp32 on the reference."""
    from retinar.kernels.rope_attention import gpu

    inputs = _inputs(1, 1, 1, 300, 64, torch.float16)
    assert gpu.turn_first(300, torch.float16, gpu.shape_of(64))
    actual = _run(*inputs, "triton", dropout_p)
    expected = _run(*(x.float() for x in inputs), "reference", dropout_p)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=4e-3, atol=4e-3)


def test_two_runs_give_the_same_bits() -> None:
    inputs = _inputs(1, 2, 1, 150, 64, torch.float16)
    for one, other in zip(_run(*inputs, "triton", 0.2), _run(*inputs, "triton", 0.2), strict=True):
        assert torch.equal(one, other)


def test_class_position_scores_nothing_and_still_counts() -> None:
    """The zero row of the table: every query gives the class position's key the score 0, whatever the key is."""
    q, k, v, _, rope = _inputs(1, 1, 1, 5, 32, torch.float32)
    other = k.clone()
    other[:, :, 0] = 1e4
    one = ops.rope_attention(q, k, v, rope, backend="triton")
    assert torch.equal(one, ops.rope_attention(q, other, v, rope, backend="triton"))
    changed = v.clone()
    changed[:, :, 0] += 1
    assert (ops.rope_attention(q, k, changed, rope, backend="triton") > one).all()


def test_packed_projection_and_odd_offsets() -> None:
    """Views as the model makes them, out of one packed projection; and one that starts at no multiple of 16 bytes."""
    batch, positions, heads, dim = 2, 37, 3, 64
    packed = torch.randn(batch, positions, 3 * heads, dim, generator=torch.Generator().manual_seed(5)).half()
    shifted = torch.empty(packed.numel() + 1, dtype=packed.dtype)[1:].view(packed.shape).copy_(packed)
    rope = ops.rope_table(6, 6, dim)
    results = []
    for source in (packed, shifted):
        q, k, v = source.transpose(1, 2).split(heads, dim=1)
        assert not q.is_contiguous()
        results.append(ops.rope_attention(q, k, v, rope, backend="triton"))
        expected = ops.rope_attention(*(x.contiguous() for x in (q, k, v)), rope, backend="triton")
        assert torch.equal(results[-1], expected)
    assert torch.equal(*results)
    merged = results[0].transpose(1, 2)
    assert merged.is_contiguous()
    assert merged.flatten(2).data_ptr() == results[0].data_ptr()


def test_shared_heads_of_strided_inputs_get_their_gradients() -> None:
    """Gradients of shared heads are summed from scratch memory, which must not take over the strides of q."""
    q, k, v, grad, rope = _inputs(1, 4, 2, 9, 32, torch.float32)
    strided = q.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert strided.stride(3) != 1
    for one, other in zip(
        _run(strided, k, v, grad, rope, "triton", 0.0), _run(q, k, v, grad, rope, "triton", 0.0), strict=True
    ):
        assert torch.equal(one, other)


def test_seeds_as_the_model_hands_them_out() -> None:
    """One tensor of seeds, a layer each: every other one starts at no multiple of 16 bytes."""
    q, k, v, _, rope = _inputs(1, 1, 1, 9, 32, torch.float32)
    seeds = torch.arange(5, 9).unbind()
    results = [ops.rope_attention(q, k, v, rope, dropout_p=0.5, seed=seed, backend="triton") for seed in seeds]
    expected = [ops.rope_attention(q, k, v, rope, dropout_p=0.5, seed=seed, backend="triton") for seed in range(5, 9)]
    assert all(map(torch.equal, results, expected))
    with pytest.raises(ValueError, match=r"expected one seed, found \(2,\)"):
        ops.rope_attention(q, k, v, rope, dropout_p=0.5, seed=torch.arange(2), backend="triton")


def test_more_heads_than_a_grid_s_second_axis_has_blocks() -> None:
    """CUDA allows 65,535 blocks there: all programs lie along the first axis."""
    from retinar.kernels.rope_attention import gpu

    launched: list[tuple[int, ...]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(grid)
            return lambda *args, **options: None

    x = torch.empty(1, 1, 1, 32).expand(70_000, 1, 1, 32)
    with pytest.MonkeyPatch.context() as patch:
        for kernel in gpu.KERNELS:
            patch.setattr(kernel, "function", Recorded())
        o, lse = gpu.rope_attention(x, x, x, ops.rope_table(1, 1, 32), 0.0, torch.tensor(0), 1.0)
        gpu.rope_attention_backward(o, x, x, x, o, lse, ops.rope_table(1, 1, 32), 0.0, torch.tensor(0), 1.0)
    assert len(launched) == 4
    assert all(len(grid) == 1 and grid[0] >= 70_000 for grid in launched)


def test_addresses_past_2_to_the_31() -> None:
    """Batch items that lie 2^30 elements apart: the fourth is past what 32 bits reach. Untouched pages cost nothing."""
    positions, dim, apart = 9, 32, 2**30
    memory = torch.empty(3 * apart + positions * dim, dtype=torch.float16)
    far = memory.as_strided((4, 1, positions, dim), (apart, positions * dim, dim, 1))
    near = torch.randn(4, 1, positions, dim, generator=torch.Generator().manual_seed(3)).half()
    far.copy_(near)
    grad = near.flip(0)
    rope = ops.rope_table(3, 3, dim)
    for one, other in zip(
        _run(far, far, far, grad, rope, "triton", 0.0), _run(near, near, near, grad, rope, "triton", 0.0), strict=True
    ):
        assert torch.equal(one, other)


def test_row_strides_too_wide_for_a_tile_s_offsets_are_copied() -> None:
    dim, apart = 32, 2**25  # 128 rows of 2^25 elements are 2^32
    memory = torch.empty(2 * apart + dim, dtype=torch.float16)
    far = memory.as_strided((1, 1, 3, dim), (3 * apart, 3 * apart, apart, 1))
    near = torch.randn(1, 1, 3, dim, generator=torch.Generator().manual_seed(3)).half()
    far.copy_(near)
    rope = ops.rope_table(2, 2, dim)
    expected = ops.rope_attention(near, near, near, rope, backend="triton")
    assert torch.equal(ops.rope_attention(far, far, far, rope, backend="triton"), expected)


@pytest.mark.parametrize("shape", [(0, 2, 5, 32), (2, 2, 0, 32)], ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    o = ops.rope_attention(x, x, x, ops.rope_table(3, 3, 32), backend="triton")
    o.sum().backward()
    assert o.shape == shape
    assert x.grad is not None and x.grad.shape == shape


def test_head_dims_out_of_reach_are_refused_in_words() -> None:
    for dim in (6, 132):
        x, rope = torch.randn(1, 1, 3, dim), torch.zeros(3, dim // 2, 2)
        with pytest.raises(ValueError, match=f"head dims that are multiples of 4 up to 128, found {dim}"):
            ops.rope_attention(x, x, x, rope, backend="triton")


@settings(max_examples=300, deadline=None)
@given(
    arch=st.sampled_from(ARCHITECTURES),
    dtype=st.sampled_from(FLOATS),
    head_dim=st.integers(1, 32).map(lambda quarter: 4 * quarter),
    positions=st.integers(1, 5000),
    dropout=st.booleans(),
)
def test_every_choice_is_in_the_tables(
    arch: int, dtype: torch.dtype, head_dim: int, positions: int, dropout: bool
) -> None:
    from retinar.kernels.rope_attention import gpu

    shape = gpu.shape_of(head_dim)
    turned = gpu.turn_first(positions, dtype, shape)
    assert 2 * shape.half >= head_dim
    for kernel, choose in (
        (gpu.FORWARD, gpu.forward_tile),
        (gpu.BACKWARD_KV, gpu.backward_kv_tile),
        (gpu.BACKWARD_Q, gpu.backward_q_tile),
    ):
        tile = choose(arch, dtype, shape, dropout, turned)
        constants = tuple(gpu.constants(shape, dropout, turned, tile).items())
        chosen = (constants, tile.num_warps, tile.num_stages)
        assert chosen in {(v.constants, v.num_warps, v.num_stages) for v in kernel.variants[arch]}
        assert max(tile.rows, tile.columns) <= gpu.MOST_ROWS
        outer, inner = (tile.columns, tile.rows) if kernel is gpu.BACKWARD_KV else (tile.rows, tile.columns)
        assert outer % inner == 0  # blocks on the diagonal start where the ones before it end
