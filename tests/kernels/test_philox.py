"""The random numbers: Random123's known answers, and the noise against its formula in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retinar.kernels import ops

WORD = st.integers(0, 2**32 - 1)


def _words(counter: tuple[int, int, int, int], key: int) -> list[int]:
    tensors = tuple(torch.tensor([word], dtype=torch.int64) for word in counter)
    return [int(word) for word in ops.philox4x32(tensors, key)]


def philox_by_hand(counter: tuple[int, int, int, int], key: int) -> list[int]:
    """Philox4x32-10 in Python's integers, from the paper's figure."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def test_known_answers() -> None:
    ones = 0xFFFFFFFF
    assert _words((0, 0, 0, 0), 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert _words((ones, ones, ones, ones), 2**64 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert _words(pi, 0x299F31D0A4093822) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_any_counter_and_key(counter: tuple[int, int, int, int], key: int) -> None:
    assert _words(counter, key) == philox_by_hand(counter, key)


@given(seed=st.integers(0, 2**64 - 1), index=st.integers(0, 2**33), position=st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
def test_noise_is_the_formula(seed: int, index: int, position: int) -> None:
    """Within 2 ulp of -log(-log1p(-x)) in fp64, from words made by hand; V is odd."""
    vocabulary = 37
    words = [philox_by_hand((c // 4, position, index & 0xFFFFFFFF, 0), seed)[c % 4] for c in range(vocabulary)]
    rounded = (np.array(words, dtype=np.uint32).astype(np.float32) + np.float32(0.5)) * np.float32(2**-32)
    exact = -np.log(-np.log1p(-np.minimum(rounded, np.float32(1 - 2**-24)).astype(np.float64)))
    signed = seed - 2**64 if seed >> 63 else seed
    noise = ops.gumbel_noise(
        torch.tensor([signed]), torch.tensor([index]), torch.tensor([position], dtype=torch.int32), vocabulary
    )
    # An ulp of the inner logarithm is an absolute 2^-24 in the noise, whatever the noise's own size.
    ulp = np.maximum(np.spacing(np.abs(exact).astype(np.float32)), np.float32(2**-24))
    assert np.all(np.abs(noise[0].double().numpy() - exact) <= 2 * ulp)


def test_noise_at_the_ends_of_the_range() -> None:
    """The smallest x gives the largest noise, the largest x a finite one."""
    from retinar.kernels.philox.reference import uniform

    x = uniform(torch.tensor([0, 1, 2**32 - 1]))
    assert x.tolist() == [2.0**-33, 1.5 * 2.0**-32, 1 - 2.0**-24]
    noise = -torch.log(-torch.log1p(-x))
    assert torch.isfinite(noise).all()
    assert noise[0].item() == pytest.approx(33 * np.log(2), rel=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 3, 257, 2049, 16384])
def test_noise_of_an_image_does_not_depend_on_the_batch(vocabulary: int) -> None:
    seed, index = torch.arange(8) * 31 - 5, torch.arange(8) * 1000
    position = torch.arange(8, dtype=torch.int32) * 77
    alone = torch.cat(
        [ops.gumbel_noise(seed[i : i + 1], index[i : i + 1], position[i : i + 1], vocabulary) for i in range(8)]
    )
    for images in (2, 3, 5, 8):
        assert torch.equal(
            ops.gumbel_noise(seed[:images], index[:images], position[:images], vocabulary), alone[:images]
        )


def test_domains_and_counters_differ() -> None:
    one = torch.ones(1, dtype=torch.int64)
    base = ops.gumbel_noise(one, one, one, 64)
    for other in (
        ops.gumbel_noise(one + 1, one, one, 64),
        ops.gumbel_noise(one, one + 1, one, 64),
        ops.gumbel_noise(one, one, one + 1, 64),
        ops.gumbel_noise(one, one, one, 64, ops.DOMAIN_ATTENTION),
    ):
        assert not torch.equal(base, other)


def test_the_distribution_is_gumbel() -> None:
    """Mean and variance over 2^18 draws: Euler's constant and pi^2 / 6, within four standard errors."""
    seed = torch.arange(16)
    noise = ops.gumbel_noise(seed, seed, seed.int(), 16384).double().flatten()
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=4 * 1.2825 / 512)
    assert noise.var().item() == pytest.approx(np.pi**2 / 6, abs=4 * 3.45 / 512)
