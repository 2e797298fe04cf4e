"""Precision, recall, density and coverage against prdc, a brute force, and cases with known answers."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinar.engine.errors import InputError
from retinar.engine.metrics.discrimination import wilson
from retinar.engine.metrics.grams import Grams
from retinar.engine.metrics.manifold import (
    LEAST,
    NAMES,
    NEAREST,
    manifold_interval,
    manifold_scores,
    manifold_scores_in_blocks,
    manifold_scores_of_grams,
)

prdc = pytest.importorskip("prdc", reason="the package prdc is missing (pip install 'retinar[metrics]')")


def features(n: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, dim)) + shift).astype(np.float32)


def by_definition(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """The papers' sentences, one image at a time."""

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a.astype(float) - b.astype(float)))

    def radii(side: np.ndarray) -> list[float]:
        return [
            sorted(distance(one, other) for j, other in enumerate(side) if j != i)[NEAREST - 1]
            for i, one in enumerate(side)
        ]

    of_real, of_fake = radii(real), radii(fake)
    holds = [[distance(r, f) < radius for f in fake] for r, radius in zip(real, of_real, strict=True)]
    return {
        "precision": float(np.mean([any(row[j] for row in holds) for j in range(len(fake))])),
        "recall": float(np.mean([any(distance(r, f) < of_fake[j] for j, f in enumerate(fake)) for r in real])),
        "density": sum(map(sum, holds)) / (NEAREST * len(fake)),
        "coverage": float(np.mean([any(row) for row in holds])),
    }


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(LEAST, 20),
    m=st.integers(LEAST, 20),
    dim=st.integers(1, 8),
    shift=st.sampled_from([0.0, 0.5, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_definition_the_library_and_the_inner_products(
    n: int, m: int, dim: int, shift: float, seed: int
) -> None:
    real, fake = features(n, dim, seed), features(m, dim, seed + 1, shift)
    found = manifold_scores(real, fake)
    with contextlib.redirect_stdout(io.StringIO()):
        library = prdc.compute_prdc(real, fake, nearest_k=5)
    assert tuple(found) == NAMES and found == {name: float(library[name]) for name in NAMES}
    assert found == pytest.approx(by_definition(real, fake), abs=1e-12)
    assert manifold_scores_of_grams(Grams.of(real, fake)) == pytest.approx(found, abs=1e-12)
    for block in (3, 7, 50):
        assert manifold_scores_in_blocks(real, fake, block) == pytest.approx(found, abs=1e-12)


def test_known_answers(capsys: pytest.CaptureFixture[str]) -> None:
    real = features(60, 12, 0)
    collapsed = real[:1] + features(30, 12, 1) * 1e-3
    found = manifold_scores(real, collapsed)
    assert found["precision"] == 1 and found["recall"] <= 1 / 60 and found["coverage"] < 0.5
    far = manifold_scores(real, real + 100)
    assert far == dict.fromkeys(NAMES, 0.0)
    same = manifold_scores(real, real + features(60, 12, 2) * 1e-3)
    assert same["precision"] == same["recall"] == same["coverage"] == 1 and 0.8 < same["density"] < 1.6
    assert capsys.readouterr().out == ""


def test_no_figure_is_certain_for_want_of_variation() -> None:
    """Nothing inside anything in any half sample: zeros, but the count bounds what they may be."""
    for name, count in (("precision", 50), ("recall", 80), ("coverage", 80)):
        low, high = manifold_interval(name, 0.0, 0.0, 80, 50)
        assert low == 0 and high == pytest.approx(wilson(0, count)[1])
    assert manifold_interval("density", 0.0, 0.0, 80, 50) == (0, pytest.approx(wilson(0, 50)[1] / NEAREST))
    assert manifold_interval("density", 1.2, 0.1, 80, 50) == pytest.approx((1.004, 1.396), abs=1e-3)
    assert manifold_interval("precision", 1.0, 0.0, 80, 50)[1] == 1


@pytest.mark.parametrize(("n", "m"), [(LEAST - 1, 30), (30, LEAST - 1), (0, 0), (1, 1)])
def test_too_few_images_are_refused(n: int, m: int) -> None:
    with pytest.raises(InputError, match=f"at least {LEAST} images.*found {n} and {m}"):
        manifold_scores(features(n, 4, 0), features(m, 4, 1))
