"""The probe classifier: learns small lesions quickly, depends on its seed alone, refuses what it cannot learn from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from retinar.engine.errors import InputError
from retinar.engine.metrics.probe import train_probe
from retinar.train.data.phantoms import draw_phantom


def spots(count: int, seed: int, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Noisy grounds of any colour; those of class 1 have two dark spots of 3 x 3 pixels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    images = rng.uniform(110, 200, (count, 1, 1, 3)) + rng.normal(0, 6, (count, size, size, 3))
    for image, label in zip(images, labels, strict=True):
        for _ in range(2 * label):
            y, x = rng.integers(4, size - 7, 2)
            image[y : y + 3, x : x + 3] -= 70
    return images.clip(0, 255).astype(np.uint8), labels


def test_learns_small_spots_and_keeps_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    probe = train_probe(*spots(120, 0), size=32, steps=60, width=8, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    images, labels = spots(200, 1)
    assert probe.accuracy(images, labels) > 0.95
    assert 0.02 < probe.accuracy(images, 1 - labels) + probe.accuracy(images, labels) <= 1
    assert probe.logits(images).shape == (200, 2) and probe.predict(images).dtype == np.int64
    assert probe.predict(images[:0]).shape == (0,)
    larger = np.stack([np.asarray(Image.fromarray(image).resize((64, 64))) for image in images])
    assert probe.accuracy(larger, labels) > 0.9


def test_the_seed_decides() -> None:
    images, labels = spots(40, 0)
    probes = [train_probe(images, labels, size=16, steps=3, width=4, seed=seed).logits(images) for seed in (0, 0, 1)]
    assert np.array_equal(probes[0], probes[1]) and not np.array_equal(probes[0], probes[2])


def test_three_classes_of_unlike_sizes() -> None:
    images = np.zeros((46, 16, 16, 3), np.uint8)
    labels = np.array([0] * 40 + [1] * 4 + [2] * 2)
    images[labels == 1, 4:12] = (200, 30, 30)
    images[labels == 2, :, 4:12] = (30, 30, 200)
    assert train_probe(images, labels, size=16, steps=60, width=8).accuracy(images, labels) == 1.0


def test_phantoms_of_the_demo_and_soft_copies_of_them() -> None:
    """What the demo rests on: lesions, not sharpness, decide."""

    def draw(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        pictures = [
            np.asarray(draw_phantom(label, index, split=split, seed=0, size=64).image.convert("RGB"))
            for label in ("healthy", "npdr")
            for index in range(count)
        ]
        return np.stack(pictures), np.repeat([0, 1], count)

    images, labels = draw("test", 30)
    probe = train_probe(*draw("train", 60), steps=110, seed=0)
    assert probe.accuracy(images, labels) > 0.95
    soft = [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.2))) for image in images]
    assert probe.accuracy(np.stack(soft), labels) > 0.9


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0]),
        (np.zeros((4, 8, 8, 3), np.float32), [0, 1, 0, 1]),
        (np.zeros((4, 8, 8, 3), np.uint8), [0, 0, 0, 0]),
        (np.zeros((4, 8, 8, 3), np.uint8), [0, 2, 0, 2]),
        (np.zeros((0, 8, 8, 3), np.uint8), []),
    ],
)
def test_what_it_cannot_learn_from(images: np.ndarray, labels: list[int]) -> None:
    with pytest.raises(InputError, match="Expected"):
        train_probe(images, np.array(labels, np.int64))
