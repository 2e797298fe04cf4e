"""`retinar bench table3` at toy size: both methods from phantoms to the table, taken up where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from retinar.bench.table3 import comparison, methods, page
from retinar.bench.table3.comparison import Comparison, compare, slug
from retinar.bench.table3.plan import Plan
from retinar.engine.errors import InputError
from retinar.engine.progress import silent
from retinar.train.budget import short_average
from retinar.train.data.phantoms import write_phantoms

pytest.importorskip("cleanfid", reason="the package clean-fid is missing (pip install 'retinar[metrics]')")

SETS = (
    "tokenizer.model.image_size=32",
    "tokenizer.model.ch=8",
    "tokenizer.model.z_channels=8",
    "tokenizer.model.codebook_size=16",
    "tokenizer.crop_size=16",
    "tokenizer.perceptual=none",
    "tokenizer.precision=fp32",
    "tokenizer.steps=4",
    "tokenizer.quantize_from=1",
    "gpt.model.n_layer=1",
    "gpt.model.n_head=2",
    "gpt.model.dim=16",
    "gpt.model.multiple_of=16",
    "gpt.batch_size=4",
    "iddpm.model.image_size=32",
    "iddpm.model.num_channels=8",
    "iddpm.model.attention_resolutions=8",
    "iddpm.batch_size=2",
    *(f"{part}.{key}=false" for part in ("tokenizer", "gpt", "iddpm") for key in ("tensorboard", "meters")),
)


class Grid(nn.Module):
    """2,048 features of the picture's coarse colours."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, [4, 4]).flatten(1).repeat(1, 43)[:, :2048]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "inception.pt"
    torch.jit.save(torch.jit.script(Grid()), str(path))
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "ddr"
    counts = {"train": 8, "valid": 6, "test": 8}
    splits = {split: {"healthy": count, "npdr": count} for split, count in counts.items()}
    write_phantoms(folder, splits, size=32, progress=silent)
    return folder


def asked(photographs: Path, out: Path, network: Path, **changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "budget": 0.03,
        "device": "cpu",
        "recipes": ("iddpm-tiny",),
        "tune": 2,
        "count": 7,
        "inception": network,
        "bootstrap": 8,
        "sets": SETS,
    }
    return Comparison(data=photographs, out=out, **{**values, **changes})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "GUIDANCE", (1.0, 2.0))
    monkeypatch.setattr(methods, "DIFFUSION_STEPS", {"cpu": 3})


class Stopped(Exception):
    """Stands for a kill: nothing after it runs."""


def test_from_photographs_to_the_table_with_a_kill_on_the_way(
    photographs: Path, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    wanted = asked(photographs, out, network)
    with monkeypatch.context() as patch:

        def die(*_: Any, **__: Any) -> None:
            raise Stopped

        patch.setattr(methods.Baseline, "sample", die)
        with pytest.raises(Stopped):
            compare(wanted, silent)
    before = json.loads((out / "plan.json").read_text())
    assert {"autoregressive/vq8-cpu+fundus-cpu", "sampled/autoregressive", "iddpm/iddpm-tiny"} <= set(before["done"])

    found = compare(wanted, silent)
    after = json.loads((out / "plan.json").read_text())
    assert {key: after["done"][key] for key in before["done"]} == before["done"]  # nothing is done twice
    assert json.loads((out / "table3.json").read_text()) == found
    ours, theirs = found["sides"]
    for side, tries in ((ours, 2), (theirs, 2)):
        assert len(side["tuning"]) == tries
        best = min(side["tuning"], key=lambda each: each["mean_fid"])
        assert (side["recipe"], side["setting"]) == (best["recipe"], best["setting"])
        assert {score["label"]: (score["n_real"], score["n_fake"]) for score in side["scores"]} == {
            "healthy": (8, 7),
            "npdr": (8, 7),
            "all": (16, 14),
        }
        trained = side["trained"][side["recipe"]]
        assert trained["images_seen"] > 0 and trained["parameters"] > 0 and trained["image_size"] == 32
        assert side["seconds_per_image"] > 0
        for score in side["scores"]:
            assert set(score["metrics"]) == set(comparison.METRICS) == set(score["floor"])
            assert {"fid", "kid"} <= set(score["intervals"])

    with Image.open(out / "figure2.png") as figure:
        assert figure.width >= 6 * 32  # six a row: two methods, two classes
    text = (out / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "40.14" in rows[2] and "41.21" in rows[2] and "78.20" in rows[3] and "74.19" in rows[3]
    by_label = {score["label"]: score["metrics"]["fid"] for score in theirs["scores"]}
    assert f"{by_label['healthy']:.1f}" in rows[5] and f"{by_label['npdr']:.1f}" in rows[5]
    assert "iddpm-tiny" in text and "cfg_scale" in text

    with pytest.raises(InputError, match=r"another seed.*choose another --out"):
        compare(asked(photographs, out, network, seed=1), silent)
    with pytest.raises(InputError, match=r"another budget.*choose another --out"):
        compare(asked(photographs, out, network, budget=9.0), silent)
    others = tmp_path / "others"
    write_phantoms(others, {split: {"healthy": 9, "npdr": 9} for split in comparison.SPLITS}, size=32, progress=silent)
    with pytest.raises(InputError, match=r"found others in .*give the same --data"):
        compare(asked(others, out, network), silent)


def test_trained_checkpoints_in_the_place_of_trainings(photographs: Path, network: Path, tmp_path: Path) -> None:
    methods_out = tmp_path / "trained"
    first = compare(asked(photographs, methods_out, network, tune=0, bootstrap=0), silent)
    models = {side["method"]: Path(side["trained"][side["recipe"]]["model"]) for side in first["sides"]}
    again = compare(
        asked(photographs, tmp_path / "given", network, tune=0, bootstrap=0, recipes=(), sets=(), **models),
        silent,
    )
    for one, other in zip(first["sides"], again["sides"], strict=True):
        ours, known = other["trained"]["given"], one["trained"][one["recipe"]]
        assert other["recipe"] == "given" and ours["parameters"] == known["parameters"]
        assert [score["metrics"] for score in one["scores"]] == [score["metrics"] for score in other["scores"]]
        assert all(score["intervals"] == {} for score in other["scores"])
    # A model still in the folder of its run tells what it was trained with; a released one does not.
    assert again["sides"][0]["trained"]["given"]["images_seen"] is None
    theirs = [content["sides"][1]["trained"] for content in (first, again)]
    assert theirs[1]["given"]["images_seen"] == theirs[0]["iddpm-tiny"]["images_seen"]
    assert 0 < theirs[1]["given"]["minutes"] <= theirs[0]["iddpm-tiny"]["minutes"] + 0.01
    assert "Two trained checkpoints" in page.document(again, "figure2.png")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"budget": 0.0}, "--budget above 0"),
        ({"budget": float("inf")}, "--budget above 0"),
        ({"seed": -1}, "the seed must lie between"),
        ({"tune": -1}, "--tune of at least 0"),
        ({"tune": 1}, "at least 2 images a class"),
        ({"count": 6}, "--count of at least 7"),
        ({"sets": ("model.dim=3",)}, "tokenizer.KEY=VALUE"),
        ({"data": Path("nowhere")}, "found none at 'nowhere'"),
        ({"iddpm": Path("nowhere")}, "a checkpoint at nowhere"),
        ({"recipes": ("iddpm-cpu",), "sets": SETS[:18]}, "a baseline of 32 px"),
        ({"recipes": ()}, "a recipe of the baseline for 32 px"),
        ({"size": 64}, "images of 64 px, found 32 px"),
        ({"recipes": ("iddpm-tin",)}, "did you mean iddpm-tiny"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    photographs: Path, network: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    out = tmp_path / "out"
    if changes.get("recipes") == ("iddpm-cpu",):
        changes = {**changes, "sets": tuple(text for text in SETS if not text.startswith("iddpm."))}
    values: dict[str, Any] = {"data": photographs, **changes}
    data = values.pop("data")
    with pytest.raises(InputError, match=sentence):
        compare(asked(data, out, network, **values), silent)
    assert not out.exists()


def test_a_plan_adds_up_the_time_of_interrupted_stages(tmp_path: Path) -> None:
    plan = Plan.open(tmp_path / "out", {"seed": 0})
    with pytest.raises(KeyboardInterrupt), plan.timed("train"):
        raise KeyboardInterrupt
    first = plan.seconds("train")
    again = Plan.open(tmp_path / "out", {"seed": 0})
    with again.timed("train"):
        pass
    assert again.seconds("train") >= first > 0
    assert ("a", "b") not in again
    again.keep(("a", "b"), {"model": tmp_path})
    assert Plan.open(tmp_path / "out", {"seed": 0})["a", "b"] == {"model": str(tmp_path)}
    (tmp_path / "out" / "plan.json").write_text("{")
    with pytest.raises(InputError, match="a damaged one"):
        Plan.open(tmp_path / "out", {"seed": 0})


def test_a_model_without_a_null_class_is_not_guided(tmp_path: Path) -> None:
    sets = ("model.null_class=false", "model.class_dropout_prob=0", "model.diffusion_steps=2")
    parts = ("gpt", "iddpm")
    job = methods.Job(
        tmp_path, "cpu", 1.0, tuple(f"{part}.{text}" for part in parts for text in sets[: 2 + (part == "iddpm")])
    )
    assert [dict(each) for each in methods.Autoregressive("cpu").settings(job)] == [{"cfg_scale": 1.0}]
    [setting] = methods.Baseline(("iddpm-tiny",)).settings(job)
    assert dict(setting) == {"cfg_scale": 1.0, "steps": 2, "method": "ancestral"}


def test_without_vgg_the_tokenizer_is_trained_without_the_perceptual_loss(tmp_path: Path) -> None:
    asked = Comparison(tmp_path, tmp_path / "out")
    assert list(comparison._without_vgg(asked)) == ["tokenizer.perceptual=none"]
    assert not comparison._without_vgg(replace(asked, sets=("tokenizer.perceptual=vgg",)))
    assert not comparison._without_vgg(replace(asked, tokenizer=tmp_path))


def test_a_short_training_has_a_short_average() -> None:
    assert short_average(None, 10) is None
    assert short_average(0.99, 2400) == 0.99
    decay = short_average(0.9999, 3600)
    assert decay is not None and decay**3600 < 0.01
    assert short_average(0.99, 1) == 0.5


def test_settings_name_their_folders() -> None:
    assert slug({"cfg_scale": 1.5, "steps": 50}) == "cfg_scale=1.5-steps=50"
    assert slug({}) == "default"
