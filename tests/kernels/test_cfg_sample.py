"""Guidance and filters against LlamaGen's own numbers, the tie rules, and the draw's distribution.

What is small enough runs in both runs: on the reference, and on the Triton kernels under their interpreter.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from retinar.kernels import ops
from retinar.kernels.launch import triton_missing

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "golden" / "sampling_expected.safetensors")
TIED_ROW = 1


def _filter(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    images = len(logits)
    return ops.filter_logits(
        logits,
        torch.full((images,), temperature),
        torch.full((images,), top_k, dtype=torch.int32),
        torch.full((images,), top_p),
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.both_runs if name.endswith("t0.7") else [])
        for name in sorted(GOLDEN)
        if name.startswith("probs.")
    ],
)
def test_golden_filters(name: str) -> None:
    match = re.fullmatch(r"probs\.k(\d+)\.p([\d.]+)\.t([\d.]+)", name)
    assert match
    top_k, top_p, temperature = int(match[1]), float(match[2]), float(match[3])
    actual, expected = _filter(GOLDEN["logits"], temperature, top_k, top_p).softmax(-1), GOLDEN[name]
    if top_p < 1:  # upstream's unstable sort takes arbitrary members among the ties: as many, not the same
        actual[TIED_ROW], expected[TIED_ROW] = actual[TIED_ROW].sort().values, expected[TIED_ROW].sort().values
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(actual == 0, expected == 0)


@pytest.mark.both_runs
def test_golden_guidance() -> None:
    mixed = ops.cfg_mix(GOLDEN["cond"], GOLDEN["uncond"], 2.5)
    torch.testing.assert_close(mixed, GOLDEN["mixed.cfg2.5"], atol=1e-6, rtol=1e-6)


@pytest.mark.both_runs
def test_top_k_keeps_ties_of_the_kth() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0]])
    assert torch.isfinite(_filter(logits, top_k=2)).tolist() == [[False, True, True, True, False, True]]
    assert torch.isfinite(_filter(logits, top_k=1)).tolist() == [[False, True, False, False, False, False]]
    for off in (0, 6, 600):
        assert torch.equal(_filter(logits, top_k=off), logits)


@pytest.mark.both_runs
def test_top_p_takes_ties_by_code() -> None:
    """Four equal logits of probability 1/4: p = 0.3 keeps codes 0 and 1 (the sum before code 2 is 0.5)."""
    assert torch.isfinite(_filter(torch.zeros(1, 4), top_p=0.3)).tolist() == [[True, True, False, False]]
    assert torch.isfinite(_filter(torch.tensor([[0.0, 9.0, 9.0, 9.0]]), top_p=0.5)).tolist() == [
        [False, True, True, False]
    ]
    assert torch.isfinite(_filter(torch.zeros(1, 4), top_p=0.0)).tolist() == [[True, False, False, False]]


@pytest.mark.both_runs
def test_temperature_zero_is_greedy() -> None:
    logits = torch.tensor([[1.0, 1.001, 0.0]])
    sampled = _sample(logits.repeat(30, 1), temperature=0.0, index=torch.arange(30))
    assert sampled.tolist() == [1] * 30


def _sample(
    logits: Tensor,
    *,
    null: Tensor | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 3,
    index: Tensor,
) -> Tensor:
    images = len(logits)
    rows = torch.arange(images, dtype=torch.int32)
    return ops.cfg_sample(
        logits if null is None else torch.cat([logits, null]),
        rows,
        torch.full_like(rows, -1) if null is None else rows + images,
        torch.full((images,), scale),
        torch.full((images,), temperature),
        torch.full((images,), top_k, dtype=torch.int32),
        torch.full((images,), top_p),
        torch.full((images,), seed, dtype=torch.int64),
        index,
        torch.full((images,), 5, dtype=torch.int32),
    )


@pytest.mark.parametrize(("top_k", "top_p", "draws"), [(0, 1.0, 200_000), (5, 1.0, 40_000), (0, 0.8, 40_000)])
def test_draws_follow_the_filtered_distribution(top_k: int, top_p: float, draws: int) -> None:
    """Chi-square, guided; its 1 - 1e-6 quantile is below 60 for up to 15 degrees of freedom. An image is a draw."""
    vocabulary = 16
    generator = torch.Generator().manual_seed(0)
    cond, null = torch.randn(2, 1, vocabulary, generator=generator)
    expected = _filter(ops.cfg_mix(cond, null, 1.7), 0.9, top_k, top_p).softmax(-1)[0].double() * draws
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    for start in range(0, draws, 20_000):
        codes = _sample(
            cond.expand(20_000, -1),
            null=null.expand(20_000, -1),
            scale=1.7,
            temperature=0.9,
            top_k=top_k,
            top_p=top_p,
            index=torch.arange(start, start + 20_000),
        )
        counts += torch.bincount(codes, minlength=vocabulary)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum().item() < 60


DRAWS, CHUNK, CODES = 1_000_000, 50_000, 12


@pytest.fixture(scope="module")
def noise() -> Tensor:
    """Of a million draws, made once: `cfg_sample`'s code is the argmax of what the filters leave plus it."""
    seed, position = torch.full((CHUNK,), 3), torch.full((CHUNK,), 5, dtype=torch.int32)
    starts = range(0, DRAWS, CHUNK)
    return torch.cat([ops.gumbel_noise(seed, torch.arange(start, start + CHUNK), position, CODES) for start in starts])


@pytest.mark.parametrize("scale", [1.0, 2.5, 4.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.8), (7, 0.9)])
def test_a_million_draws(scale: float, top_k: int, top_p: float, noise: Tensor) -> None:
    """Chi-square, as above, of a million draws, of which the op itself makes two thousand and agrees."""
    null, towards = torch.randn(2, 1, CODES, generator=torch.Generator().manual_seed(1)) / 4
    cond = null + towards
    filtered = _filter(ops.cfg_mix(cond, null, scale), 0.9, top_k, top_p)
    codes = (filtered + noise).argmax(-1)
    some = torch.arange(0, DRAWS, 500)
    rows = cond.expand(len(some), -1), null.expand(len(some), -1)
    drawn = _sample(rows[0], null=rows[1], scale=scale, temperature=0.9, top_k=top_k, top_p=top_p, index=some)
    assert torch.equal(drawn, codes[some])
    expected = filtered.softmax(-1)[0].double() * DRAWS
    counts = torch.bincount(codes, minlength=CODES).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert kept.sum() > 2
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum().item() < 60


@pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing()))
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_compiler_contracts_no_guidance(architecture: int) -> None:
    """Rounded once instead of twice, the mix would make other ties than the reference: the only multiply-adds in the
    code of cfg_mix add 0, there is no plain product, and the assembler keeps both."""
    import triton

    from retinar.kernels import aot
    from retinar.kernels.cfg_sample import gpu

    for variant in aot.ordered(gpu.MIX, architecture):
        ast, target, options = aot.source(gpu.MIX, variant)
        ptx = triton.compile(ast, target=target, options=options).asm["ptx"]
        fused = re.findall(r"fma\.rn\.f32.*, (\S+);", ptx)
        assert fused
        assert set(fused) == {"0f00000000"}
        assert "mul.f32" not in ptx
        assert "mul.rn.f32" not in ptx


LOGITS = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 0.5001, 2.0, 4.0]), min_size=1, max_size=40)


@given(
    values=LOGITS,
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
)
@settings(max_examples=100, deadline=None)
def test_filter_properties(values: list[float], temperature: float, top_k: int, top_p: float) -> None:
    """Kept logits are only scaled; what is kept is the top of the order by (logit, code), the maximum always."""
    logits = torch.tensor([values])
    filtered = _filter(logits, temperature, top_k, top_p)[0]
    kept = torch.isfinite(filtered)
    assert torch.equal(filtered[kept], (logits[0] / temperature)[kept])
    assert kept[logits[0].argmax()]
    order = logits[0].argsort(descending=True, stable=True)
    assert torch.equal(kept[order], kept[order].sort(descending=True).values)
    if top_p == 1 and 0 < top_k < len(values):
        assert kept.sum() >= top_k
        assert torch.equal(kept, logits[0] >= logits[0].topk(top_k).values[-1])
    if top_p == 1 and (top_k == 0 or top_k >= len(values)):
        assert kept.all()


@given(data=st.data(), images=st.integers(1, 6), vocabulary=st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_an_image_does_not_depend_on_the_others(data: st.DataObject, images: int, vocabulary: int) -> None:
    """Any subset of the images, in any order, with rows anywhere, draws the same codes."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    rows = torch.randperm(2 * images, generator=generator).int()
    logits = torch.randn(2 * images, vocabulary, generator=generator) * 3
    parameters = [
        rows[:images],
        torch.where(torch.rand(images, generator=generator) < 0.3, -1, rows[images:]).int(),
        torch.rand(images, generator=generator) * 4,
        torch.rand(images, generator=generator) + 0.5,
        torch.randint(0, vocabulary + 1, (images,), generator=generator, dtype=torch.int32),
        1 - torch.rand(images, generator=generator).round(decimals=1) * 0.5,
        torch.randint(-(2**62), 2**62, (images,), generator=generator),
        torch.randint(0, 2**20, (images,), generator=generator),
        torch.randint(0, 1024, (images,), generator=generator, dtype=torch.int32),
    ]
    together = ops.cfg_sample(logits, *parameters)
    subset = torch.tensor(data.draw(st.permutations(range(images))))[: data.draw(st.integers(1, images))]
    assert torch.equal(ops.cfg_sample(logits, *(p[subset] for p in parameters)), together[subset])
    for image in subset.tolist():
        pair = torch.stack([logits[rows[image].item()], logits[max(0, parameters[1][image].item())]])
        alone = [p[image : image + 1] for p in parameters]
        alone[0] = torch.zeros(1, dtype=torch.int32)
        alone[1] = torch.where(alone[1] >= 0, 1, -1).int()
        assert ops.cfg_sample(pair, *alone).item() == together[image].item()


@pytest.mark.both_runs
def test_lowest_code_wins_a_tie() -> None:
    """Equal noise cannot be forced; a vocabulary of one, and infinite logits, can."""
    logits = torch.full((1, 9), -torch.inf)
    logits[0, [3, 7]] = torch.inf
    assert _sample(logits, index=torch.tensor([0])).item() == 3


@pytest.mark.both_runs
def test_wrong_arguments_are_named() -> None:
    logits, index = torch.zeros(2, 8), torch.arange(2)
    with pytest.raises(ValueError, match=r"expected fp32 logits \[rows, V >= 1\], found torch.bfloat16"):
        _sample(logits.bfloat16(), index=index)
    with pytest.raises(ValueError, match=r"expected index as torch.int64 .* 2 images, found torch.int32"):
        _sample(logits, index=index.int())
    with pytest.raises(ValueError, match=r"expected temperature .* found torch.float32 \(3,\)"):
        ops.filter_logits(logits, torch.ones(3), torch.zeros(2, dtype=torch.int32), torch.ones(2))
    with pytest.raises(ValueError, match="one shape and dtype"):
        ops.cfg_mix(torch.zeros(2, 8), torch.zeros(2, 7), 1.0)
