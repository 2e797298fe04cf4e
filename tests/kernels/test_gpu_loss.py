"""linear_cross_entropy's Triton backend under the interpreter: chunks, scales, strides, memory, what targets may be."""

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
from retinar.kernels.linear_cross_entropy import gpu, reference

pytestmark = pytest.mark.skipif(
    not interpreting(), reason="needs Triton's interpreter: TRITON_INTERPRET=1 (make test runs it)"
)


def _inputs(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32, *, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * scale).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[2::5] = -100
    return hidden, weight, targets


def _gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, backend: str, loss_scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    loss = ops.linear_cross_entropy(*leaves, targets, backend=backend)
    return loss.detach(), *torch.autograd.grad(loss * loss_scale, leaves)


NO_TARGETS = pytest.mark.filterwarnings(  # numpy's, when the interpreter divides by their number
    "ignore:divide by zero", "ignore:invalid value"
)


@NO_TARGETS
@pytest.mark.parametrize("dtype", FLOATS)
def test_all_targets_ignored_is_nan(dtype: torch.dtype) -> None:
    hidden, weight, _ = _inputs(5, 3, 11, dtype)
    targets = torch.full((5,), -100)
    for mine, theirs in zip(
        _gradients(hidden, weight, targets, "triton"), _gradients(hidden, weight, targets, "reference"), strict=True
    ):
        assert mine.isnan().all()
        assert theirs.isnan().all()


@NO_TARGETS
def test_no_tokens() -> None:
    loss, grad_hidden, grad_weight = _gradients(*_inputs(0, 3, 11), "triton")
    assert loss.isnan()
    assert grad_hidden.shape == (0, 3)
    assert grad_weight.shape == (11, 3)


def test_an_empty_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a weight \[V >= 1, D\]"):
        ops.linear_cross_entropy(torch.ones(2, 3), torch.ones(0, 3), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 8, 24])
def test_chunks_add_up(dtype: torch.dtype, rows: int) -> None:
    """The last chunk is cut, one has no target that counts, and without gradients the loss is the same."""
    hidden, weight, targets = _inputs(43, 17, 101, dtype)
    targets[8:16] = -100
    whole = gpu.linear_cross_entropy(hidden, weight, targets, True)
    parts = gpu.linear_cross_entropy(hidden, weight, targets, True, rows=rows)
    assert torch.equal(gpu.linear_cross_entropy(hidden, weight, targets, False, rows=rows)[0], parts[0])
    truth = reference.linear_cross_entropy(hidden.double(), weight.double(), targets, True)
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for one, other, true in zip(whole, parts, truth, strict=True):
        assert (one - other).norm() <= tolerance * true.norm()
        assert (other - true).norm() <= tolerance * true.norm()


@pytest.mark.parametrize("gradients", [False, True])
def test_a_row_longer_than_a_block(gradients: bool) -> None:
    """The running maximum moves from block to block; the last one is cut, its padding garbage."""
    vocabulary = 2 * gpu.BLOCK + 1001
    hidden, weight, targets = _inputs(3, 4, vocabulary, scale=3.0)
    hidden[1:2] = weight[-1] * 2  # its maximum in the last block
    targets[:2] = torch.tensor([vocabulary - 1, 0])
    for mine, true in zip(
        gpu.linear_cross_entropy(hidden, weight, targets, gradients),
        reference.linear_cross_entropy(hidden.double(), weight.double(), targets, gradients),
        strict=True,
    ):
        torch.testing.assert_close(mine, true.float(), rtol=1e-5, atol=1e-7)


def test_improbable_codes_keep_their_fp16_gradients() -> None:
    """Probabilities of 3e-9 are zero in fp16; the factor on the logits' gradients carries them into the weight's."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(16, 8, generator=generator).half()
    hidden[:, 0] = 1.0
    weight = (torch.randn(64, 8, generator=generator) * 0.1).half()
    weight[32:, 0] = -16.0  # exp(-16) / 32
    targets = torch.randint(32, (16,), generator=generator)
    _, _, truth = reference.linear_cross_entropy(hidden.double(), weight.double(), targets, True)
    _, _, grad_weight = gpu.linear_cross_entropy(hidden, weight, targets, True)
    assert truth[32:].abs().max() < torch.finfo(torch.float16).tiny / 1000
    assert (grad_weight[32:] - truth[32:]).norm() < 2e-3 * truth[32:].norm()
    loss_scale = 2.0**16
    scaled = _gradients(hidden, weight, targets, "triton", loss_scale)[2]
    assert (scaled[32:].double() / loss_scale - truth[32:]).norm() < 2e-2 * truth[32:].norm()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_large_loss_scale_is_exact(dtype: torch.dtype) -> None:
    """A power of two passes through to the last bit: nothing was rounded away or flushed before it came."""
    inputs = _inputs(33, 16, 50, dtype, scale=0.1)
    once, scaled = (_gradients(*inputs, "triton", scale) for scale in (1.0, 1024.0))
    for one, other in zip(once[1:], scaled[1:], strict=True):
        kept = one.abs() >= torch.finfo(dtype).smallest_normal
        assert kept.any()
        assert torch.equal((one * 1024)[kept], other[kept])


@pytest.mark.parametrize("dtype", FLOATS)
def test_huge_logits(dtype: torch.dtype) -> None:
    hidden, weight, targets = _inputs(9, 6, 40, dtype)
    hidden, weight = hidden * 200, weight * 200  # logits of 1e5: exp of the plain logit is infinite
    results = gpu.linear_cross_entropy(hidden, weight, targets, True)
    truth = reference.linear_cross_entropy(hidden.double(), weight.double(), targets, True)
    for mine, true in zip(results, truth, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, true.float(), rtol=2e-3, atol=2e-3 * true.abs().max().item())


@pytest.mark.parametrize("target", [7, 8, 2**40, -1, -(2**40)])
def test_a_target_outside_the_vocabulary_is_nan(target: int) -> None:
    """7 and 8 lie in and behind the padding of a row of 7 logits."""
    hidden, weight, targets = _inputs(4, 3, 7)
    targets[1] = target
    loss, grad_hidden, grad_weight = gpu.linear_cross_entropy(hidden, weight, targets, True)
    assert loss.isnan()
    assert grad_hidden.isfinite().all()
    assert grad_weight.isfinite().all()


def _views(x: Tensor) -> dict[str, Tensor]:
    """The same matrix at an odd offset, transposed, with gaps in rows, and with gaps between rows."""
    rows, width = x.shape
    odd = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(rows, width).copy_(x)
    gaps = torch.full((rows, width, 2), float("nan"), dtype=x.dtype)[..., 1].copy_(x)
    wide = torch.full((rows, width + 3), float("nan"), dtype=x.dtype)[:, 3:].copy_(x)
    return {"odd": odd, "transposed": x.t().contiguous().t(), "gaps": gaps, "wide": wide}


@pytest.mark.parametrize("dtype", FLOATS)
def test_views_change_nothing(dtype: torch.dtype) -> None:
    hidden, weight, targets = _inputs(21, 16, 35, dtype)
    expected = _gradients(hidden, weight, targets, "triton")
    odd_targets = torch.stack([targets, targets], 1).flatten()[1:][::2]
    for name, (h, w) in enumerate(zip(_views(hidden).values(), _views(weight).values(), strict=True)):
        leaves = h.requires_grad_(), w.requires_grad_()
        loss = ops.linear_cross_entropy(*leaves, odd_targets, backend="triton")
        for one, other in zip(expected, (loss, *torch.autograd.grad(loss, leaves)), strict=True):
            assert torch.equal(one, other), name


def test_only_the_gradient_that_is_wanted() -> None:
    hidden, weight, targets = _inputs(9, 6, 40)
    _, grad_hidden, grad_weight = _gradients(hidden, weight, targets, "triton")
    for wanted, expected in ((0, grad_hidden), (1, grad_weight)):
        leaves = [hidden.clone(), weight.clone()]
        leaves[wanted].requires_grad_()
        ops.linear_cross_entropy(*leaves, targets, backend="triton").backward()
        assert torch.equal(leaves[wanted].grad, expected)
        assert leaves[1 - wanted].grad is None


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 20), width=st.integers(0, 9), vocabulary=st.integers(1, 70), rows=st.integers(1, 20),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(tokens: int, width: int, vocabulary: int, rows: int, seed: int) -> None:
    hidden, weight, targets = _inputs(tokens, width, vocabulary, seed=seed)
    results = gpu.linear_cross_entropy(hidden, weight, targets, True, rows=rows)
    truth = reference.linear_cross_entropy(hidden.double(), weight.double(), targets, True)
    for mine, true in zip(results, truth, strict=True):
        torch.testing.assert_close(mine, true.float(), rtol=1e-5, atol=1e-6)


@given(
    dtype=st.sampled_from(FLOATS), architecture=st.sampled_from(ARCHITECTURES), gradients=st.booleans(),
    count=st.integers(1, 2**40),
)  # fmt: skip
def test_what_launchers_choose_is_compiled(dtype: torch.dtype, architecture: int, gradients: bool, count: int) -> None:
    assert gpu.rows_variant(dtype, gradients, architecture) in gpu.ROWS.variants[architecture]
    assert gpu.scale_variant(dtype, count, architecture) in gpu.SCALE.variants[architecture]


@given(tokens=st.integers(0, 2**40))
def test_chunks_are_even_and_aligned(tokens: int) -> None:
    rows = gpu.chunk_rows(tokens)
    assert rows % gpu.VECTOR == 0
    assert 0 < rows <= 4096
    chunks = max(1, -(-tokens // rows))
    assert chunks == 1 or rows >= 1024 + gpu.VECTOR  # two chunks of a little more than 2,048 rows together
    assert chunks * rows - tokens < chunks * gpu.VECTOR or tokens == 0


class _Allocations(TorchDispatchMode):
    """The largest tensor that any operation made, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_logits_never_exist_as_a_whole(dtype: torch.dtype) -> None:
    tokens, width, vocabulary, rows = 96, 4, 515, 8
    hidden, weight, targets = _inputs(tokens, width, vocabulary, dtype)
    with _Allocations() as plain:
        F.cross_entropy((hidden @ weight.t()).float(), targets)
    with _Allocations() as fused:
        gpu.linear_cross_entropy(hidden, weight, targets, True, rows=rows)
    assert plain.largest == tokens * vocabulary * 4
    assert fused.largest == rows * 520 * 4  # a chunk's fp32 logits, rows padded to multiples of 8


@pytest.mark.parametrize("tokens", [8192, 32768, 65536])
def test_memory_is_under_a_quarter_of_the_unfused(tokens: int) -> None:
    """GPT-XL's head in bf16, by arithmetic: a bf16 and two fp32 copies of all logits against what this op allocates."""
    width, vocabulary = 1280, 16384
    unfused = tokens * vocabulary * (2 + 4 + 4)
    chunk = gpu.chunk_rows(tokens) * vocabulary * (4 + 2)
    assert chunk + 4 * (tokens + vocabulary) * width < unfused / 4
