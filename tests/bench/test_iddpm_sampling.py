"""iDDPM's images: each its own, with their provenance, in folders that go on where they stopped, and made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retinar.bench.baselines.iddpm import UNet, iddpm_config
from retinar.bench.baselines.iddpm.checkpoint import load_iddpm, save_iddpm
from retinar.bench.baselines.iddpm.generate import GUIDED, generate_folder, made_by_iddpm, reproduce
from retinar.bench.baselines.iddpm.noise import seeded
from retinar.bench.baselines.iddpm.sampler import DiffusionParams, IDDPMSampler
from retinar.engine import images, provenance
from retinar.engine.errors import InputError
from retinar.engine.progress import silent
from tests.bench.iddpm_tiny import MODEL, SIZE

COUNTS = [("healthy", 2), ("npdr", 2)]
STEPS = 5
DDIM = {"sampler": "ddim"}


def network(seed: int = 0, **fields: Any) -> UNet:
    """Weights that say something: a fresh network predicts nothing."""
    torch.manual_seed(seed)
    model = UNet(iddpm_config("iDDPM-tiny", **{**MODEL, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_iddpm(folder, network(), classes=("healthy", "npdr"))
    return folder


@pytest.fixture(scope="module")
def sampler(model: Path) -> IDDPMSampler:
    return IDDPMSampler.from_pretrained(model, "cpu")


def make(sampler: IDDPMSampler, out: Path, **options: Any) -> dict[str, Any]:
    return generate_folder(sampler, out, COUNTS, **{"seed": 3, "steps": STEPS, "progress": silent, **options})


@pytest.fixture(scope="module")
def whole(sampler: IDDPMSampler, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert make(sampler, out, npz=True, model=model) == {"out": str(out), "images": 4, "made": 4, "kept": 0}
    return out


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_the_folder_is_complete(whole: Path) -> None:
    files = tree(whole)
    names = [f"images/healthy/00000{i}.png" for i in (0, 1)] + [f"images/npdr/00000{i}.png" for i in (2, 3)]
    assert sorted(files) == sorted([*names, "manifest.jsonl", "run.json", "samples.npz", "sheet.png"])
    lines = [json.loads(line) for line in files["manifest.jsonl"].decode().splitlines()]
    assert [(line["file"], line["index"], line["synthetic"]) for line in lines] == [
        (name, index, True) for index, name in enumerate(names)
    ]
    run = json.loads(files["run.json"])
    assert run["labels"] == [["healthy", 2], ["npdr", 2]] and run["config_read"]["diffusion"]["num_heads"] == 2
    assert run["parameters"] == {"steps": STEPS, "sampler": "ancestral", "eta": 0.0, "cfg_scale": GUIDED}
    with np.load(whole / "samples.npz") as archive:
        for pixels_HWC, name in zip(archive["arr_0"], names, strict=True):
            assert np.array_equal(pixels_HWC, np.asarray(Image.open(whole / name)))
            assert pixels_HWC.shape == (SIZE, SIZE, 3) and (pixels_HWC % 255 > 0).mean() > 0


def test_provenance(whole: Path, sampler: IDDPMSampler) -> None:
    file = whole / "images/npdr/000003.png"
    found = Image.open(file).info
    assert found["software"] == "retinar" and found["synthetic"] == "true" and found["label"] == "npdr"
    assert (found["seed"], found["index"], found["class"]) == ("3", "3", "1")
    assert found["checkpoint"] == sampler.origin.checkpoint and not set(provenance.OF_CODES) & set(found)
    assert json.loads(found["implementation"])["runner"] == "iddpm" and made_by_iddpm(file)
    with pytest.raises(InputError, match="carries no tokenizer"):
        provenance.read(file)


@pytest.mark.parametrize("params", [{}, DDIM, {**DDIM, "eta": 1.0, "cfg_scale": 2.0}], ids=str)
def test_an_image_is_its_own(sampler: IDDPMSampler, params: dict[str, Any]) -> None:
    """Alone, among others, and in another order: equal to the bit."""
    together = sampler.generate(["healthy", "npdr", "npdr"], seed=7, steps=STEPS, start_index=4, **params)
    alone = sampler.generate(["npdr"], seed=7, steps=STEPS, start_index=5, **params)
    assert np.array_equal(pixels(together[1]), pixels(alone[0])) and alone[0].info == together[1].info
    for changes in ({"seed": 8}, {"start_index": 6}, {"steps": STEPS + 1}):
        other = sampler.generate(["npdr"], **{"seed": 7, "steps": STEPS, "start_index": 5, **params, **changes})
        assert not np.array_equal(pixels(other[0]), pixels(alone[0])), changes
    other = sampler.generate(["healthy"], seed=7, steps=STEPS, start_index=5, **params)
    assert not np.array_equal(pixels(other[0]), pixels(alone[0]))


def test_batches_make_nearly_the_same(model: Path, sampler: IDDPMSampler) -> None:
    """As a GPU does: rounding aside, an image is the same among others, since its noise is its own."""
    fast = IDDPMSampler.from_pretrained(model, "cpu")
    fast.batch_invariant = False
    found, wanted = (
        each.generate(["healthy", "npdr", "npdr"], seed=1, steps=STEPS, sampler="ancestral", max_images=2)
        for each in (fast, sampler)
    )
    assert max(int(np.abs(pixels(a) - pixels(b)).max()) for a, b in zip(found, wanted, strict=True)) <= 1


def test_the_samplers_differ_and_bfloat16_is_near(model: Path, sampler: IDDPMSampler) -> None:
    def one(by: IDDPMSampler = sampler, **params: Any) -> np.ndarray:
        return pixels(by.generate(["npdr"], seed=2, steps=20, **params)[0])

    variants = [one(), one(**DDIM), one(**DDIM, eta=1.0), one(cfg_scale=3.0)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(variants) for b in variants[:i])
    half = IDDPMSampler.from_pretrained(model, "cpu", "bfloat16")
    assert half.origin.dtype == "bfloat16" and 0 < np.abs(one(half, **DDIM) - one(**DDIM)).mean() < 8


def test_an_interrupted_folder_goes_on(sampler: IDDPMSampler, model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    files = [out / f"images/{name}.png" for name in ("healthy/000000", "healthy/000001", "npdr/000002", "npdr/000003")]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:90])
    touched = Image.open(files[2])
    touched.load()
    touched.putpixel((3, 3), (1, 2, 3))
    images.save_png(touched, files[2])
    (out / "manifest.jsonl").unlink()
    summary = make(sampler, out, npz=True, model=model)
    assert (summary["made"], summary["kept"]) == (3, 1) and tree(out) == tree(whole)
    for changes in ({"steps": 6}, {"seed": 4}, {"cfg_scale": 1.0}, {"method": "ddim"}):
        with pytest.raises(InputError, match="holds a different run"):
            make(sampler, out, **changes)


def test_reproduce(whole: Path, model: Path, tmp_path: Path) -> None:
    file = whole / "images/healthy/000001.png"
    report = reproduce(file, progress=silent)
    assert report["equal"] and report["verdict"] == "equal: the same pixels" and "codes" not in report
    save_iddpm(tmp_path / "other", network(5), classes=("healthy", "npdr"))
    with pytest.raises(InputError, match="was made by the checkpoint"):
        reproduce(file, tmp_path / "other", progress=silent)
    touched = Image.open(file)
    touched.load()
    touched.putpixel((0, 0), tuple(255 - value for value in touched.getpixel((0, 0))))
    images.save_png(touched, tmp_path / "touched.png")
    report = reproduce(tmp_path / "touched.png", model, progress=silent)
    assert not report["equal"] and not report["file_untouched"] and report["largest_pixel_difference"] > 0
    touched.info["parameters"] = '{"steps": 0}'
    images.save_png(touched, tmp_path / "damaged.png")
    with pytest.raises(InputError, match=r"provenance in .* is damaged"):
        reproduce(tmp_path / "damaged.png", model, progress=silent)


def test_models_without_a_null_class_or_classes(tmp_path: Path) -> None:
    plain = {"null_class": False, "class_dropout_prob": 0.0}
    one = IDDPMSampler(network(**plain), classes=("healthy", "npdr"), device="cpu")
    generate_folder(one, tmp_path / "one", [("npdr", 1)], steps=2, progress=silent)
    assert json.loads((tmp_path / "one/run.json").read_text())["parameters"]["cfg_scale"] == 1.0
    with pytest.raises(InputError, match="no null class"):
        one.generate(["npdr"], steps=2, cfg_scale=1.5)
    free = IDDPMSampler(network(**plain, num_classes=None), device="cpu")
    generate_folder(free, tmp_path / "free", [("all", 1)], steps=2, progress=silent)
    assert (tmp_path / "free/images/all/000000.png").is_file()


def test_what_cannot_be_made_is_refused(sampler: IDDPMSampler, tmp_path: Path) -> None:
    for counts, options, words in (
        ([("nobody", 1)], {}, "unknown label"),
        ([("npdr", 0)], {}, "count must be at least 1"),
        ([], {}, "at least one label"),
        (COUNTS, {"steps": 41}, "at most the 40"),
        (COUNTS, {"steps": 0}, "steps must be"),
        (COUNTS, {"eta": 1.5, "method": "ddim"}, "eta must be"),
        (COUNTS, {"eta": 0.5}, "eta is DDIM's"),
        (COUNTS, {"method": "heun"}, "ddim or ancestral"),
        (COUNTS, {"cfg_scale": -1.0}, "cfg-scale must be"),
        (COUNTS, {"seed": 2**64}, "seed"),
    ):
        with pytest.raises(InputError, match=words):
            generate_folder(sampler, tmp_path / "out", counts, **options, progress=silent)
    with pytest.raises(InputError, match="max-images"):
        fast = IDDPMSampler(network(), classes=("healthy", "npdr"), device="cpu")
        fast.batch_invariant = False
        fast.generate(["npdr"], steps=2, max_images=0)
    with pytest.raises(InputError, match="float32 or bfloat16"):
        IDDPMSampler(network(), device="cpu", dtype="int8")
    assert not (tmp_path / "out").exists()


def test_a_loaded_network_is_ready(model: Path) -> None:
    found = load_iddpm(model, dtype=torch.bfloat16)
    assert not found.training and {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}


numbers = st.integers(0, 2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, max_size=3), st.lists(numbers, max_size=3), st.sampled_from(["noise", "image"]))
def test_generators_are_their_names(one: list[int], other: list[int], purpose: str) -> None:
    first, again, second = seeded(purpose, *one), seeded(purpose, *one), seeded("noise", *other)
    assert first.initial_seed() == again.initial_seed()
    assert (first.initial_seed() == second.initial_seed()) == ((purpose, one) == ("noise", other))


@given(
    st.integers(1, 4000),
    st.sampled_from(["ddim", "ancestral"]),
    st.floats(0, 1),
    st.floats(0, 1e6, allow_nan=False),
)
def test_parameters_survive_the_png(steps: int, sampler: Any, eta: float, scale: float) -> None:
    params = DiffusionParams(steps, sampler, eta if sampler == "ddim" else 0.0, scale)
    assert DiffusionParams(**json.loads(json.dumps(params.to_dict()))) == params
