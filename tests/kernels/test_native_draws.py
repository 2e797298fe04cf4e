"""The compiled decoder's random numbers, and the codes that it draws from its own logits, on every instruction set."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retinar.kernels import ops
from retinar.kernels.decode_step.spec import make_weights
from retinar.kernels.native import native_module

NATIVE, MISSING = native_module()
pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(MISSING))
ISAS = NATIVE.isas() if NATIVE else ["none"]  # "none": so that the reason above is said

every_isa = pytest.mark.parametrize("isa", ISAS)

WORD = st.integers(0, 2**32 - 1)
ONES = 0xFFFFFFFF


@pytest.fixture(scope="module")
def native() -> ModuleType:
    assert NATIVE is not None
    return NATIVE


def test_other_instruction_sets_draw_nothing(native: ModuleType) -> None:
    for isa in {"portable", "avx2", "avx512", "avx512_bf16", "avx1024"} - set(ISAS):
        with pytest.raises(ValueError, match=isa):
            native.philox([0, 0, 0, 0], 0, isa)
        with pytest.raises(ValueError, match=isa):
            native.gumbel_noise(0, 0, 0, torch.zeros(1), isa)


@every_isa
def test_known_answers(isa: str, native: ModuleType) -> None:
    """Random123's."""
    assert native.philox([0] * 4, 0, isa) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert native.philox([ONES] * 4, 2**64 - 1, isa) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert native.philox(pi, 0x299F31D0A4093822, isa) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@every_isa
@given(counter=st.tuples(WORD, WORD, WORD, WORD), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_counter_and_key(isa: str, native: ModuleType, counter: tuple[int, ...], seed: int) -> None:
    tensors = [torch.tensor([word]) for word in counter]
    words = ops.philox4x32((tensors[0], tensors[1], tensors[2], tensors[3]), seed)
    assert native.philox(list(counter), seed, isa) == [int(word) for word in words]


def _noise(native: ModuleType, seed: int, index: int, position: int, vocabulary: int, isa: str) -> Tensor:
    out = torch.full((vocabulary + 1,), float("nan"))
    native.gumbel_noise(seed, index, position, out[:vocabulary], isa)
    assert out[vocabulary].isnan()
    return out[:vocabulary]


def _ulps(one: Tensor, other: Tensor) -> float:
    """The largest difference; an ulp of the inner logarithm is an absolute 2^-24, whatever the noise's own size."""
    ulp = np.maximum(np.spacing(np.abs(other.float().numpy())), np.float32(2**-24))
    return float(((one.double() - other.double()).abs().numpy() / ulp).max())


@every_isa
@given(seed=st.integers(0, 2**64 - 1), index=WORD, position=st.integers(0, 2**31 - 1), vocabulary=st.integers(1, 300))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_noise_is_the_reference_s(
    isa: str, native: ModuleType, seed: int, index: int, position: int, vocabulary: int
) -> None:
    """Within 2 ulp, and to the bit that of other vocabularies and instruction sets."""
    noise = _noise(native, seed, index, position, vocabulary, isa)
    signed = torch.tensor([seed - 2**64 if seed >> 63 else seed])
    reference = ops.gumbel_noise(signed, torch.tensor([index]), torch.tensor([position], dtype=torch.int32), vocabulary)
    assert _ulps(noise, reference[0]) <= 2
    assert torch.equal(noise, _noise(native, seed, index, position, 300, isa)[:vocabulary])
    assert torch.equal(noise, _noise(native, seed, index, position, vocabulary, "portable"))


@every_isa
def test_a_million_noises(isa: str, native: ModuleType) -> None:
    """Within 2 ulp of the formula in fp64; the largest and the smallest are far out; mean and variance are Gumbel's."""
    count = 1_000_000
    noise = _noise(native, 11, 7, 5, count, isa)
    quads = torch.arange(count // 4)
    five, seven, zero = (torch.tensor([x]) for x in (5, 7, 0))
    words = torch.stack(ops.philox4x32((quads, five, seven, zero), 11), -1).flatten()
    x = ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).double()
    assert _ulps(noise, -torch.log(-torch.log1p(-x))) <= 2
    assert noise.max() > 12 and noise.min() < -2.5
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=4 * 1.2825 / 1000)
    assert noise.var().item() == pytest.approx(np.pi**2 / 6, abs=4 * 3.45 / 1000)


ROWS = 6


class Drawer:
    """A model whose codes come in ties: some rows of its output weight are equal, so their logits are."""

    def __init__(self, vocabulary: int) -> None:
        case = {"layers": 1, "heads": 2, "groups": 1, "dim": 8, "hidden": 11, "vocabulary": vocabulary}
        self.case = case
        generator = torch.Generator().manual_seed(vocabulary)
        weights = make_weights(case, torch.float32, generator)
        tied = torch.randint(max(1, vocabulary // 2), (vocabulary,), generator=generator)
        self.weights = weights._replace(output_VD=weights.output_VD[tied] * 2)

    def draw(self, decoder: ops.NativeDecoder, positions: Tensor, images: list[Tensor]) -> tuple[Tensor, Tensor]:
        """``images``: the parameters from ``cond_row`` on. Rows see their own token alone: the past is zeros."""
        rows = len(positions)
        table = torch.arange(rows, dtype=torch.int32)[:, None]
        caches = [torch.zeros(1, rows, 64, 1, 8) for _ in range(2)]
        tokens = torch.arange(rows) % min(3, self.case["vocabulary"])
        return decoder.step(caches[0], caches[1], ops.StepInputs(tokens, positions, table, *images))


@cache
def drawer(vocabulary: int) -> Drawer:
    return Drawer(vocabulary)


@cache
def decoder(vocabulary: int, isa: str, threads: int) -> ops.NativeDecoder:
    return ops.NativeDecoder(drawer(vocabulary).weights, threads=threads, isa=isa)


def assert_codes(codes_I: Tensor, logits_BV: Tensor, positions: Tensor, images: list[Tensor], unclear: float) -> None:
    """The reference's codes of the same logits. ``unclear``: the share of images, at most, whose best two are so near
    that the last bits of a noise decide; those must have drawn one of them."""
    cond, null, scale, temperature, top_k, top_p, seed, index = images
    position = positions[cond.long()]
    wanted = ops.cfg_sample(logits_BV, *images, position, backend="reference")
    unlike = (codes_I != wanted).nonzero()[:, 0]
    if len(unlike) == 0:
        return
    assert len(unlike) <= unclear * len(codes_I)
    guided = torch.where(
        (null >= 0)[:, None],
        ops.cfg_mix(logits_BV[cond.long()], logits_BV[null.clamp(min=0).long()], scale[:, None]),
        logits_BV[cond.long()],
    )
    filtered = ops.filter_logits(guided[unlike], temperature[unlike], top_k[unlike], top_p[unlike])
    value = filtered + ops.gumbel_noise(seed[unlike], index[unlike], position[unlike], logits_BV.shape[1])
    own, best = (value.gather(1, each[unlike, None]) for each in (codes_I, wanted))
    assert ((best - own).abs() <= 8 * torch.finfo(torch.float32).eps * best.abs().clamp(min=1)).all()


def some_images(count: int, vocabulary: int, generator: torch.Generator) -> list[Tensor]:
    """Of any rows, guided or not, with every filter off or on; every seventh is greedy."""

    def drawn(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    image = torch.arange(count)
    return [
        drawn(ROWS).int(),
        torch.where(drawn(3) == 0, -1, drawn(ROWS)).int(),
        torch.rand(count, generator=generator) * 4,
        torch.where(image % 7 == 6, 0.0, 0.3 + torch.rand(count, generator=generator)),
        torch.where(drawn(2) == 0, 0, drawn(vocabulary + 3)).int(),
        torch.where(drawn(2) == 0, 1.0, torch.rand(count, generator=generator)),
        torch.randint(-(2**62), 2**62, (count,), generator=generator),
        drawn(2**31 - 1),
    ]


POSITIONS = torch.tensor([0, 1, 5, 17, 33, 36], dtype=torch.int32)


@every_isa
@pytest.mark.parametrize("vocabulary", [1, 2, 13, 64, 67, 257, 1031])
def test_codes_are_the_reference_s(vocabulary: int, isa: str) -> None:
    """Of the decoder's own logits; ties are there, and every number of threads draws the same."""
    generator = torch.Generator().manual_seed(vocabulary)
    images = some_images(600, vocabulary, generator)
    codes_I, logits_BV = drawer(vocabulary).draw(decoder(vocabulary, isa, 1), POSITIONS, images)
    if vocabulary > 13:
        assert all(len(row.unique()) < vocabulary for row in logits_BV)
    assert_codes(codes_I, logits_BV, POSITIONS, images, unclear=0.002)
    for threads in (2, 3):
        others = drawer(vocabulary).draw(decoder(vocabulary, isa, threads), POSITIONS, images)
        assert torch.equal(others[0], codes_I)
        assert torch.equal(others[1], logits_BV)


@every_isa
@given(data=st.data(), vocabulary=st.sampled_from([5, 67]), images=st.integers(0, 9), threads=st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_parameters(isa: str, data: st.DataObject, vocabulary: int, images: int, threads: int) -> None:
    """And an image's code does not depend on the others."""

    def drawn(values: st.SearchStrategy[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(data.draw(st.lists(values, min_size=images, max_size=images)), dtype=dtype)

    parameters = [
        drawn(st.integers(0, ROWS - 1), torch.int32),
        drawn(st.integers(-1, ROWS - 1), torch.int32),
        drawn(st.sampled_from([0.0, 1.0, 1.5, 7.5]), torch.float32),
        drawn(st.sampled_from([0.0, 0.1, 1.0, 3.0]), torch.float32),
        drawn(st.integers(0, vocabulary + 2), torch.int32),
        drawn(st.sampled_from([0.0, 0.05, 0.37, 0.91, 1.0]), torch.float32),
        drawn(st.integers(-(2**63), 2**63 - 1), torch.int64),
        drawn(st.integers(0, 2**33), torch.int64),
    ]
    run = decoder(vocabulary, isa, threads)
    codes_I, logits_BV = drawer(vocabulary).draw(run, POSITIONS, parameters)
    assert codes_I.shape == (images,)
    assert_codes(codes_I, logits_BV, POSITIONS, parameters, unclear=1.0)
    for image in range(images):
        alone = [each[image : image + 1] for each in parameters]
        assert drawer(vocabulary).draw(run, POSITIONS, alone)[0].item() == codes_I[image].item()


DRAWS = 100_000


@every_isa
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.8), (7, 0.9)])
def test_draws_follow_the_filtered_distribution(top_k: int, top_p: float, isa: str) -> None:
    """Chi-square; its 1 - 1e-6 quantile is below 60 for up to 15 degrees of freedom. An image is a draw."""
    vocabulary = 16
    one = torch.ones(DRAWS)
    images = [(0 * one).int(), one.int(), 1.7 * one, 3.0 * one, (top_k * one).int(), top_p * one]
    images += [torch.full((DRAWS,), 3), torch.arange(DRAWS)]
    codes_I, logits_BV = drawer(vocabulary).draw(decoder(vocabulary, isa, 2), POSITIONS[2:4], images)
    mixed = ops.cfg_mix(logits_BV[:1], logits_BV[1:], 1.7)
    filtered = ops.filter_logits(mixed, *(each[:1] for each in images[3:6]))
    expected = filtered.softmax(-1)[0].double() * DRAWS
    counts = torch.bincount(codes_I, minlength=vocabulary).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert kept.sum() > 2
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum().item() < 60


@every_isa
def test_greedy_is_the_largest_logit(isa: str) -> None:
    """At temperature 0, and among the first k = 1 the noise decides between ties alone."""
    count, vocabulary = ROWS, 67
    images = some_images(count, vocabulary, torch.Generator().manual_seed(1))
    images[0], images[1] = torch.arange(count, dtype=torch.int32), torch.full((count,), -1, dtype=torch.int32)
    images[3], images[4], images[5] = torch.zeros(count), torch.zeros(count, dtype=torch.int32), torch.ones(count)
    codes_I, logits_BV = drawer(vocabulary).draw(decoder(vocabulary, isa, 1), POSITIONS, images)
    assert torch.equal(logits_BV.gather(1, codes_I[:, None])[:, 0], logits_BV.amax(-1))
    images[3], images[4] = torch.ones(count), torch.ones(count, dtype=torch.int32)
    codes_I, logits_BV = drawer(vocabulary).draw(decoder(vocabulary, isa, 1), POSITIONS, images)
    assert torch.equal(logits_BV.gather(1, codes_I[:, None])[:, 0], logits_BV.amax(-1))
