"""What the ops promise besides numbers: errors in words, dropout that can be made again, autocast, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retinar.kernels import ops
from retinar.kernels.linear_cross_entropy import reference as loss_reference


def _attention(batch: int = 2, heads: int = 4, positions: int = 13, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, batch, heads, positions, dim, generator=generator).unbind())


ROPE = ops.rope_table(4, 4, 8)
both_runs = pytest.mark.both_runs


@both_runs
def test_attention_dropout_is_the_documented_mask() -> None:
    """With v the identity the output is the dropped probabilities: zeros where Philox says, the rest scaled."""
    p, seed, batch, heads, positions, threshold = 0.3, 2**63 + 5, 1, 2, 20, 77  # 0.3 is 77 / 256, nearly
    q, k, _ = _attention(batch, heads, positions, dim=positions)
    v, rope = torch.eye(positions).expand(batch, heads, -1, -1), ops.rope_table(5, 4, positions)
    plain = ops.rope_attention(q, k, v, rope)
    dropped = ops.rope_attention(q, k, v, rope, dropout_p=p, seed=seed)
    for b, h, query, key in torch.cartesian_prod(*map(torch.arange, (batch, heads, positions, positions))).tolist():
        counter = tuple(torch.tensor([c]) for c in (key // 16, query, b * heads + h, ops.DOMAIN_ATTENTION))
        word = int(ops.philox4x32(counter, seed)[key % 16 // 4])
        kept = (word >> 8 * (key % 4)) % 256 >= threshold
        expected = plain[b, h, query, key] * 256 / (256 - threshold) if kept else torch.tensor(0.0)
        torch.testing.assert_close(dropped[b, h, query, key], expected)


def test_attention_dropout_is_made_again_in_the_backward() -> None:
    q, k, v = (t.double() for t in _attention(1, 2, 6))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: ops.rope_attention(q, k, v, ROPE, dropout_p=0.4, seed=9), leaves, fast_mode=True
    )
    one = ops.rope_attention(q, k, v, ROPE, dropout_p=0.4, seed=9)
    assert torch.equal(one, ops.rope_attention(q, k, v, ROPE, dropout_p=0.4, seed=torch.tensor(9)))
    assert not torch.equal(one, ops.rope_attention(q, k, v, ROPE, dropout_p=0.4, seed=10))


@both_runs
def test_attention_takes_a_seed_out_of_a_vector() -> None:
    """As training draws them, one for each layer: the second is not aligned as kernels want their pointers."""
    q, k, v = _attention(1, 2, 6)
    seeds = torch.tensor([3, 2**62 + 9, -5])
    for seed in seeds.unbind():
        one = ops.rope_attention(q, k, v, ROPE, dropout_p=0.5, seed=seed)
        assert torch.equal(one, ops.rope_attention(q, k, v, ROPE, dropout_p=0.5, seed=seed.clone()))


@pytest.mark.parametrize("chunk", [1 << 22, 300, 1])
def test_loss_chunks_change_nothing_but_rounding(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_reference, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(31, 12, generator=generator, requires_grad=True)
    weight = torch.randn(50, 12, generator=generator, requires_grad=True)
    targets = torch.randint(50, (31,), generator=generator)
    targets[5] = -100
    loss = ops.linear_cross_entropy(hidden, weight, targets)
    expected = F.cross_entropy(hidden @ weight.t(), targets)
    torch.testing.assert_close(loss, expected)
    for actual, wanted in zip(
        torch.autograd.grad(3 * loss, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


@both_runs
def test_loss_without_targets_is_nan_as_in_torch() -> None:
    assert ops.linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.full((2,), -100)).isnan()


@both_runs
def test_scaled_half_precision_losses_keep_small_gradients() -> None:
    """Gradients below fp16's range before the loss scale is applied must survive."""
    hidden = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    weight = torch.zeros(16, 8, dtype=torch.float16)
    weight[0] = 2e-6
    (2.0**16 * ops.linear_cross_entropy(hidden, weight, torch.zeros(64, dtype=torch.int64))).backward()
    assert hidden.grad is not None
    assert (hidden.grad != 0).any(-1).all()


def test_equal_codes_take_the_lowest() -> None:
    """Every vector sits on its code, every code occurs three times, at unrelated places of the codebook."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(211, 8, generator=generator)
    copies = torch.cat([distinct, distinct[torch.randperm(211, generator=generator)], distinct])
    z = torch.randn(500, 8, generator=generator)
    codes, quantized = ops.vq_lookup(z, copies)
    assert codes.max() < 211
    assert torch.equal(codes, ops.vq_lookup(z, distinct)[0])
    torch.testing.assert_close(quantized, F.normalize(copies, dim=-1)[codes])


@both_runs
def test_empty_batches_have_results() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert ops.linear(torch.zeros(0, 5), torch.zeros(3, 5)).shape == (0, 3)
    assert ops.rms_norm(torch.zeros(0, 5), torch.ones(5)).shape == (0, 5)
    assert ops.swiglu(torch.zeros(0, 6)).shape == (0, 3)
    assert ops.vq_lookup(torch.zeros(0, 6), torch.ones(4, 6))[0].shape == (0,)
    assert ops.gumbel_noise(none, none, none, 5).shape == (0, 5)


@both_runs
def test_autocast_changes_no_op() -> None:
    """Inside autocast the ops keep their own dtypes, forward and backward, also on mixed ones."""
    q, k, v = (t.bfloat16().requires_grad_() for t in _attention())
    x, weight = torch.randn(5, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    hidden, output = (
        torch.randn(6, 16, dtype=torch.bfloat16, requires_grad=True),
        torch.randn(32, 16, requires_grad=True),
    )
    targets = torch.arange(6)

    def run() -> list[Tensor]:
        return [
            ops.rms_norm(x, weight),
            ops.rms_norm(x.bfloat16(), weight),
            ops.swiglu(x),
            ops.rope_attention(q, k, v, ROPE),
            ops.linear_cross_entropy(hidden, output, targets),
        ]

    outside = run()
    with torch.autocast("cpu", torch.bfloat16):
        inside = run()
    assert [t.dtype for t in inside] == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    leaves = (x, weight, q, k, v, hidden, output)
    for one, other in zip(outside, inside, strict=True):
        assert torch.equal(one, other)
        for g, h in zip(
            torch.autograd.grad(one.float().sum(), leaves, allow_unused=True),
            torch.autograd.grad(other.float().sum(), leaves, allow_unused=True),
            strict=True,
        ):
            assert (g is None and h is None) or torch.equal(g, h)


@both_runs
def test_no_graph_breaks_under_compile() -> None:
    """The whole of a block's ops in one graph, forward and backward, with the eager results."""

    def block(x: Tensor, weight: Tensor, output: Tensor) -> Tensor:
        h, residual = ops.add_rms_norm(x, x, weight)
        qkv = h.view(2, 13, 4, 8).transpose(1, 2)
        o = ops.rope_attention(qkv, qkv, qkv, ROPE, dropout_p=0.1, seed=1) + ops.rope_attention(
            qkv, qkv, qkv, ROPE, backend="sdpa"
        )
        o = ops.swiglu(torch.cat([o.transpose(1, 2).reshape(2, 13, 32), residual], -1))
        hidden = ops.rms_norm(o, weight).flatten(0, 1)
        return ops.linear_cross_entropy(hidden, output, torch.arange(26))

    leaves = [torch.randn(s, requires_grad=True) for s in ((2, 13, 32), (32,), (40, 32))]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected, actual = block(*leaves), compiled(*leaves)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other)


X, W = torch.zeros(2, 3, 8), torch.ones(8)
W8 = torch.ones(4, 8)
Q = torch.zeros(1, 4, 5, 8)
INT = torch.zeros(2, dtype=torch.int32)
CACHE = torch.zeros(3, 4, 2, 8)


def _paged(**changed: Any) -> Tensor:
    q, kv = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8)
    arguments = {
        "q": q,
        "k": kv,
        "v": kv,
        "kc": CACHE,
        "vc": CACHE,
        "table": INT[:, None],
        "positions": INT,
        "rope": ROPE,
    }
    return ops.paged_attention(*{**arguments, **changed}.values())


WRONG = {
    "norm weight": (lambda: ops.rms_norm(X, torch.ones(7)), r"expected x \[\.\.\., D\] and weight \[D\].*\(7,\)"),
    "norm integers": (lambda: ops.rms_norm(X.int(), W), "expected floating point tensors, found torch.int32"),
    "residual": (lambda: ops.add_rms_norm(X, X[:1], W), "x and residual of one shape and dtype"),
    "odd packed": (lambda: ops.swiglu(torch.zeros(3, 7)), "expected an even packed width .* found 7"),
    "gate and up": (lambda: ops.swiglu(X, X.half()), "gate and up of one shape and dtype"),
    "head groups": (lambda: ops.rope_attention(Q, Q[:, :3], Q[:, :3], ROPE), "head count that divides q's"),
    "attention dtype": (lambda: ops.rope_attention(Q, Q.half(), Q, ROPE), "one floating dtype"),
    "short rope": (lambda: ops.rope_attention(Q, Q, Q, ROPE[:4]), r"rope table \[>= 5, 4, 2\]"),
    "dropout 1": (lambda: ops.rope_attention(Q, Q, Q, ROPE, dropout_p=1.0, seed=1), r"dropout_p in \[0, 1\)"),
    "no seed": (lambda: ops.rope_attention(Q, Q, Q, ROPE, dropout_p=0.1), "dropout needs a seed"),
    "sdpa dropout": (
        lambda: ops.rope_attention(Q, Q, Q, ROPE, dropout_p=0.1, seed=1, backend="sdpa"),
        "backend 'sdpa' cannot run this call: its dropout mask",
    ),
    "seed range": (lambda: ops.rope_attention(Q, Q, Q, ROPE, dropout_p=0.1, seed=-1), "seed from 0 to"),
    "head dim": (lambda: ops.rope_table(2, 2, 6), "multiple of 4, found 6"),
    "cache shape": (lambda: _paged(kc=CACHE[..., :4]), r"k_cache \[pages, slots, 2, 8\]"),
    "cache dtype": (lambda: _paged(vc=CACHE.half()), "v_cache contiguous in torch.float32, found torch.float16"),
    "table": (lambda: _paged(table=INT[:, None].long()), r"int32 block table \[2, M\], found torch.int64"),
    "positions": (lambda: _paged(positions=INT[:1]), r"int32 positions \[2\]"),
    "paged gradient": (lambda: _paged(q=torch.zeros(2, 4, 8, requires_grad=True)), "has no gradient"),
    "linear gradient": (lambda: ops.linear(X.clone().requires_grad_(), torch.ones(4, 8)), "has no gradient"),
    "linear shape": (lambda: ops.linear(X, torch.ones(8, 4)), r"x \[\.\.\., K\] and weight \[N, K\]"),
    "linear dtype": (lambda: ops.linear(X, W8.half()), "one floating dtype, found torch.float32, torch.float16; cast"),
    "linear norm": (lambda: ops.linear(X, W8, norm_K=W[:7]), r"expected a norm \[8\], found \(7,\)"),
    "linear norm dtype": (lambda: ops.linear(X, W8, norm_K=W.double()), "norm and residual of one floating dtype"),
    "linear residual": (
        lambda: ops.linear(X, W8, residual_XN=torch.zeros(3, 4)),
        r"expected a residual \(2, 3, 4\), found \(3, 4\)",
    ),
    "linear norm gradient": (lambda: ops.linear(X, W8, norm_K=W.clone().requires_grad_()), "has no gradient"),
    "gate and wide": (lambda: ops.linear(X, W8, gate=True, wide=True), "at most one of gate, residual and wide"),
    "gate and residual": (
        lambda: ops.linear(X, W8, gate=True, residual_XN=torch.zeros(2, 3, 4)),
        "at most one of gate, residual and wide, found several",
    ),
    "odd gate": (lambda: ops.linear(X, torch.ones(5, 8), gate=True), r"even number of outputs .*, found 5"),
    "loss targets": (lambda: ops.linear_cross_entropy(X[0], torch.ones(4, 8), INT), r"int64 targets \[3\]"),
    "codebook": (lambda: ops.vq_lookup(X[0], torch.ones(0, 8)), r"codebook \[K >= 1, C\]"),
    "noise": (lambda: ops.gumbel_noise(INT, INT, INT, 8), "expected int64 seeds"),
    "philox": (lambda: ops.philox4x32((INT, INT, INT, INT), 0), "four int64 counters"),
    "op name": (lambda: ops.backends("softmax"), "unknown op 'softmax'; the ops are .*rms_norm"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_are_refused_in_one_sentence(case: str) -> None:
    call, sentence = WRONG[case]
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_second_derivative_is_refused_not_zero() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.swiglu(x).sum(), x)
    assert gradient.abs().sum() > 0
    with pytest.raises(RuntimeError, match="swiglu_packed can be differentiated once"):
        torch.autograd.grad(ops.swiglu(x).sum(), x, create_graph=True)
