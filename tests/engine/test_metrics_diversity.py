"""Diversity within a class: which pairs, their mean, its interval, and that a generator that repeats itself shows."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from retinar.engine.errors import InputError
from retinar.engine.metrics import diversity as module
from retinar.engine.metrics.diversity import diversity, half_width
from retinar.engine.metrics.folders import read_image
from retinar.engine.perceptual import LPIPS

pytest.importorskip("scipy", reason="the package scipy is missing (pip install 'retinar[metrics]')")


class Colour(nn.Module):
    """Stands in for LPIPS: the distance of mean colours. Counts the images it sees and holds their features apart."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []
        self.weight = nn.Parameter(torch.ones(1))

    def features(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        self.seen += images_BCHW.mean((1, 2, 3)).tolist()
        return (images_BCHW.mean((2, 3), keepdim=True),)

    def between(self, a: tuple[Tensor, ...] | list[Tensor], b: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        return (a[0] - b[0]).square().sum((1, 2, 3))


def paint(folder: Path, count: int, seed: int, spread: int = 60) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        colour = 100 + rng.integers(-spread, spread + 1, 3)
        Image.new("RGB", (40 + index % 3, 40), tuple(colour.tolist())).save(folder / f"{index:03d}.png")
    return folder


def distance(a: Path, b: Path) -> float:
    return float((((read_image(a)[0, 0] - read_image(b)[0, 0].astype(float)) / 127.5) ** 2).sum())


def test_all_pairs_where_they_are_few(tmp_path: Path) -> None:
    files = sorted(paint(tmp_path / "a", 9, 0).iterdir())
    lpips = Colour()
    (found,) = diversity(tmp_path / "a", lpips, pairs=500)  # type: ignore[arg-type]
    assert (found.label, found.images, found.pairs, found.size) == ("all", 9, 36, 128)
    assert found.mean == pytest.approx(np.mean([distance(*pair) for pair in combinations(files, 2)]), rel=1e-5)
    assert len(lpips.seen) == 9
    assert found.interval is not None and found.interval[0] < found.mean < found.interval[1]
    assert found.to_dict()["mean"] == found.mean


@settings(max_examples=80, deadline=None)
@given(images=st.integers(2, 30), pairs=st.integers(1, 120))
def test_pairs_are_different_and_as_many_as_asked_for(images: int, pairs: int) -> None:
    """The chain of neighbours, then those two apart: never a pair twice, never an image with itself."""

    class Numbers(Colour):
        def features(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
            return (images_BCHW,)

    class Bar:
        def advance(self, count: int = 1, note: str | None = None) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_image", lambda path: np.zeros((16, 16, 3), np.uint8))
        files = [Path(str(index)) for index in range(min(images, pairs + 1))]
        found = [pair for pair, _ in module._distances(files, Numbers(), 16, pairs, Bar())]  # type: ignore[arg-type]
    assert len(found) == len({frozenset(pair) for pair in found}) and all(i != j for i, j in found)
    assert len(found) >= min(pairs, images * (images - 1) // 2)
    if images > pairs:
        assert len(found) == pairs


def test_one_pass_for_each_pair_of_a_large_class_and_the_seed_decides(tmp_path: Path) -> None:
    paint(tmp_path / "healthy", 40, 0)
    paint(tmp_path / "npdr", 30, 1, spread=5)
    lpips = Colour()
    found = diversity(tmp_path, lpips, pairs=20)  # type: ignore[arg-type]
    assert len(lpips.seen) == 2 * 21
    assert [(each.label, each.images, each.pairs) for each in found] == [("healthy", 40, 20), ("npdr", 30, 20)]
    assert found[1].mean < found[0].mean / 10
    assert diversity(tmp_path, Colour(), pairs=20) == found  # type: ignore[arg-type]
    assert diversity(tmp_path, Colour(), pairs=20, seed=1) != found  # type: ignore[arg-type]
    limited = diversity(tmp_path, Colour(), pairs=20, limit=7)  # type: ignore[arg-type]
    assert [(each.images, each.pairs, each.interval) for each in limited] == [(7, 20, None)] * 2


def test_bad_and_grey_files_are_left_out(tmp_path: Path) -> None:
    paint(tmp_path, 10, 0)
    expected = diversity(tmp_path, Colour())  # type: ignore[arg-type]
    (tmp_path / "bad.png").write_bytes(b"x")
    Image.new("L", (40, 40), 90).save(tmp_path / "grey.png")
    Image.new("RGB", (9, 9), (200, 0, 0)).save(tmp_path / "thumbnail.png")
    assert diversity(tmp_path, Colour()) == expected  # type: ignore[arg-type]


def test_bad_input(tmp_path: Path) -> None:
    paint(tmp_path / "healthy", 1, 0)
    with pytest.raises(InputError, match=r"at least 2 readable images.*of healthy, found 1"):
        diversity(tmp_path, Colour())  # type: ignore[arg-type]
    paint(tmp_path / "healthy", 3, 0)
    for wrong in ({"pairs": 0}, {"size": 8}):
        with pytest.raises(InputError, match="at least 1 pair and 16 pixels"):
            diversity(tmp_path, Colour(), **wrong)  # type: ignore[arg-type]


def test_the_interval_covers() -> None:
    """The mean distance of the distribution, estimated from chains of pairs and from all pairs of a few points."""
    rng = np.random.default_rng(0)
    for n, edges in ((60, [(i, i + 1) for i in range(59)]), (12, list(combinations(range(12), 2)))):
        pairs = np.array(edges)
        means, halves = [], []
        for _ in range(400):
            x = rng.standard_normal((n, 6))
            values = np.linalg.norm(x[pairs[:, 0]] - x[pairs[:, 1]], axis=1)
            means.append(values.mean())
            halves.append(half_width(pairs, values))
        covered = np.mean(np.abs(np.array(means) - np.mean(means)) <= halves)
        assert 0.89 <= covered <= 0.99


def test_the_real_network_tells_repetition_from_variety(vgg_weights: Path, tmp_path: Path) -> None:
    if find_spec("lpips") is None:
        pytest.skip("the package lpips is missing (pip install 'retinar[metrics]')")
    lpips = LPIPS(vgg_weights)
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (32, 32, 3), np.uint8)
    for kind, count in (("varied", 5), ("repeated", 5)):
        (tmp_path / kind).mkdir()
        for index in range(count):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8) if kind == "varied" else first ^ (index == 3)
            Image.fromarray(pixels).save(tmp_path / kind / f"{index}.png")
    found = {each.label: each for each in diversity(tmp_path, lpips, size=32)}
    assert found["repeated"].mean < found["varied"].mean / 20
    files = [read_image(path) for path in sorted((tmp_path / "varied").iterdir())]
    tensors = [torch.tensor(each).permute(2, 0, 1)[None].float() / 127.5 - 1 for each in files]
    with torch.no_grad():
        expected = np.mean([float(lpips.distances(a, b)) for a, b in combinations(tensors, 2)])
    assert found["varied"].mean == pytest.approx(expected, rel=1e-4)
