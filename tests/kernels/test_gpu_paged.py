"""paged_attention's Triton kernels where the walk over all ops does not go: bits, pages, splits, addresses, tables."""

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
from retinar.kernels.launch import ARCHITECTURES, FLOATS, Kernel

pytestmark = pytest.mark.skipif(
    not interpreting(), reason="needs Triton's interpreter: TRITON_INTERPRET=1 (make test runs it)"
)

NOWHERE = 2**31 - 1  # in table entries that must not be followed
POSITIONS = (0, 1, 15, 16, 63, 127, 128, 129, 255, 256, 300)  # at the ends of pages and of splits
SHAPES = [
    # heads, groups, head dim, dtype
    (2, 2, 64, torch.float16),
    (1, 1, 128, torch.float16),
    (2, 1, 100, torch.float32),
    (17, 1, 32, torch.float16),  # more query heads than a program of the kernel for shared keys has
]


class Rows:
    """Rows at given positions, with their past; `run` lays chosen ones out in pages and calls the op."""

    def __init__(self, heads: int, groups: int, dim: int, dtype: torch.dtype, positions: tuple[int, ...] = POSITIONS):
        generator = torch.Generator().manual_seed(dim)

        def draw(*shape: int) -> Tensor:
            return torch.randn(len(positions), *shape, generator=generator).to(dtype)

        self.q, self.k, self.v = draw(heads, dim), draw(groups, dim), draw(groups, dim)
        self.past = [draw(max(positions), groups, dim) for _ in range(2)]
        self.positions = torch.tensor(positions, dtype=torch.int32)
        self.rope = ops.rope_table(math.isqrt(max(positions)) + 1, math.isqrt(max(positions)) + 1, dim)

    def layout(self, rows: list[int], page: int, spare: int = 0, seed: int = 0) -> tuple[list[Tensor], Tensor]:
        """Caches of NaN with the rows' past in pages in random order; a table that is NOWHERE behind the positions,
        and wider than the longest row by ``spare`` pages."""
        needed = [int(self.positions[row]) // page + 1 for row in rows]
        pages = iter(torch.randperm(sum(needed) + 1, generator=torch.Generator().manual_seed(seed)).tolist())
        caches = [torch.full((sum(needed) + 1, page, *x.shape[2:]), float("nan"), dtype=x.dtype) for x in self.past]
        table = torch.full((len(rows), max(needed) + spare), NOWHERE, dtype=torch.int32)
        for at, (row, count) in enumerate(zip(rows, needed, strict=True)):
            table[at, :count] = torch.tensor([next(pages) for _ in range(count)])
            place = torch.arange(int(self.positions[row]))
            for cache, past in zip(caches, self.past, strict=True):
                cache[table[at, place // page].long(), place % page] = past[row, : len(place)]
        return caches, table

    def run(
        self, rows: list[int], page: int, spare: int = 0, seed: int = 0, backend: str = "triton"
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        caches, table = self.layout(rows, page, spare, seed)
        inputs = (x[rows] for x in (self.q, self.k, self.v))
        out = ops.paged_attention(*inputs, *caches, table, self.positions[rows], self.rope, backend=backend)
        return out, caches, table


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_depends_on_itself_alone(shape: tuple[Any, ...]) -> None:
    """Bit by bit: alone and in a batch, at any place in it, for every page size, page order and width of the table."""
    rows = Rows(*shape)
    everyone = list(range(len(POSITIONS)))
    expected = torch.cat([rows.run([row], 16)[0] for row in everyone])
    assert torch.isfinite(expected).all()
    for page, order, spare in (
        (16, everyone[::-1], 0),
        (64, everyone, 17),
        (256, everyone[3:9], 0),
        (5, [10, 0, 7], 9),
    ):
        assert torch.equal(rows.run(order, page, spare, seed=page)[0], expected[order]), page


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_cache_are_the_reference_s(shape: tuple[Any, ...]) -> None:
    """The output within rounding; of the caches every bit, the slots that nobody wrote included."""
    rows = Rows(*shape)
    everyone = list(range(len(POSITIONS)))
    out, caches, table = rows.run(everyone, 16)
    again, _ = rows.layout(everyone, 16)
    safe = table.where(table != NOWHERE, 0)  # the reference looks past the end of short rows
    arguments = rows.q, rows.k, rows.v, *again, safe, rows.positions, rows.rope
    expected = ops.paged_attention(*arguments, backend="reference")
    tolerance = 2e-3 if shape[3] == torch.float16 else 2e-6
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    for one, other in zip(caches, again, strict=True):
        assert torch.equal(one.nan_to_num(77.0), other.nan_to_num(77.0))


def test_more_splits_than_are_summed_at_once() -> None:
    rows = Rows(1, 1, 32, torch.float32, (1023, 1024, 1170))
    out, _, _ = rows.run([0, 1, 2], 64)
    assert torch.equal(out[2:], rows.run([2], 2048)[0])
    for row in range(3):
        expected = rows.run([row], 64, backend="reference")[0]
        torch.testing.assert_close(out[row : row + 1], expected, atol=2e-6, rtol=1e-5)


def test_the_class_position_is_its_own_value() -> None:
    """Position 0: one slot, whose rotated key is zero."""
    rows = Rows(2, 2, 32, torch.float32, (0, 5))
    out, caches, table = rows.run([0], 16)
    assert torch.equal(out, rows.v[:1])
    assert torch.equal(caches[0][table[0, 0], 0], torch.zeros(2, 32))


@pytest.mark.parametrize(("heads", "groups", "positions"), [(1, 1, 133), (2, 1, 35)])
def test_token_by_token_is_the_whole_sequence(heads: int, groups: int, positions: int) -> None:
    """Decoded over what the kernel itself wrote: one sequence that crosses a split, one of heads that share keys."""
    dim, page = 32, 16
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, heads, positions, dim, generator=generator)
    k, v = torch.randn(2, 1, groups, positions, dim, generator=generator)
    rope = ops.rope_table(12, 12, dim)
    expected = ops.rope_attention(q, k, v, rope, backend="reference")
    caches = torch.full((2, 12, page, groups, dim), float("nan")).unbind()
    table = torch.randperm(12, generator=generator)[None, :9].int()
    for at in range(positions):
        where = torch.tensor([at], dtype=torch.int32)
        new = (x[:, :, at] for x in (q, k, v))
        out = ops.paged_attention(*new, *caches, table, where, rope, backend="triton")
        torch.testing.assert_close(out, expected[:, :, at], atol=2e-6, rtol=1e-5)


def test_pools_past_2_to_the_31_elements() -> None:
    """Pages at the end of pools of more than 2^31 elements; untouched memory costs nothing."""
    rows = Rows(2, 2, 64, torch.float16, (37, 130))
    near, table = rows.layout([0, 1], 16)
    far_pages = 2**20 + len(near[0])
    far = [torch.empty(far_pages, *x.shape[1:], dtype=x.dtype) for x in near]
    assert far[0].numel() > 2**31
    shift = far_pages - len(near[0])
    for one, other in zip(far, near, strict=True):
        one[shift:] = other
    moved = torch.where(table == NOWHERE, table, table + shift)
    inputs = rows.q, rows.k, rows.v
    expected = ops.paged_attention(*inputs, *near, table, rows.positions, rows.rope, backend="triton")
    assert torch.equal(ops.paged_attention(*inputs, *far, moved, rows.positions, rows.rope, backend="triton"), expected)
    for one, other in zip(far, near, strict=True):
        assert torch.equal(one[shift:].nan_to_num(77.0), other.nan_to_num(77.0))


def test_views_of_a_packed_projection_and_of_wider_tables() -> None:
    """Strides and odd offsets as an engine makes them, against contiguous tensors: the same bits."""
    rows = Rows(4, 2, 32, torch.float16, (20, 133, 64))
    expected, _, _ = rows.run([0, 1, 2], 16)
    caches, table = rows.layout([0, 1, 2], 16)
    packed = torch.cat([rows.q, rows.k, rows.v], 1)
    shifted = torch.empty(packed.numel() + 1, dtype=packed.dtype)[1:].view(packed.shape).copy_(packed)
    wide = torch.full((4, table.shape[1] + 2), NOWHERE, dtype=torch.int32)
    wide[1:, 1:-1] = table
    positions = torch.stack([rows.positions, rows.positions + 7], 1)[:, 0]
    for source in (packed, shifted):
        parts = source.split([4, 2, 2], dim=1)
        out = ops.paged_attention(*parts, *caches, wide[1:, 1:-1], positions, rows.rope, backend="triton")
        assert torch.equal(out, expected)
    gaps = [torch.full((*x.shape, 2), float("nan"), dtype=x.dtype)[..., 0].copy_(x) for x in (rows.q, rows.k, rows.v)]
    assert torch.equal(ops.paged_attention(*gaps, *caches, table, positions, rows.rope, backend="triton"), expected)


def test_launches_do_not_depend_on_the_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, the same for any positions: what a CUDA graph needs."""
    from retinar.kernels.paged_attention import gpu

    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Kernel, "launch", lambda self, grid, _, constants, *how: seen.append((self, grid, how)))
    rows = Rows(2, 2, 32, torch.float32, (3, 250))
    caches, table = rows.layout([0, 1], 16)
    for positions in (rows.positions, torch.zeros_like(rows.positions)):
        ops.paged_attention(rows.q, rows.k, rows.v, *caches, table, positions, rows.rope, backend="triton")
    assert seen[:2] == seen[2:]
    assert [(each[0], each[1]) for each in seen[:2]] == [(gpu.HEADS, (2, 2, 2)), (gpu.COMBINE, (4,))]


def test_no_rows() -> None:
    rows = Rows(2, 2, 32, torch.float32, (0,))
    caches = [torch.zeros(3, 16, 2, 32) for _ in range(2)]
    table, positions = torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    empty = (x[:0] for x in (rows.q, rows.k, rows.v))
    out = ops.paged_attention(*empty, *caches, table, positions, rows.rope, backend="triton")
    assert out.shape == (0, 2, 32)


def test_what_it_does_not_take_is_refused_in_words() -> None:
    for dim in (6, 132):
        x, cache = torch.randn(1, 1, dim), torch.zeros(2, 16, 1, dim)
        table, positions = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        arguments = x, x, x, cache, cache.clone(), table, positions, torch.zeros(1, dim // 2, 2)
        with pytest.raises(ValueError, match=f"head dims that are multiples of 4 up to 128, found {dim}"):
            ops.paged_attention(*arguments, backend="triton")
        assert torch.equal(ops.paged_attention(*arguments), x)  # without a name: the reference
    rows = Rows(1, 1, 32, torch.float32, (4,))
    caches, table = rows.layout([0], 16)
    odd = [torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in caches]
    with pytest.raises(ValueError, match="caches that start at a multiple of 16 bytes"):
        ops.paged_attention(rows.q, rows.k, rows.v, *odd, table, rows.positions, rows.rope, backend="triton")


def test_sdpa_reads_no_slot_that_is_not_the_row_s() -> None:
    """NaN in slots and numbers of no page in the table, as above, for the backend that gathers."""
    rows = Rows(2, 1, 32, torch.float32)
    everyone = list(range(len(POSITIONS)))
    expected, caches, _ = rows.run(everyone, 64, spare=3)
    actual, others, _ = rows.run(everyone, 64, spare=3, backend="sdpa")
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)
    for one, other in zip(caches, others, strict=True):
        assert torch.equal(one.nan_to_num(77.0), other.nan_to_num(77.0))


def test_flash_says_what_it_does_not_take() -> None:
    from retinar.kernels.paged_attention.libraries import flash_unsupported

    def reason(dim: int, page: int, dtype: torch.dtype) -> str | None:
        x, cache = torch.empty(1, 2, dim, dtype=dtype), torch.empty(2, page, 2, dim, dtype=dtype)
        return flash_unsupported(x, x, x, cache, cache)

    assert reason(64, 256, torch.float16) is None
    assert reason(64, 1024, torch.bfloat16) is None
    assert reason(64, 16, torch.float16) == "it takes pages of a multiple of 256 slots, found 16"
    assert reason(100, 256, torch.float16) == "it takes head dims that are multiples of 8 up to 256, found 100"
    assert reason(64, 256, torch.float32) == "it takes bfloat16 and float16, found torch.float32"


@settings(max_examples=300, deadline=None)
@given(
    arch=st.sampled_from(ARCHITECTURES),
    dtype=st.sampled_from(FLOATS),
    head_dim=st.integers(1, 32).map(lambda quarter: 4 * quarter),
    columns=st.integers(1, 3000),
    page=st.integers(0, 10).map(lambda power: 2**power),
)
def test_every_choice_is_in_the_tables(arch: int, dtype: torch.dtype, head_dim: int, columns: int, page: int) -> None:
    from retinar.kernels.paged_attention import gpu

    shape = gpu.shape_of(head_dim)
    assert 2 * shape.half >= head_dim and head_dim % shape.vector == 0
    assert gpu.heads_variant(arch, dtype, shape) in gpu.HEADS.variants[arch]
    assert gpu.groups_variant(arch, dtype, shape) in gpu.GROUPS.variants[arch]
    assert gpu.combine_variant(arch, dtype, shape) in gpu.COMBINE.variants[arch]
    assert gpu.SPLIT % gpu.groups_tile(dtype, shape).block == 0  # a split is whole blocks: bits stay where they are
    splits = gpu.splits_of(columns, page)
    assert (splits - 1) * gpu.SPLIT < columns * page <= splits * gpu.SPLIT
