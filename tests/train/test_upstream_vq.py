"""``vq_train`` and ``reconstruction_vq_ddp``: upstream's files from our training and our tokenizer."""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retinar.engine.checkpoint import file_weights, load_tokenizer, save_tokenizer
from retinar.engine.images import to_bytes
from retinar.engine.tokenizer import VQTokenizer
from retinar.train.crops import to_tensor
from retinar.train.order import Order
from retinar.train.patchgan import PatchGAN
from retinar.train.upstream import reconstruction_vq_ddp, vq_train
from retinar.train.upstream.image_folder import ImageFolder
from retinar.train.upstream.quality import psnr, ssim
from retinar.train.upstream.random_crops import RandomCrops
from retinar.train.upstream.vq_flags import Default
from retinar.train.upstream.vq_store import plain
from retinar.train.views import center_crop
from tests.train.upstream_world import SIZE, TOKENIZER, pictures, write_photographs, write_tokenizer

KEYS = {"model", "optimizer", "discriminator", "optimizer_disc", "steps", "args", "retinar"}


class Places:
    def __init__(self, root: Path) -> None:
        self.root, self.data, self.file = root, write_photographs(root / "data"), root / "vq.pt"
        self.model = write_tokenizer(self.file)

    def run(self, name: str, ckpt: Path, *more: str) -> dict[str, Any]:
        """A training of 4 steps, checkpoints every 2; what the last checkpoint holds."""
        assert vq_train.main([*self.flags(name, ckpt), *more]) == 0
        return load(self.checkpoint(name, 4))

    def flags(self, name: str, ckpt: Path) -> list[str]:
        return [
            *(
                "--data-path",
                str(self.data),
                "--cloud-save-path",
                str(self.root / f"{name}-cloud"),
                "--vq-ckpt",
                str(ckpt),
            ),
            *("--results-dir", str(self.root / name), "--vq-model", "VQ-8", "--image-size", str(SIZE)),
            *(
                "--global-batch-size",
                "3",
                "--epochs",
                "2",
                "--ckpt-every",
                "2",
                "--log-every",
                "2",
                "--disc-start",
                "2",
            ),
            *("--perceptual-weight", "0", "--mixed-precision", "none", "--ema"),
        ]

    def checkpoint(self, name: str, step: int) -> Path:
        return self.root / name / "000-VQ-8" / "checkpoints" / f"{step:07d}.pt"


def load(path: Path) -> dict[str, Any]:
    """As upstream does; here with nothing of ours, nor anything else, being called by the file."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory.mktemp("vq"))


@pytest.fixture(scope="module")
def finetuned(places: Places) -> dict[str, Any]:
    """A fine-tuning of a file that holds {model} alone; its first folder."""
    return places.run("fine", places.file, "--finetune")


def test_fine_tuning_from_weights_alone(places: Places, finetuned: dict[str, Any]) -> None:
    assert finetuned.keys() == KEYS | {"ema"} and finetuned["steps"] == 4
    assert finetuned["args"].vq_ckpt == str(places.file) and type(finetuned["args"].codebook_size) is int
    weights = file_weights(places.model)
    assert list(finetuned["model"]) == list(weights) and not equal(finetuned["model"], weights)
    average = finetuned["ema"]["encoder.conv_in.weight"] - weights["encoder.conv_in.weight"]
    change = finetuned["model"]["encoder.conv_in.weight"] - weights["encoder.conv_in.weight"]
    assert 0 < average.norm() < 1e-2 * change.norm()
    [cloud] = (places.root / "fine-cloud").glob("*/000-VQ-8/checkpoints/0000004.pt")
    assert cloud.read_bytes() == places.checkpoint("fine", 4).read_bytes()
    log = (places.root / "fine" / "000-VQ-8" / "log.txt").read_text()
    assert "Dataset contains 7 images" in log and "Initial state: steps=0, epochs=0" in log
    assert "(step=0000002) Train Loss: " in log and "(Discriminator) discriminator_adv_loss: " in log
    assert load_tokenizer(places.checkpoint("fine", 4)).config.codebook_size == 32


def test_optimizers_load_in_torchs_adam(places: Places, finetuned: dict[str, Any]) -> None:
    """Numbers in the order of the module's parameters, as upstream's; all moments of the right shape and place."""
    for module, key, count in ((VQTokenizer(TOKENIZER), "optimizer", 4), (PatchGAN(), "optimizer_disc", 3)):
        adam = torch.optim.Adam(module.parameters(), lr=1.0)
        adam.load_state_dict(copy.deepcopy(finetuned[key]))  # it shares the tensors
        assert adam.param_groups[0]["lr"] == 1e-4 and adam.param_groups[0]["weight_decay"] == 0
        for parameter in module.parameters():
            moments = adam.state[parameter]
            assert moments["exp_avg"].shape == parameter.shape and int(moments["step"]) == count
            parameter.grad = torch.zeros_like(parameter)
        adam.step()


def test_a_restart_is_exact(places: Places, finetuned: dict[str, Any]) -> None:
    again = places.run("again", places.checkpoint("fine", 2))
    for key in ("model", "ema", "discriminator"):
        assert equal(again[key], finetuned[key]), key
    for key in ("optimizer", "optimizer_disc"):
        assert all(equal(again[key]["state"][n], state) for n, state in finetuned[key]["state"].items()), key
    assert "Initial state: steps=2" in (places.root / "again" / "000-VQ-8" / "log.txt").read_text()


def test_upstreams_own_checkpoint_goes_on(places: Places, tmp_path: Path) -> None:
    """Written by torch's Adam, no extras of ours; steps in the file's name; averages of its own."""
    model = VQTokenizer(TOKENIZER)
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    adam.step()
    file = tmp_path / "0000003.pt"
    averages = {
        name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in file_weights(model).items()
    }
    content = {
        "model": file_weights(model),
        "ema": averages,
        "optimizer": adam.state_dict(),
        "args": argparse.Namespace(a=1),
    }
    torch.save(content, file)
    found = places.run("theirs", file)
    name = "post_quant_conv.bias"
    number = [other for other, _ in model.named_parameters()].index(name)
    state = found["optimizer"]["state"][number]
    assert int(state["step"]) == 2 and state["exp_avg"].shape == (TOKENIZER.z_channels,)
    assert 0.9 * 0.2 - 0.11 < float(state["exp_avg"].mean()) < 0.9 * 0.2 + 0.11  # 0.1 x 2, decayed once
    assert torch.allclose(found["ema"][name], averages[name], atol=1e-3)
    assert torch.equal(found["ema"]["quantize.codebook_used"], found["model"]["quantize.codebook_used"])


def test_our_folder_and_no_discriminator(places: Places) -> None:
    save_tokenizer(places.root / "folder", places.model, discriminator=PatchGAN().state_dict())
    flags = places.flags("folder-run", places.root / "folder")
    assert vq_train.main([*flags, "--disc-weight", "0", "--no-local-save"]) == 0
    assert not list(places.checkpoint("folder-run", 4).parent.iterdir())
    [cloud] = (places.root / "folder-run-cloud").glob("*/000-VQ-8/checkpoints/0000004.pt")
    found = load(cloud)
    assert found["optimizer_disc"]["state"] == {} and "main.0.weight" in found["discriminator"]


def test_flags_are_saved_as_plain_values() -> None:
    saved = vars(plain(argparse.Namespace(a=Default(3), b=Path("x"), c=True, d=None, e=1.5, f="y")))
    assert saved == {"a": 3, "b": "x", "c": True, "d": None, "e": 1.5, "f": "y"}
    assert [type(value) for value in saved.values()] == [int, str, bool, type(None), float, str]


REFUSED = {
    ("--data-face-path", "faces"): "no --data-face-path",
    ("--disc-type", "stylegan"): "--disc-type patchgan",
    ("--disc-loss", "vanilla"): "--disc-loss hinge",
    ("--gen-loss", "non-saturating"): "input and target swapped",
    ("--entropy-loss-ratio", "0.1"): "--entropy-loss-ratio 0.0",
    ("--mixed-precision", "fp16"): "--mixed-precision bf16",
    ("--dataset", "t2i_image"): "sort the photographs by class",
    ("--max-grad-norm", "-1"): "--max-grad-norm of at least 0",
    ("--global-batch-size", "4", "--gradient-accumulation-steps", "3"): "--global-batch-size as a multiple",
    ("--image-size", "20"): "--image-size as a multiple of 8",
    ("--codebook-size", "64"): "leave out --codebook-size",
    ("--vq-ckpt", "nothing.pt"): "nothing.pt",
    ("--perceptual-weight", "1"): "--perceptual-weight 0",
}


@pytest.mark.parametrize("change", REFUSED, ids=" ".join)
def test_what_cannot_be_met_is_one_sentence(
    change: tuple[str, ...], places: Places, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(places.root / "nobody"))
    assert vq_train.main([*places.flags("refused", places.file), *change]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and REFUSED[change] in said, said
    assert not (places.root / "refused").exists()


def test_fine_tuning_needs_a_checkpoint(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data-path", str(places.data), "--cloud-save-path", str(places.root / "none"), "--finetune"]
    assert vq_train.main(flags) == 2 and "--vq-ckpt with --finetune" in capsys.readouterr().err


# --- crops


def test_crops_are_of_step_and_seed_alone(places: Places) -> None:
    images = ImageFolder(places.data)
    order = Order(len(images), 6, seed=1, views=2)

    def crops(**changes: Any) -> RandomCrops:
        return RandomCrops(images, **{"size": 24, "seed": 1, "workers": 2, "order": order.batch, **changes})

    one, two = crops(), crops(workers=1)
    batches = [one.batch(step, *order.batch(step), whole=False) for step in range(4)]
    assert batches[0].shape == (6, 3, 24, 24) and not torch.equal(batches[0], batches[1])
    assert torch.equal(two.batch(2, *order.batch(2), whole=False), batches[2])
    parts = [crops().batch(2, *order.batch(2), whole=False, share=(i, 3)) for i in range(3)]
    assert torch.equal(torch.cat(parts), batches[2])
    assert not torch.equal(crops(seed=2).batch(2, *order.batch(2), whole=False), batches[2])


def test_crops_have_the_pixels_of_photographs(places: Places) -> None:
    """Sides from 0.8 of the resized photograph to all of it: a gradient shows where each crop lies."""
    images = ImageFolder(places.data)
    ramp = np.broadcast_to(np.linspace(0, 255, 200).astype(np.uint8)[None, :, None], (200, 200, 3))
    images.load = lambda index: ramp.copy()  # type: ignore[method-assign]

    def order(step: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(64, np.int64), np.arange(64) % 2

    rows = RandomCrops(images, size=40, seed=0, workers=1, order=order).batch(0, *order(0), whole=False)[:, 0, 0]
    left, right = (rows[:, place].mul(127.5).add(127.5) / 255 for place in (0, -1))
    assert bool((right > left)[::2].all()) and bool((right < left)[1::2].all())  # every other one is mirrored
    spans = (right - left).abs()
    assert 0.72 < float(spans.min()) < 0.82 and float(spans.max()) > 0.95


# --- reconstructions


def test_reconstructions_are_upstreams_files(places: Places, tmp_path: Path) -> None:
    """With the averages where there are some, as upstream's script; figures as defined."""
    torch.manual_seed(7)
    average = VQTokenizer(TOKENIZER).eval()
    file = tmp_path / "both.pt"
    torch.save({"model": file_weights(places.model), "ema": file_weights(average)}, file)
    flags = ["--data-path", str(places.data), "--vq-ckpt", str(file), "--vq-model", "VQ-8"]
    sizes = ["--image-size", str(SIZE), "--image-size-eval", str(SIZE)]
    assert reconstruction_vq_ddp.main([*flags, *sizes, "--sample-dir", str(tmp_path)]) == 0
    name = f"VQ-8-imagenet-size-{SIZE}-size-{SIZE}-codebook-size-32-dim-8-seed-0"
    found = pictures(tmp_path / name)
    images = ImageFolder(places.data)
    assert list(found) == [f"{index:06d}.png" for index in range(7)]
    figures = []
    for made, index in zip(found.values(), range(7), strict=True):
        photograph = center_crop(images.load(index), SIZE)
        wanted = to_bytes(average.decode(average.encode(to_tensor(photograph[None]))))[0]
        assert np.abs(made.astype(int) - wanted).max() <= 1  # another number of threads
        pair = (torch.from_numpy(pixels.astype(np.float32) / 255) for pixels in (made, photograph))
        one, two = pair
        figures.append((psnr(one, two), ssim(one, two)))
    with np.load(tmp_path / f"{name}.npz") as archive:
        assert np.array_equal(archive["arr_0"], np.stack(list(found.values())))
    stated = "PSNR: {:f}, SSIM: {:f} \n".format(*np.mean(figures, axis=0))
    assert (tmp_path / f"{name}_results.txt").read_text()[:10] == stated[:10]


def test_reconstructions_are_resized_for_the_evaluation(places: Places, tmp_path: Path) -> None:
    flags = ["--data-path", str(places.data), "--vq-ckpt", str(places.file), "--vq-model", "VQ-8", "--image-size", "64"]
    assert reconstruction_vq_ddp.main([*flags, "--image-size-eval", "48", "--sample-dir", str(tmp_path)]) == 0
    [folder] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert "size-64-size-48" in folder.name and {image.shape for image in pictures(folder).values()} == {(48, 48, 3)}


@settings(max_examples=15, deadline=None)
@given(st.integers(7, 12), st.integers(7, 12), st.integers(0, 99))
def test_psnr_and_ssim_as_defined(height: int, width: int, seed: int) -> None:
    """Against the definitions, window by window."""
    random = np.random.default_rng(seed)
    x, y = random.random((2, height, width, 3))
    assert psnr(*map(torch.from_numpy, (x, y))) == pytest.approx(-10 * math.log10(((x - y) ** 2).mean()))
    assert psnr(torch.from_numpy(x), torch.from_numpy(x)) == math.inf
    values = []
    for top in range(height - 6):
        for left in range(width - 6):
            for channel in range(3):
                a, b = (image[top : top + 7, left : left + 7, channel].ravel() for image in (x, y))
                c = np.cov(a, b)  # of a sample
                light = (2 * a.mean() * b.mean() + 0.02**2) / (a.mean() ** 2 + b.mean() ** 2 + 0.02**2)
                values.append(light * (2 * c[0, 1] + 0.06**2) / (c[0, 0] + c[1, 1] + 0.06**2))
    assert ssim(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(np.mean(values))
    assert ssim(torch.from_numpy(x), torch.from_numpy(x)) == pytest.approx(1.0)
