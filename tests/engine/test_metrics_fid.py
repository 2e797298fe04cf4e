"""The Fréchet distance against its definition, closed forms and clean-fid; the floor's samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinar.engine.errors import InputError
from retinar.engine.metrics.fid import frechet_distance
from retinar.engine.metrics.floor import Floor, real_floor


def features(n: int, dim: int, seed: int, decay: float = 1.0) -> np.ndarray:
    """Rows with a covariance whose spectrum falls, as Inception features have."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((dim, dim)) * (np.arange(1, dim + 1) ** -decay)
    return rng.standard_normal((n, dim)) @ mixing.T + rng.standard_normal(dim) * 0.3


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """The formula in fp64, the root by eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2)."""
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * trace)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (300, 20), (20, 300), (24, 25), (20, 7), (2, 2), (2, 300)])
def test_equals_the_definition_above_and_below_the_dimension(n: int, m: int) -> None:
    x, y = features(n, 24, 0), features(m, 24, 1)
    assert frechet_distance(x, y) == pytest.approx(by_definition(x, y), rel=1e-5)


def test_a_shift_costs_its_square_and_a_stretch_its_spread() -> None:
    x = features(50, 32, 3)
    shift = np.linspace(-1, 1, 32)
    assert frechet_distance(x, x + shift) == pytest.approx(shift @ shift, rel=1e-9)
    centred = x - x.mean(0)
    spread = np.trace(np.cov(centred, rowvar=False))
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * spread, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 40), m=st.integers(2, 40), dim=st.integers(1, 24), seed=st.integers(0, 2**16))
def test_is_a_distance_that_knows_no_order_and_no_direction(n: int, m: int, dim: int, seed: int) -> None:
    x, y = features(n, dim, seed), features(m, dim, seed + 1)
    found = frechet_distance(x, y)
    size = np.trace(np.atleast_2d(np.cov(x, rowvar=False))) + np.trace(np.atleast_2d(np.cov(y, rowvar=False)))
    tolerance = 1e-9 * (1 + size)
    assert found >= 0 and frechet_distance(x, x) <= tolerance
    assert frechet_distance(y, x) == pytest.approx(found, abs=tolerance)
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    assert frechet_distance(rng.permutation(x) @ rotation, y @ rotation) == pytest.approx(found, abs=tolerance)


@pytest.mark.parametrize(
    ("n", "m", "dim"), [(40, 60, 96), (200, 150, 96), pytest.param(60, 50, 2048, marks=pytest.mark.slow)]
)
def test_equals_clean_fid_with_singular_covariances_too(n: int, m: int, dim: int) -> None:
    pytest.importorskip("cleanfid", reason="the package clean-fid is missing (pip install 'retinar[metrics]')")
    pytest.importorskip("scipy", reason="the package scipy is missing (pip install 'retinar[metrics]')")
    from retinar.engine.torchvision_shim import import_torchvision

    import_torchvision()
    from cleanfid.fid import fid_from_feats

    x, y = features(n, dim, 5).astype(np.float32), features(m, dim, 6).astype(np.float32)
    expected = fid_from_feats(x.astype(np.float64), y.astype(np.float64))
    assert abs(frechet_distance(x, y) - expected) < 1e-4 * max(1.0, expected)


def test_one_image_is_refused() -> None:
    with pytest.raises(InputError, match="at least 2 images"):
        frechet_distance(np.zeros((1, 4)), np.zeros((5, 4)))


def rows(start: int, count: int) -> np.ndarray:
    """Rows that can be told apart by their number."""
    return np.arange(start, start + count, dtype=np.float64)[:, None].repeat(2, axis=1)


class Spy:
    """A metric that keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[float], list[float]]] = []

    def __call__(self, real: np.ndarray, fake: np.ndarray) -> float:
        self.calls.append((real[:, 0].tolist(), fake[:, 0].tolist()))
        return float(len(self.calls))


def test_floor_without_a_pool_splits_the_real_images_by_class() -> None:
    spy = Spy()
    floor = real_floor([rows(0, 30), rows(100, 9)], [10, 8], metric=spy, source="here")
    assert len(spy.calls) == 10 and len({tuple(fake) for _, fake in spy.calls}) == 10
    for real, fake in spy.calls:
        assert len(set(fake)) == len(fake) == 14  # 10, and 4: half of the 9
        assert sum(row >= 100 for row in fake) == 4
        assert sorted(real + fake) == [*range(30), *range(100, 109)]
    assert floor == Floor(5.5, pytest.approx(np.std(range(10), ddof=1)), 10, 14, 25, "here")


def test_floor_from_a_pool_keeps_the_whole_reference() -> None:
    spy = Spy()
    floor = real_floor([rows(0, 5)], [6], [rows(100, 20)], spy)
    assert all(real == [*range(5)] for real, _ in spy.calls)
    assert all(len(set(fake)) == 6 and min(fake) >= 100 for _, fake in spy.calls)
    assert (floor.draws, floor.n_sample, floor.n_reference) == (10, 6, 5)


def test_floor_of_a_pool_that_is_no_larger_than_the_fakes_is_a_single_figure() -> None:
    spy = Spy()
    floor = real_floor([rows(0, 5)], [50], [rows(100, 20)], spy)
    assert (floor.draws, floor.sd, floor.n_sample) == (1, None, 20)
    assert spy.calls[0][1] == [*range(100, 120)]


def test_floor_depends_on_its_seed_alone() -> None:
    real = [features(60, 16, 0)]
    again = [real_floor(real, [20], seed=seed) for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_floor_falls_with_the_count_and_lies_below_another_distribution() -> None:
    real = [features(400, 24, 0)]
    few, many = real_floor(real, [20]), real_floor(real, [150])
    assert few.mean > many.mean > 0
    assert frechet_distance(real[0], real[0][:150] + 1.0) > many.mean + 10


def test_floor_of_too_few_is_refused() -> None:
    with pytest.raises(InputError, match="floor-from"):
        real_floor([rows(0, 3)], [10])
