"""How far a metric of two feature sets may be chance: 95 % intervals by half-sampling.

Every draw takes half of the images of each class on each side, without replacement, and computes the metric again.
The spread of such draws is that of the metric itself at the full counts: a mean over n of N images strays from that of
all N by a variance of (1/n - 1/N) s^2, which for n = N/2 is s^2/N, the variance of the full mean (Shao and Wu 1989, the
delete-half jackknife; drawing without replacement is what sets it apart from the ordinary bootstrap).

Why not the ordinary bootstrap: it draws images twice. Two copies have distance zero, which no two photographs have, so
precision, recall and coverage lose their meaning; and FID and KID of resamples are biased upwards by what the copies
add. The half samples are biased as well (FID depends on the count), so only their spread is used: the interval is the
figure at the full counts +- 1.96 standard deviations of the half samples. It speaks of other images of the same two
sources at the same counts, and of nothing else: the bias that FID has at that count is in figure and floor alike.

How well it covers, by simulation (a test repeats a small one): for 60 healthy against 50 NPDR photographs drawn from
888 and 454, and for Gaussian features of 16 and 96 dimensions, 60 to 120 a side, the intervals hold the mean figure of
such samples in 89 to 99 %. Where both sides have one distribution the deviation of FID and KID is 1.4 to 1.8 times too
large (their leading term vanishes) and the interval too wide; the ordinary bootstrap's is twice too large there. Shares
near 0 or 1 hardly vary between half samples: their interval is never narrower than Wilson's for the count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from retinar.engine.metrics.discrimination import wilson
from retinar.engine.metrics.grams import Grams

MAX_PRODUCTS = 3 * 10**7
"""Inner products held at once: 3,100 images a side. Time sets the bound: 200 draws take minutes there."""
NORMAL = 1.959963984540054


def half_sample(sizes: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Sorted numbers of half of each class, where classes of these ``sizes`` lie one after another.

    The odd image of a class is in or out by chance.
    """
    starts = np.cumsum([0, *sizes[:-1]])
    halves = [size // 2 + int(rng.integers(2)) * (size % 2) for size in sizes]
    parts = zip(starts, sizes, halves, strict=True)
    return np.concatenate([start + np.sort(rng.permutation(size)[:half]) for start, size, half in parts])


def smallest_half(sizes: Sequence[int]) -> int:
    """The images that every draw has at least."""
    return sum(size // 2 for size in sizes)


def fits(n_real: int, n_fake: int) -> bool:
    """Whether the inner products of so many images are held in memory."""
    return n_real**2 + n_fake**2 + n_real * n_fake <= MAX_PRODUCTS


def deviations(
    grams: Grams,
    real_sizes: Sequence[int],
    fake_sizes: Sequence[int],
    measure: Callable[[Grams], dict[str, float]],
    *,
    draws: int,
    seed: int = 0,
    paired: bool = False,
    step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Standard deviation of each of the metrics of ``measure`` over ``draws`` half samples (two at least).

    The sizes are those of the classes on each side, whose shares every draw keeps. ``paired``: image i of a side
    belongs to image i of the other, and a draw takes both. The same seed gives the same draws.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(max(2, draws)):
        real = half_sample(real_sizes, rng)
        found.append(measure(grams.at(real, real if paired else half_sample(fake_sizes, rng))))
        step()
    return {name: float(np.std([each[name] for each in found], ddof=1)) for name in found[0]}


def interval(value: float, deviation: float, lowest: float = -np.inf) -> tuple[float, float]:
    """95 % of a normal distribution, cut at ``lowest``."""
    return max(lowest, value - NORMAL * deviation), value + NORMAL * deviation


def share_interval(value: float, deviation: float, count: int) -> tuple[float, float]:
    """The same for a share of ``count`` images, within 0 to 1 and at least as wide as Wilson's."""
    low, high = wilson(round(value * count), count)
    return max(0.0, min(low, value - NORMAL * deviation)), min(1.0, max(high, value + NORMAL * deviation))
