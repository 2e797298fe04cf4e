"""vq_lookup's Triton backend under the interpreter: ties, NaN, splits, views, memory, the straight-through gradient."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retinar.kernels import ops
from retinar.kernels.dispatch import interpreting
from retinar.kernels.launch import ARCHITECTURES, FLOATS
from retinar.kernels.vq_lookup import gpu, reference

pytestmark = pytest.mark.skipif(
    not interpreting(), reason="needs Triton's interpreter: TRITON_INTERPRET=1 (make test runs it)"
)
NAN = float("nan")


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("channels", [1, 3, 8, 20])
@pytest.mark.parametrize("programs", [1, 4, 512])
def test_the_lowest_of_equal_codes_wins(channels: int, programs: int) -> None:
    """Each of 29 rows stands about ten times in the codebook, within a block and across blocks and splits."""
    distinct = _normal(29, channels, seed=1)
    which = torch.randint(29, (300,), generator=torch.Generator().manual_seed(2))
    which[270:] = which[:30]
    z = torch.cat([distinct, _normal(12, channels, seed=3)])
    quantized, codes = gpu.vq_lookup(z, distinct[which], programs)
    lowest = torch.tensor([which.tolist().index(which[code]) for code in codes])
    assert torch.equal(codes, lowest)
    if channels > 1:  # one channel has two directions, so the first code of the same sign wins
        present = torch.isin(torch.arange(29), which)
        assert torch.equal(which[codes[:29]][present], torch.arange(29)[present])
    torch.testing.assert_close(quantized, F.normalize(distinct[which], dim=-1)[codes])


def test_lengths_are_cut_where_the_reference_cuts_them() -> None:
    """Shorter than 1e-12, a row stays shorter than 1: the code loses to others, and is returned as short as it is."""
    z, codebook = _normal(20, 4), _normal(70, 4, seed=1) * torch.logspace(-15, -9, 70)[:, None]
    for vectors, rows in ((z, codebook), (z * 1e-13, codebook), (z, codebook[:20])):
        (quantized, codes), expected = gpu.vq_lookup(vectors, rows), reference.vq_lookup(vectors, rows)
        assert torch.equal(codes, expected[1])
        torch.testing.assert_close(quantized, expected[0])


def test_a_permuted_codebook_gives_the_same_rows() -> None:
    """Bits of a similarity do not depend on the code's place, so the chosen row does not either."""
    codebook = _normal(200, 8, seed=4).repeat(2, 1)
    z = _normal(40, 8, seed=5)
    expected, _ = gpu.vq_lookup(z, codebook)
    for seed in range(3):
        order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
        quantized, codes = gpu.vq_lookup(z, codebook[order], programs=2)
        assert torch.equal(quantized, expected)
        first = torch.stack([(codebook[order] == codebook[order][code]).all(-1).nonzero()[0, 0] for code in codes])
        assert torch.equal(codes, first)


@pytest.mark.parametrize("vectors", [1, 32, 70])
def test_the_number_of_splits_changes_no_bit(vectors: int) -> None:
    z, codebook = _normal(vectors, 8), _normal(700, 8, seed=1)
    expected = gpu.vq_lookup(z, codebook, programs=1)
    for programs in (2, 5, 1000):
        for one, other in zip(expected, gpu.vq_lookup(z, codebook, programs), strict=True):
            assert torch.equal(one, other)


def _spoilt(x: Tensor, *places: tuple[int, int], value: float = NAN) -> Tensor:
    x = x.clone()
    for row, channel in places:
        x[row, channel] = value
    return x


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of the interpreter
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("programs", [1, 512])
def test_nan_does_what_argmax_does(value: float, programs: int) -> None:
    """A vector with a NaN (or an infinity, which its length makes one) gets code 0; the first code with one takes
    every other vector; no code is out of range, and the results are the reference's."""
    z, codebook = _normal(37, 5), _normal(150, 5, seed=1)
    bad_z = _spoilt(z, (0, 2), (36, 4), value=value)
    bad_codes = _spoilt(codebook, (149, 0), (97, 4), value=value)
    for vectors, rows in ((bad_z, codebook), (z, bad_codes), (bad_z, bad_codes), (z, torch.full_like(codebook, NAN))):
        mine, theirs = gpu.vq_lookup(vectors, rows, programs), reference.vq_lookup(vectors, rows)
        assert torch.equal(mine[1], theirs[1])
        torch.testing.assert_close(mine[0], theirs[0], equal_nan=True)


def test_zeros_tie_everywhere() -> None:
    z, codebook = _normal(9, 4), _normal(130, 4, seed=1)
    z[3] = 0
    codebook[[5, 128]] = 0
    quantized, codes = gpu.vq_lookup(z, codebook)
    expected, expected_codes = reference.vq_lookup(z, codebook)
    assert codes[3] == 0
    assert torch.equal(codes, expected_codes)
    torch.testing.assert_close(quantized, expected)
    assert (gpu.vq_lookup(z, torch.zeros(70, 4))[1] == 0).all()


@pytest.mark.parametrize(("vectors", "codes", "channels"), [(0, 3, 4), (5, 3, 0), (1, 1, 1), (33, 65, 9)])
def test_degenerate_sizes(vectors: int, codes: int, channels: int) -> None:
    z, codebook = _normal(vectors, channels), _normal(codes, channels, seed=1)
    quantized, found = gpu.vq_lookup(z, codebook)
    expected, expected_codes = reference.vq_lookup(z, codebook)
    assert quantized.shape == (vectors, channels)
    assert torch.equal(found, expected_codes)
    torch.testing.assert_close(quantized, expected)
    assert gpu.normalize_backward(quantized, z).shape == (vectors, channels)


def _views(x: Tensor) -> list[Tensor]:
    """The same matrix at an odd offset, transposed, with gaps in rows, and with both."""
    rows, width = x.shape
    odd = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(rows, width).copy_(x)
    gaps = torch.full((rows, width, 2), NAN, dtype=x.dtype)[..., 1].copy_(x)
    both = torch.full((width, rows, 3), NAN, dtype=x.dtype)[..., 1].t().copy_(x)
    return [odd, x.t().contiguous().t(), gaps, both]


@pytest.mark.parametrize("dtype", FLOATS)
def test_views_change_nothing(dtype: torch.dtype) -> None:
    z, codebook, grad = _normal(35, 6, dtype=dtype), _normal(90, 6, seed=1, dtype=dtype), _normal(35, 6, seed=2)
    expected = *gpu.vq_lookup(z, codebook), gpu.normalize_backward(grad, z)
    for one_z, one_codebook, one_grad in zip(_views(z), _views(codebook), _views(grad), strict=True):
        found = *gpu.vq_lookup(one_z, one_codebook), gpu.normalize_backward(one_grad, one_z)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)
    row = z[:1].expand(35, -1)
    assert torch.equal(gpu.vq_lookup(row, codebook)[1], expected[1][:1].expand(35))


@pytest.mark.parametrize("codes", (*FLOATS, torch.float64))
def test_the_codebook_has_its_own_dtype(codes: torch.dtype) -> None:
    z, codebook = _normal(20, 8, dtype=torch.bfloat16), _normal(100, 8, seed=1, dtype=codes)
    expected = ops.vq_lookup(z, codebook.float(), backend="triton")
    for one, other in zip(expected, ops.vq_lookup(z, codebook, backend="triton"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", FLOATS)
def test_straight_through_gradient(dtype: torch.dtype) -> None:
    """Through the op, with vectors of zeros, of 1e-20 and of 1e-13, whose lengths the definition cuts at 1e-12."""
    z, codebook = _normal(70, 9, dtype=dtype), _normal(50, 9, seed=1)
    z[1], z[2], z[3] = 0, 1e-20, z[3] * 1e-13
    grad = _normal(70, 9, seed=2)
    leaf = z.clone().requires_grad_()
    ops.vq_lookup(leaf, codebook, backend="triton")[1].backward(grad)
    expected = reference.normalize_backward(grad, z)
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)


@settings(max_examples=15, deadline=None)
@given(
    vectors=st.integers(1, 70), codes=st.integers(1, 200), channels=st.integers(1, 18), programs=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(vectors: int, codes: int, channels: int, programs: int, seed: int) -> None:
    z, codebook = _normal(vectors, channels, seed=seed), _normal(codes, channels, seed=seed + 1)
    quantized, found = gpu.vq_lookup(z, codebook, programs)
    similarity = F.normalize(z.double(), dim=-1) @ F.normalize(codebook.double(), dim=-1).t()
    chosen = similarity.gather(1, found[:, None])[:, 0]
    assert (similarity.amax(-1) - chosen).max() < 1e-6
    torch.testing.assert_close(quantized, F.normalize(codebook, dim=-1)[found])


@given(vectors=st.integers(1, 2**40), codes=st.integers(1, 2**31), programs=st.integers(1, 4096))
def test_splits_cover_every_block_once(vectors: int, codes: int, programs: int) -> None:
    splits, each = gpu.code_splits(vectors, codes, programs)
    blocks = -(-codes // gpu.CODES)
    assert (splits - 1) * each < blocks <= splits * each
    assert splits <= max(1, programs)


@given(channels=st.integers(0, 4096), architecture=st.sampled_from(ARCHITECTURES))
def test_what_launchers_choose_is_compiled(channels: int, architecture: int) -> None:
    assert gpu.search_variant(channels, architecture) in gpu.SEARCH.variants[architecture]


class _Allocations(TorchDispatchMode):
    """The largest tensor that any operation made, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.untyped_storage().nbytes())
        return result


def test_the_similarities_never_exist_as_a_whole() -> None:
    z, codebook = _normal(320, 8), _normal(640, 8, seed=1)
    with _Allocations() as plain:
        (z @ codebook.t()).argmax(-1)
    with _Allocations() as ours:
        gpu.vq_lookup(z, codebook)
    assert plain.largest == 320 * 640 * 4
    assert ours.largest == 640 * 8 * 4  # the normalised codebook


def test_the_reference_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    z, codebook = _normal(50, 8), _normal(100, 8, seed=1)
    expected = reference.vq_lookup(z, codebook)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 7 * 128)
    for one, other in zip(expected, reference.vq_lookup(z, codebook), strict=True):
        assert torch.equal(one, other)
