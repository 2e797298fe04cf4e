"""The kernel distance against its definition and clean-fid's own function."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinar.engine.errors import InputError
from retinar.engine.metrics import kid
from retinar.engine.metrics.grams import Grams
from retinar.engine.metrics.kid import kernel_distance, kernel_distance_of_grams


def features(n: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Not negative and mostly small, as Inception's."""
    return np.abs(np.random.default_rng(seed).standard_normal((n, dim)) + shift).astype(np.float32)


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    def mean(a: np.ndarray, b: np.ndarray, same: bool) -> float:
        return float(
            np.mean(
                [
                    (float(np.dot(p.astype(float), q.astype(float))) / len(p) + 1) ** 3
                    for i, p in enumerate(a)
                    for j, q in enumerate(b)
                    if not (same and i == j)
                ]
            )
        )

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 12), m=st.integers(2, 12), dim=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_equals_the_definition_in_blocks_and_from_inner_products(n: int, m: int, dim: int, seed: int) -> None:
    x, y = features(n, dim, seed), features(m, dim, seed + 1, 0.4)
    expected = by_definition(x, y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kid, "BLOCK", 5)
        found = kernel_distance(x, y)
    assert found == pytest.approx(expected, abs=1e-9 * (1 + abs(expected)))
    assert kernel_distance_of_grams(Grams.of(x, y), dim) == pytest.approx(found, abs=1e-9 * (1 + abs(found)))
    assert kernel_distance(y, x) == pytest.approx(found, abs=1e-9 * (1 + abs(found)))


@pytest.fixture(scope="module")
def clean_fid():  # type: ignore[no-untyped-def]
    """clean-fid's function with a random state of its own, by seed."""
    pytest.importorskip("cleanfid", reason="the package clean-fid is missing (pip install 'retinar[metrics]')")
    from retinar.engine.torchvision_shim import import_torchvision

    import_torchvision()
    from cleanfid.fid import kernel_distance as theirs

    def seeded(x: np.ndarray, y: np.ndarray, seed: int) -> float:
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            return theirs(x, y)
        finally:
            np.random.set_state(state)

    return seeded


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_equals_clean_fid_where_its_subsets_are_everything(clean_fid, shift: float) -> None:  # type: ignore[no-untyped-def]
    x, y = features(60, 2048, 1), features(60, 2048, 2, shift)
    assert abs(kernel_distance(x, y) - clean_fid(x, y, 0)) < 2e-6


def test_is_the_mean_of_clean_fid_over_its_seeds_elsewhere(clean_fid) -> None:  # type: ignore[no-untyped-def]
    x, y = features(24, 256, 1), features(60, 256, 2, 0.2)
    drawn = [clean_fid(x, y, seed) for seed in range(24)]
    error = np.std(drawn, ddof=1) / np.sqrt(len(drawn))
    assert error > 0 and abs(kernel_distance(x, y) - np.mean(drawn)) < 4 * error


def test_is_unbiased_at_every_count() -> None:
    """Between samples of one distribution the mean is zero, and half of the figures lie below it."""
    for n in (4, 40):
        found = [kernel_distance(features(n, 16, 2 * seed), features(n, 16, 2 * seed + 1)) for seed in range(200)]
        assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(200) and min(found) < 0


def test_one_image_is_refused() -> None:
    with pytest.raises(InputError, match="at least 2 images"):
        kernel_distance(np.zeros((1, 4)), np.zeros((5, 4)))
