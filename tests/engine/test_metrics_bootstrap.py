"""Intervals of all metrics: the draws, the coverage in a small simulation, and what few or many images get."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinar.engine.metrics import bootstrap
from retinar.engine.metrics.bootstrap import deviations, half_sample, interval, share_interval
from retinar.engine.metrics.fid import frechet_distance, frechet_distance_of_grams
from retinar.engine.metrics.grams import Grams
from retinar.engine.metrics.scores import METRICS, check_metrics, floors_of, intervals_of, measure, score_classes

pytest.importorskip("prdc", reason="the package prdc is missing (pip install 'retinar[metrics]')")
DIM = 32


def features(n: int, rng: np.random.Generator, shift: float = 0.0) -> np.ndarray:
    """A falling spectrum; the shift moves and widens."""
    scale = np.arange(1, DIM + 1) ** -0.5
    return (rng.standard_normal((n, DIM)) * scale * (1 + shift / 2) + shift * scale / 2).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_a_draw_is_half_of_every_class_without_repeats(sizes: list[int], seed: int) -> None:
    draw = half_sample(sizes, np.random.default_rng(seed))
    assert len(set(draw.tolist())) == len(draw) and list(draw) == sorted(draw)
    starts = np.cumsum([0, *sizes])
    for start, size in zip(starts, sizes, strict=False):
        of_class = [index for index in draw if start <= index < start + size]
        assert size // 2 <= len(of_class) <= (size + 1) // 2
    assert len(draw) >= bootstrap.smallest_half(sizes)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 50), m=st.integers(2, 50), seed=st.integers(0, 2**16))
def test_fid_from_inner_products_is_fid(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = features(n, rng), features(m, rng, 0.5)
    assert frechet_distance_of_grams(Grams.of(x, y)) == pytest.approx(frechet_distance(x, y), abs=1e-4)


def test_the_deviation_of_a_mean_is_that_of_the_mean() -> None:
    """Half samples without replacement spread as the mean of all does, for even and odd counts."""
    for n in (40, 41):
        values = np.random.default_rng(n).standard_normal(n)
        grams = Grams(np.diag(values), np.eye(6), np.zeros((n, 6)))
        found = deviations(grams, [n], [6], lambda each: {"mean": float(np.trace(each.rr)) / len(each.rr)}, draws=4000)
        assert found["mean"] == pytest.approx(values.std(ddof=1) / np.sqrt(n), rel=0.05)


@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_intervals_cover(shift: float) -> None:
    """Of 120 pairs of samples, the intervals that hold the mean of the figures at these counts."""
    rng, n, m = np.random.default_rng(3), 48, 40
    values, spans = [], []
    for _ in range(120):
        real, fake = features(n, rng), features(m, rng, shift)
        values.append(measure(METRICS, real, fake))
        spans.append(intervals_of(values[-1], [real], [fake], draws=40, seed=len(spans)))
    for name in METRICS:
        found = np.array([each[name] for each in values])
        low, high = np.array([each[name] for each in spans]).T
        assert ((low <= found) & (found <= high)).all()
        assert np.mean((low <= found.mean()) & (found.mean() <= high)) >= 0.87, name
        if name in ("fid", "kid"):  # too wide where both sides are one distribution, never twice as wide
            assert 0.85 < np.mean(high - low) / 3.92 / found.std(ddof=1) < (2.0 if shift == 0 else 1.35), name


def test_the_bias_of_half_samples_is_not_in_the_interval() -> None:
    rng = np.random.default_rng(0)
    real, fake = features(60, rng), features(60, rng)
    value = frechet_distance(real, fake)
    halves = [frechet_distance(real[half_sample([60], rng)], fake[half_sample([60], rng)]) for _ in range(40)]
    low, high = intervals_of({"fid": value}, [real], [fake], draws=100)["fid"]
    assert high < np.mean(halves) and low < value < high
    assert value - low == pytest.approx(high - value)


def test_pairs_are_drawn_together() -> None:
    """A copy that moves every image alike has no chance in it: as pairs its distance hardly varies."""
    rng = np.random.default_rng(1)
    real = features(80, rng)
    copies = [real + 0.5]
    value = measure(["fid"], real, copies[0])
    apart = intervals_of(value, [real], copies, draws=40)["fid"]
    together = intervals_of(value, [real], copies, draws=40, paired=True)["fid"]
    assert together[1] - together[0] < 1e-3 < apart[1] - apart[0]


def test_the_seed_alone_decides_and_classes_keep_their_shares() -> None:
    rng = np.random.default_rng(2)
    real = {"healthy": features(40, rng), "npdr": features(20, rng, 0.5)}
    fake = {"healthy": features(30, rng), "npdr": features(30, rng, 0.5)}
    first, again, other = (
        score_classes(real, fake, metrics=("all",), bootstrap=20, floor=True, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again and first[2].intervals != other[2].intervals
    assert [score.label for score in first] == ["healthy", "npdr", "all"]
    for score in first:
        assert list(score.metrics) == list(score.intervals) == list(score.floor) == list(METRICS)
        assert all(low <= score.metrics[name] <= high for name, (low, high) in score.intervals.items())
    assert first[2].floor["precision"].mean > 0.5 and first[2].floor["kid"].n_sample == 30


def test_few_images_get_what_they_allow() -> None:
    rng = np.random.default_rng(3)
    real, fake = features(8, rng), features(9, rng)
    values = measure(METRICS, real, fake)
    assert set(intervals_of(values, [real], [fake], draws=20)) == {"fid", "kid"}  # halves of 4, and prdc wants 7
    assert set(floors_of(METRICS, [real], [9], None, 0, "")) == {"fid", "kid"}
    assert set(floors_of(METRICS, [real], [9], [fake], 0, "")) == set(METRICS)
    assert intervals_of({"fid": 1.0}, [real[:3]], [fake[:3]], draws=20) == {}
    assert intervals_of(values, [real], [fake], draws=0) == {}


def test_too_many_images_for_memory_get_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    real = features(20, rng)
    monkeypatch.setattr(bootstrap, "MAX_PRODUCTS", 3 * 20**2 - 1)
    assert intervals_of({"kid": 0.0}, [real], [real], draws=5) == {}


@given(
    value=st.floats(0, 1), deviation=st.floats(0, 1), count=st.integers(1, 3000), lowest=st.sampled_from([0.0, -np.inf])
)
def test_bounds(value: float, deviation: float, count: int, lowest: float) -> None:
    low, high = share_interval(value, deviation, count)
    assert 0 <= low <= value <= high <= 1 and high - low > 0
    low, high = interval(value, deviation, lowest)
    assert lowest <= low <= value <= high


def test_names_of_groups() -> None:
    assert check_metrics(["kid", "prdc", "kid"]) == ["kid", "precision", "recall", "density", "coverage"]
    assert check_metrics(["all"]) == list(METRICS)
