"""Usefulness: classifiers learn what is there, figures equal hand computations, sources tied to labels are named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("sklearn", reason="the extra retinar[metrics] (scikit-learn) is not installed")

from retinar.engine.errors import InputError
from retinar.engine.metrics.classifier import augment, train_classifier
from retinar.engine.metrics.discrimination import (
    auroc,
    best_threshold,
    draw_samples,
    sensitivity_at,
    threshold_at,
    weighted_auroc,
    weighted_sensitivity,
    wilson,
)
from retinar.engine.metrics.judgement import Examination, choose_thresholds, decide
from retinar.engine.metrics.networks import Recipe, build_network
from retinar.engine.metrics.pictures import read_pictures
from retinar.engine.metrics.sources import read_origins, source_scores, tie
from retinar.engine.metrics.usefulness import Usefulness, measure_usefulness, vote
from retinar.engine.progress import SilentBar

TINY = {
    "network": "mobilenet_v3_small",
    "size": 32,
    "steps": 36,
    "batch_size": 16,
    "lr": 3e-3,
    "seeds": 2,
    "device": "cpu",
}
"""Two seconds a classifier."""


def spotted(rng: np.random.Generator, spots: int, size: int = 32) -> np.ndarray:
    """uint8 [size, size, 3]: a noisy ground of any colour with that many bright squares."""
    image = rng.uniform(90, 160, (1, 1, 3)) + rng.normal(0, 6, (size, size, 3))
    for _ in range(spots):
        y, x = rng.integers(6, size - 10, 2)
        image[y : y + 5, x : x + 5] += 80
    return image.clip(0, 255).astype(np.uint8)


def make_folder(root: Path, counts: Mapping[str, int], seed: int, prefix: str = "cam", shown: str = "npdr") -> Path:
    """Images by class; those of the class ``shown`` have spots."""
    rng = np.random.default_rng(seed)
    for label, count in counts.items():
        (root / label).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            picture = Image.fromarray(spotted(rng, 3 if label == shown else 0))
            picture.save(root / label / f"{prefix}-{label}{seed}{index}.png")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("usefulness")
    return {
        "train": make_folder(root / "train", {"healthy": 40, "npdr": 30}, 1),
        "valid": make_folder(root / "valid", {"healthy": 25, "npdr": 25}, 2),
        "test": make_folder(root / "test", {"healthy": 60, "npdr": 40}, 3),
        "fake": make_folder(root / "fake", {"healthy": 30, "npdr": 35}, 4),
        "swapped": make_folder(root / "swapped", {"healthy": 30, "npdr": 35}, 5, shown="healthy"),
    }


@pytest.fixture(scope="module")
def measured(folders: dict[str, Path]) -> Usefulness:
    return measure_usefulness(folders["train"], folders["test"], folders["fake"], real_valid=folders["valid"], **TINY)


# --- what the classifiers find ----------------------------------------------------------------------------------------


def test_separable_classes_are_told_apart_by_all_three(measured: Usefulness) -> None:
    assert [row.trained_on for row in measured.rows] == ["real", "synthetic", "both"]
    for row in measured.rows:
        assert row.auroc.mean > 0.95 and row.auroc.interval[0] > 0.9, row.trained_on
        assert row.auroc.interval[0] <= row.auroc.mean <= row.auroc.interval[1] + 1e-12
        assert row.accuracy.mean > 0.9 and row.sensitivity_at_95_specificity.mean > 0.9
        assert row.operating_point is not None and row.operating_point.specificity.mean > 0.85
        assert row.n_test == {"healthy": 60, "npdr": 40}
        assert len(row.kept_steps) == 2
    assert measured.row("both").n_train == {"healthy": 70, "npdr": 65}
    assert [found.less for found in measured.differences] == ["real", "real"]
    assert all(abs(found.auroc.mean) < 0.05 for found in measured.differences)


def test_fidelity_is_high_for_right_labels_and_beside_it_stands_the_real_one(measured: Usefulness) -> None:
    for found in (*measured.class_fidelity, *measured.real_agreement):
        assert found.agreement > 0.9 and found.interval[0] < found.agreement <= found.interval[1]
    assert [found.images for found in measured.class_fidelity] == [30, 35]
    assert [found.images for found in measured.real_agreement] == [60, 40]
    assert measured.class_fidelity[0].interval == wilson(round(30 * measured.class_fidelity[0].agreement), 30)


def test_a_share_without_a_mistake_is_not_certain(measured: Usefulness) -> None:
    for row in measured.rows:
        assert row.accuracy.interval[0] <= wilson(round(100 * row.accuracy.mean), 100)[0]
        assert row.sensitivity_at_95_specificity.interval[0] < 0.93  # of 40 photographs
        assert row.operating_point is not None and row.operating_point.sensitivity.interval[0] < 0.93


def test_the_result_is_plain_json_and_names_what_decided(measured: Usefulness) -> None:
    found = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert {"network", "size", "seeds", "rows", "class_fidelity", "real_agreement", "warnings"} <= set(found)
    assert set(found["rows"][0]["auroc"]) == {"mean", "sd", "interval"}
    assert found["labels"] == ["healthy", "npdr"] and found["positive"] == "npdr" and found["steps"] == TINY["steps"]


def test_swapped_labels_turn_fidelity_and_the_synthetic_row_round(folders: dict[str, Path]) -> None:
    found = measure_usefulness(
        folders["train"], folders["test"], folders["swapped"], real_valid=folders["valid"], **(TINY | {"seeds": 1})
    )
    assert all(each.agreement < 0.1 and each.interval[1] < 0.3 for each in found.class_fidelity)
    assert found.row("synthetic").auroc.mean < 0.05 and found.row("real").auroc.mean > 0.95
    difference = next(each for each in found.differences if each.row == "synthetic")
    assert difference.auroc.interval[1] < -0.8


def test_labels_by_chance_teach_nothing(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Every synthetic class holds both kinds of pictures alike: AUROC's interval holds one half."""
    rng = np.random.default_rng(6)
    for label in ("healthy", "npdr"):
        (tmp_path / label).mkdir()
        for index in range(30):
            Image.fromarray(spotted(rng, 3 * (index % 2))).save(tmp_path / label / f"{index}.png")
    arguments = TINY | {"seeds": 4, "steps": 12}
    found = measure_usefulness(tmp_path, folders["test"], None, **arguments)
    low, high = found.row("real").auroc.interval
    assert low < 0.5 < high
    assert any("no validation folder" in warning for warning in found.warnings) and found.chosen_on is None
    assert found.row("real").operating_point is None and found.row("real").kept_steps == [12] * 4


def test_three_classes_are_judged_one_against_the_rest(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    for side, count in (("train", 24), ("test", 20)):
        for label, spots in (("a", 0), ("b", 3), ("c", 0)):
            (tmp_path / side / label).mkdir(parents=True)
            for index in range(count):
                image = spotted(rng, spots)
                if label == "c":
                    image[::2] //= 3  # stripes
                Image.fromarray(image).save(tmp_path / side / label / f"{index}.png")
    found = measure_usefulness(tmp_path / "train", tmp_path / "test", None, **(TINY | {"steps": 30, "seeds": 1}))
    (row,) = found.rows
    assert row.auroc.mean > 0.95 and row.accuracy.mean > 0.85 and row.operating_point is None
    assert len(found.real_agreement) == 3 and found.class_fidelity == [] and found.differences == []


def test_the_seed_decides_and_the_global_generator_is_left_alone(folders: dict[str, Path]) -> None:
    files = [sorted((folders["train"] / label).iterdir()) for label in ("healthy", "npdr")]
    pictures = read_pictures(files, 32)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    recipe = Recipe("mobilenet_v3_small", 32, 3, 8, 1e-3)  # has dropout, which draws from the global generator
    logits = [train_classifier(pictures, 2, recipe, seed=seed).logits(pictures) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(logits[0], logits[1]) and not np.array_equal(logits[0], logits[2])


def test_every_row_takes_equally_many_steps(folders: dict[str, Path]) -> None:
    counted: dict[str, int] = {}

    class Counting(SilentBar):
        def advance(self, count: int = 1, note: str | None = None) -> None:
            counted[self.label] = counted.get(self.label, 0) + count

    measure_usefulness(folders["train"], folders["test"], folders["fake"], progress=Counting, **(TINY | {"steps": 2}))
    trained = {label: count for label, count in counted.items() if "classifiers" in label}
    assert len(trained) == 3 and set(trained.values()) == {2 * 2}
    assert counted[f"images of {folders['test']}"] == 100


def test_validation_chooses_the_state_that_is_kept(folders: dict[str, Path]) -> None:
    files = [sorted((folders["train"] / label).iterdir()) for label in ("healthy", "npdr")]
    pictures = read_pictures(files, 24)
    seen: list[np.ndarray] = []

    def worse_and_worse(logits_NK: np.ndarray) -> float:
        seen.append(logits_NK)
        return -len(seen)

    recipe = Recipe("squeezenet1_1", 24, 41, 4, 1e-3)
    first = train_classifier(pictures, 2, recipe, choose=(pictures, worse_and_worse))
    assert first.step == 31 and len(seen) == 2, "checks at 31 and 41, of which the first was best"
    assert np.array_equal(first.logits(pictures), seen[0]) and not np.array_equal(*seen)
    equal = train_classifier(pictures, 2, recipe, choose=(pictures, lambda logits_NK: 0.5))
    assert equal.step == 41 and np.array_equal(equal.logits(pictures), seen[1])


def test_bfloat16_changes_little(folders: dict[str, Path]) -> None:
    files = [sorted((folders["train"] / label).iterdir()) for label in ("healthy", "npdr")]
    pictures = read_pictures(files, 32)
    trained = train_classifier(pictures, 2, Recipe("squeezenet1_1", 32, 30, 16, 1e-3, bfloat16=True))
    rough = trained.logits(pictures)
    exact = replace(trained, recipe=replace(trained.recipe, bfloat16=False)).logits(pictures)
    assert 0 < np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()
    assert auroc(rough[:, 1] - rough[:, 0], pictures.classes_N == 1) > 0.95


# --- figures by hand --------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30))
def test_auroc_equals_a_count_of_pairs(pairs: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in pairs], np.float32)
    positive = np.array([label for _, label in pairs])
    if positive.all() or not positive.any():
        assert np.isnan(auroc(scores, positive)) and np.isnan(sensitivity_at(scores, positive))
        return
    order = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    assert auroc(scores, positive) == pytest.approx(np.mean(order))
    ones = np.ones((1, len(scores)))
    assert weighted_auroc(scores, positive, ones) == pytest.approx([np.mean(order)])
    shares = [
        (scores[positive] >= cut).mean() for cut in [*scores, np.inf] if (scores[~positive] < cut).mean() >= 0.95 - 1e-9
    ]
    assert sensitivity_at(scores, positive) == pytest.approx(max(shares))
    assert weighted_sensitivity(scores, positive, ones) == pytest.approx([max(shares)])


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_draws_weigh_as_scikit_learn_does(seed: int) -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(0, 5, 25).astype(np.float32), rng.random(25) < 0.5
    weights = rng.integers(0, 3, (4, 25))
    repeated = [np.repeat(np.arange(25), row) for row in weights]
    if any(positive[rows].all() or not positive[rows].any() for rows in repeated):
        return
    wanted = [roc_auc_score(positive[rows], scores[rows]) for rows in repeated]
    assert weighted_auroc(scores, positive, weights) == pytest.approx(wanted)
    wanted = [sensitivity_at(scores[rows], positive[rows]) for rows in repeated]
    assert weighted_sensitivity(scores, positive, weights) == pytest.approx(wanted)


def test_sensitivity_at_95_specificity_by_hand() -> None:
    """20 negatives 0..19: one of them may be called positive, so the cut lies at 19 or above 18."""
    scores = np.array([*range(20), 18.5, 18.0, 25.0, 3.0, 19.0])
    positive = np.array([False] * 20 + [True] * 5)
    assert sensitivity_at(scores, positive) == pytest.approx(3 / 5)  # 18.5, 25 and 19 lie above 18
    assert sensitivity_at(scores[1:], positive[1:]) == pytest.approx(1 / 5)  # of 19 negatives none may: 25 alone
    assert threshold_at(scores, positive) == 18.0


def test_the_balanced_threshold_by_hand() -> None:
    scores, positive = np.array([0.0, 1, 2, 3, 4, 5]), np.array([False, False, True, False, True, True])
    assert best_threshold(scores, positive) in (1.5, 3.5)  # either costs one of three
    perfect = np.array([0.0, 1, 4, 9]), np.array([False, False, True, True])
    assert best_threshold(*perfect) == 2.5
    assert np.isfinite(best_threshold(np.zeros(4), perfect[1]))


@pytest.mark.parametrize(
    ("successes", "count", "wanted"),
    [(0, 10, (0.0, 0.27753)), (10, 10, (0.72247, 1.0)), (3, 10, (0.10779, 0.60323)), (0, 0, (0.0, 1.0))],
)
def test_wilson_equals_published_values(successes: int, count: int, wanted: tuple[float, float]) -> None:
    assert wilson(successes, count) == pytest.approx(wanted, abs=1e-5)


def test_intervals_cover_and_speak_of_patients_and_seeds() -> None:
    """Scores of known AUROC: about 95 % of intervals hold it; copies of a patient's photograph narrow nothing."""
    rng = np.random.default_rng(0)
    truth, held, widths = 0.7602, 0, []  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for trial in range(120):
        positive = np.arange(120) < 60
        scores = rng.normal(0, 1, 120) + positive
        draws = draw_samples([str(n) for n in range(120)], 1, 300, trial)
        low, high = draws.interval(weighted_auroc(scores, positive, draws.weights_DN)[None])
        held += low <= truth <= high
        if trial < 10:
            eyes = draw_samples([str(n) for n in range(120)] * 2, 1, 300, trial)
            twice = weighted_auroc(np.tile(scores, 2), np.tile(positive, 2), eyes.weights_DN)[None]
            widths.append((high - low, np.subtract(*eyes.interval(twice)[::-1])))
    assert 0.88 <= held / 120 <= 0.99
    one, two = np.mean(widths, axis=0)
    assert two == pytest.approx(one, rel=0.15)
    seeds = draw_samples(["a", "b"], 3, 500, 0)
    low, high = seeds.interval(np.array([0.6, 0.7, 0.8])[:, None].repeat(500, 1))
    assert low == pytest.approx(0.6) and high == pytest.approx(0.8)  # photographs alike: the seeds alone vary


# --- sources ----------------------------------------------------------------------------------------------------------


def test_tied_sources_are_named_and_knowing_them_is_the_baseline(tmp_path: Path) -> None:
    """No picture differs between the classes; only the source does, and the warning says so."""
    for side, seed in (("train", 11), ("test", 21)):
        make_folder(tmp_path / side, {"healthy": 30}, seed, "odir", shown="")
        make_folder(tmp_path / side, {"npdr": 20}, seed + 1, "aptos", shown="")
        make_folder(tmp_path / side, {"healthy": 12, "npdr": 12}, seed + 2, "idrid", shown="")
    found = measure_usefulness(tmp_path / "train", tmp_path / "test", None, **(TINY | {"steps": 2}))
    (warning,) = [each for each in found.warnings if "tied" in each]
    assert "odir: only healthy" in warning and "aptos: only npdr" in warning and "within idrid" in warning
    # pairs: 30 x 20 and 30 x 12 and 12 x 20 in order, 12 x 12 tied
    alone = 1 - 12 * 12 / 2 / (42 * 32)
    assert found.sources is not None and found.sources["source_alone_auroc"]["mean"] == pytest.approx(alone)
    assert f"AUROC {alone:.3f} on 42 healthy, 32 npdr" in warning
    (source,) = found.rows[0].by_source
    assert source.source == "idrid" and source.n == {"healthy": 12, "npdr": 12}
    assert source.auroc == found.rows[0].within_sources and 0 <= source.auroc.interval[0] <= 0.5


def test_untied_sources_do_not_warn(measured: Usefulness, tmp_path: Path) -> None:
    assert not any("tied" in warning for warning in measured.warnings)
    found = tie(["a"] * 20 + ["b"] * 20, (["x"] * 10 + ["y"] * 10) * 2)
    assert found is not None and found.association == 0 and not found.tied and found.both == ["a", "b"]
    assert tie(["a"] * 4, ["x", "y"] * 2) is None and tie([None] * 4, ["x", "y"] * 2) is None


def test_association_by_hand() -> None:
    """[[10, 0], [5, 15]]: chi-squared = 30 (10 x 15 - 0 x 5)^2 / (10 x 20 x 15 x 15) = 15, V = sqrt(1 / 2)."""
    sources, labels = ["a"] * 10 + ["b"] * 20, ["x"] * 15 + ["y"] * 15
    found = tie(sources, labels)
    assert found is not None and found.counts == {"a": {"x": 10, "y": 0}, "b": {"x": 5, "y": 15}}
    assert found.association == pytest.approx(0.5**0.5) and found.p == pytest.approx(1.0751e-4, rel=1e-3)
    assert found.tied and found.single == {"a": "x"} and found.both == ["b"]
    shares = source_scores(["a", "a", "b", None], np.array([0, 1, 1, 0]), ["a", "b", "c"], 2)
    assert shares.tolist() == [[0.5, 0.5], [0.0, 1.0], [0.5, 0.5]]


def test_the_pooled_figure_within_sources_counts_pairs_of_one_source() -> None:
    rng = np.random.default_rng(1)
    classes, sources = rng.integers(0, 2, 80), [["a", "b", "c", None][n % 4] for n in range(80)]
    classes[[source == "c" for source in sources]] = 0
    logits = rng.normal(0, 1, (80, 2)).astype(np.float32)
    score = logits[:, 1] - logits[:, 0]
    exam = Examination(["x", "y"], classes, sources, draw_samples([str(n) for n in range(80)], 1, 50, 0), 1)
    rows, within = exam.by_source([logits])
    order = [
        score[i] > score[j]
        for i in range(80)
        for j in range(80)
        if classes[i] == 1 and classes[j] == 0 and sources[i] == sources[j] and sources[i] is not None
    ]
    assert [row.source for row in rows] == ["a", "b"] and within is not None
    assert within.mean == pytest.approx(np.mean(order)) and within.sd is None


def test_sources_and_patients_from_manifest_and_names(tmp_path: Path) -> None:
    def touch(*names: str) -> list[Path]:
        paths = [tmp_path / name for name in names]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return paths

    files = touch("test/healthy/a.png", "test/npdr/b.png", "test/npdr/odir_3.png", "test/npdr/eyepacs-4_left.png")
    lines = [
        {"file": "test/healthy/a.png", "source": "test/idrid-1_left.jpg", "patient": "idrid-1"},
        {"file": "test/npdr/b.png", "source": "hospital B", "patient": "9"},
    ]
    text = "\n".join([*map(json.dumps, lines), "{torn", "[]", '{"file": 3}'])
    (tmp_path / "manifest.jsonl").write_text(text, encoding="utf-8")
    assert [each.source for each in read_origins(files[:2])] == ["idrid", "hospital B"]
    assert [each.patient for each in read_origins(files[:2])] == ["idrid-1", "9"]
    assert [each.source for each in read_origins(files[2:])] == ["odir", "eyepacs"]
    # numbers of patients, single names, and names of the class itself tell no source
    numbered = touch(*(f"n/x/{number}_left.png" for number in range(30)))
    assert {each.source for each in read_origins(numbered)} == {None}
    assert [each.source for each in read_origins(touch("n/npdr/NPDR_1.png", "n/npdr/12.png"), ["npdr"])] == [None, None]


# --- the door ---------------------------------------------------------------------------------------------------------


def test_a_missing_class_is_one_clear_error(tmp_path: Path, folders: dict[str, Path]) -> None:
    lonely = make_folder(tmp_path / "lonely", {"healthy": 2}, 8)
    with pytest.raises(InputError, match=r"Expected the classes healthy, npdr in .*lonely, found no images of npdr"):
        measure_usefulness(folders["train"], folders["test"], lonely, **TINY)
    with pytest.raises(InputError, match="found only healthy"):
        measure_usefulness(lonely, folders["test"], folders["fake"], **TINY)
    with pytest.raises(InputError, match="Expected a subfolder for each class"):
        measure_usefulness(folders["train"] / "npdr", folders["test"], folders["fake"], **TINY)
    with pytest.raises(InputError, match="positive class among healthy, npdr, found 'dr'"):
        measure_usefulness(folders["train"], folders["test"], None, positive="dr", **TINY)
    with pytest.raises(InputError, match="apart from the training images, found 100 in both"):
        measure_usefulness(folders["test"], folders["test"], None, **TINY)
    with pytest.raises(InputError, match="apart from the validation images"):
        measure_usefulness(folders["train"], folders["test"], None, real_valid=folders["test"], **TINY)
    with pytest.raises(InputError, match="at least 1 seed"):
        measure_usefulness(folders["train"], folders["test"], None, **(TINY | {"seeds": 0}))
    (lonely / "npdr").mkdir()
    (lonely / "npdr" / "torn.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"Expected readable images in .*npdr, found none \(torn.png"):
        measure_usefulness(folders["train"], lonely, None, **TINY)


def test_what_is_left_out_is_told(tmp_path: Path, folders: dict[str, Path]) -> None:
    test = make_folder(tmp_path / "test", {"healthy": 6, "npdr": 6, "glaucoma": 2}, 9)
    (test / "npdr" / "torn.png").write_bytes(b"\x89PNG")
    Image.new("L", (32, 32), 90).save(test / "healthy" / "grey.png")
    found = measure_usefulness(folders["train"], test, None, **(TINY | {"steps": 1, "seeds": 1}))
    said = "\n".join(found.warnings)
    assert "glaucoma" in said and "2 files could not be used" in said and "one seed" in said
    assert "fewer than 20 test photographs (healthy 6, npdr 6)" in said
    assert [Path(each["file"]).name for each in found.skipped] == ["grey.png", "torn.png"]
    assert found.rows[0].auroc.sd is None


def test_patients_on_both_sides_are_told(tmp_path: Path) -> None:
    for side, seed in (("train", 1), ("test", 2)):
        make_folder(tmp_path / side, {"healthy": 3, "npdr": 3}, seed)
    files = sorted(path for side in ("train", "test") for path in (tmp_path / side).rglob("*.png"))
    lines = [
        {"file": path.relative_to(tmp_path).as_posix(), "source": f"a-{n}.jpg", "patient": str(n % 4)}
        for n, path in enumerate(files)
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = measure_usefulness(tmp_path / "train", tmp_path / "test", None, **(TINY | {"steps": 1}))
    assert "4 patients have photographs on the test side and the training side" in found.warnings
    assert found.resampled == "patients and seeds"


# --- networks and their weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_given_weights_are_taken_and_the_head_is_new(tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    plain = Recipe("resnet18", 32, 1, 4, 1e-3)
    donor = {name: each.contiguous() for name, each in build_network(plain, 7, seed=1).state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    torch.save(donor, path) if suffix == ".pth" else save_file(donor, path)
    recipe = Recipe("resnet18", 32, 1, 4, 1e-3, weights=path)
    own, fresh = build_network(recipe, 2, seed=5).state_dict(), build_network(plain, 2, seed=5).state_dict()
    assert own["fc.weight"].shape == (2, 512) and torch.equal(own["fc.weight"], fresh["fc.weight"])
    same = [name for name in own if not name.startswith("fc.")]
    assert all(torch.equal(own[name], donor[name]) for name in same)
    assert not torch.equal(own["conv1.weight"], fresh["conv1.weight"])


def test_weights_of_another_network_or_kind_are_refused(tmp_path: Path) -> None:
    recipe = Recipe("resnet18", 32, 1, 4, 1e-3)
    state = build_network(recipe, 2).state_dict()
    cases = {
        "other.pth": ({"features.0.weight": torch.zeros(1)}, "without bn1.bias, bn1.running_mean, ..."),
        "more.pth": (state | {"layer5.weight": torch.zeros(1)}, "with the foreign layer5.weight"),
        "shape.pth": (state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, "of another shape in conv1.weight"),
        "list.pth": ([torch.zeros(1)], "found something else"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(InputError, match=message):
            build_network(Recipe("resnet18", 32, 1, 4, 1e-3, weights=tmp_path / name), 2)
    torch.save({"weights": Path}, tmp_path / "code.pth")  # a pickle that would import something
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "hello.pth").write_text("hello, a text whose letters pickle takes for commands")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name, message in (
        ("code.pth", "damaged"),
        ("text.pth", "damaged"),
        ("hello.pth", "damaged"),
        ("text.safetensors", "damaged"),
    ):
        with pytest.raises(InputError, match=message):
            build_network(Recipe("resnet18", 32, 1, 4, 1e-3, weights=tmp_path / name), 2)
    with pytest.raises(InputError, match="found no file"):
        build_network(Recipe("resnet18", 32, 1, 4, 1e-3, weights=tmp_path / "none.pth"), 2)


@pytest.mark.parametrize(
    ("network", "size", "message"),
    [
        ("resnet19", 32, "found 'resnet19': choose one"),
        ("vit_b_32", 32, "vit_b_32 does not take them"),
        ("squeezenet1_1", 8, "squeezenet1_1 does not take them"),
    ],
)
def test_networks_that_cannot_serve_are_refused(network: str, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_network(Recipe(network, size, 1, 4, 1e-3), 2)


def test_untrained_running_statistics_are_fresh() -> None:
    """Trying the network on zeros must leave no trace in its batch norms."""
    network = build_network(Recipe("mobilenet_v3_small", 32, 1, 4, 1e-3), 2)
    norms = [layer for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert norms and all(torch.equal(layer.running_var, torch.ones_like(layer.running_var)) for layer in norms)


def test_views_are_turned_mirrored_and_coloured_each_for_itself() -> None:
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 4:14, 4:14] = 120
    views = augment(images, torch.Generator().manual_seed(0))
    assert views.shape == images.shape and views.is_contiguous(memory_format=torch.channels_last)
    bright = (views[:, 0] > views[:, 0].amin((1, 2), keepdim=True) + 0.3).float()
    quarter = bright.unfold(1, 16, 16).unfold(2, 16, 16).sum((3, 4)).flatten(1).argmax(1)
    assert set(quarter.tolist()) == {0, 1, 2, 3}, "mirrored both ways"
    tints = views.amax((2, 3)) @ torch.tensor([1.0, -1.0, 0.0])
    assert tints.std() > 0.05 and len(torch.unique(views.flatten(1), dim=0)) == 64


# --- pictures and votes -----------------------------------------------------------------------------------------------


def test_pictures_are_square_resized_and_in_order(tmp_path: Path) -> None:
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = (200, 100, 50)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.new("RGB", (32, 32), (77, 7, 70)).save(tmp_path / "small.png")
    Image.new("L", (32, 32), 77).save(tmp_path / "grey.png")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    found = read_pictures(
        [[tmp_path / name for name in names] for names in (("grey.png", "torn.png", "wide.png"), ("small.png",))], 10
    )
    assert found.images_NCHW.shape == (2, 3, 10, 10) and found.classes_N.tolist() == [0, 1]
    assert found.images_NCHW[0].unique(dim=1).flatten(1)[:, 0].tolist() == [200, 100, 50]
    assert found.images_NCHW[1, :, 5, 5].tolist() == [77, 7, 70] and len(found) == 2
    assert [path.name for path, _ in found.skipped] == ["grey.png", "torn.png"]


def test_votes_and_decisions() -> None:
    logits = [np.array([[0.0, 3.0], [2.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 5.0]])]
    odds = vote(logits) @ [-1, 1]
    assert odds == pytest.approx([2.0, 1.5])  # mean log odds
    chosen = choose_thresholds(vote(logits), np.array([1, 0]), positive=1)
    assert chosen.balanced == pytest.approx(1.75)
    assert decide(vote(logits), chosen, positive=1).tolist() == [1, 0]
    turned = choose_thresholds(vote(logits), np.array([1, 0]), positive=0)
    assert turned.balanced == pytest.approx(-1.75) and decide(vote(logits), turned, positive=0).tolist() == [1, 0]


# --- the photographs --------------------------------------------------------------------------------------------------


def test_the_stand_in_photographs_warn_of_their_sources(photographs: Path, tmp_path: Path) -> None:
    """Few pixels and steps: the point is the warning and the sources, not the figures."""
    for side in ("train", "test"):
        grades = dict(line.split() for line in (photographs / f"{side}.txt").read_text().splitlines() if line.strip())
        for label, wanted in (("healthy", {"0"}), ("npdr", {"2", "3"})):
            (tmp_path / side / label).mkdir(parents=True)
            for name, grade in sorted(grades.items()):
                if grade in wanted:
                    (tmp_path / side / label / name).symlink_to(photographs / side / name)
    found = measure_usefulness(
        tmp_path / "train", tmp_path / "test", None, limit=90, **(TINY | {"size": 24, "steps": 2, "seeds": 1})
    )
    (warning,) = [each for each in found.warnings if "tied" in each]
    for name in ("aptos: only npdr", "odir", "within eyepacs and idrid"):
        assert name in warning
    assert {row.source for row in found.rows[0].by_source} == {"eyepacs", "idrid"}
