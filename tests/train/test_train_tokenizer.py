"""Training the tokenizer: it learns, goes on exactly, leaves alone what is frozen, and keeps its codebook in use."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from retinar.engine.checkpoint import load_tokenizer, save_tokenizer
from retinar.engine.errors import InputError
from retinar.engine.progress import silent
from retinar.engine.tokenizer import VectorQuantizer, VQTokenizer
from retinar.train.config import TokenizerTrainConfig
from retinar.train.crops import Crops, random_square, to_tensor
from retinar.train.data.images import ImageSet
from retinar.train.metrics_log import read_metrics
from retinar.train.patchgan import PatchGAN
from retinar.train.revival import CodeRevival
from retinar.train.rng import seed_everything
from retinar.train.tokenizer import TokenizerTask, train_tokenizer
from tests.train.pictures import MODEL, SIZE, picture_config, write_pictures


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"))


def make_task(data: Path, config: TokenizerTrainConfig, **arguments: Any) -> TokenizerTask:
    seed_everything(config.seed)
    return TokenizerTask(VQTokenizer(config.model), config, ImageSet(data), steps=config.total_steps(8), **arguments)


def values(task: TokenizerTask, step: int) -> dict[str, float]:
    return {name: float(value) for name, value in task.step(step).items()}


def test_it_learns(data: Path) -> None:
    """40 steps on eight pictures: the error falls to a third, and more than a third of the codes is in use."""
    config = picture_config(steps=40, crop_size=None, disc_weight=0.0, accumulation=1, batch_size=8, revive_after=5)
    task = make_task(data, config, valid=ImageSet(data, "valid"))
    history = [values(task, step) for step in range(40)]
    first, last = (sum(line["reconstruction"] for line in part) for part in (history[:3], history[-3:]))
    assert last < first / 3
    figures = task.evaluate(40)
    assert figures["valid_l2"] < 0.15 and figures["valid_psnr"] > 10 * np.log10(4 / 0.15) - 1
    assert figures["valid_usage"] > 0.34 and 0.34 * 32 < figures["valid_perplexity"] <= 32


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


@pytest.mark.parametrize("point", ["after the generator's step", "in the discriminator's"])
def test_resume_is_exact(point: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that has a state (see picture_config): killed in step 5, resumed from the checkpoint of step 3."""
    config = picture_config()
    train_tokenizer(config, data, tmp_path / "whole", progress=silent)

    name, owner = ("_revive", TokenizerTask) if point.startswith("after") else ("forward", PatchGAN)
    original = getattr(owner, name)

    def kill(self: Any, *arguments: Any) -> Any:
        if killed[0] == 1:
            raise Killed
        return original(self, *arguments)

    killed = [0]
    original_step = TokenizerTask.step

    def step(self: TokenizerTask, number: int) -> Any:
        killed[0] += number == 5
        return original_step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill)
        patch.setattr(TokenizerTask, "step", step)
        with pytest.raises(Killed):
            train_tokenizer(config, data, tmp_path / "killed", progress=silent)
    result = train_tokenizer(config, data, tmp_path / "killed", resume=True, progress=silent)
    assert (result.step, result.reason) == (8, "finished")

    for name in ("model.safetensors", "discriminator.safetensors", "config.json"):
        assert (tmp_path / "killed/model" / name).read_bytes() == (tmp_path / "whole/model" / name).read_bytes()
    lines = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "killed")]
    for line in (*lines[0], *lines[1]):
        line.pop("seconds", None)
    assert lines[0] == lines[1] and len(lines[0]) == 4
    train_tokenizer(config, data, tmp_path / "killed", resume=True, progress=silent)  # nothing left to do
    assert (tmp_path / "killed/model/config.json").read_bytes() == (tmp_path / "whole/model/config.json").read_bytes()
    sheet = Image.open(tmp_path / "killed/reconstructions/step-0000008.png")
    assert sheet.size == (4 * SIZE, 2 * SIZE)


def test_the_decoder_alone(data: Path, tmp_path: Path) -> None:
    """Encoder and codebook keep their bits, so codes extracted before stay valid; the decoder learns."""
    torch.manual_seed(7)
    start = VQTokenizer(MODEL)
    torch.save({"model": start.state_dict()}, tmp_path / "upstream.pt")  # all that published files hold
    config = picture_config(scope="decoder", start="checkpoint")
    with pytest.raises(InputError, match="--init"):
        train_tokenizer(config, data, tmp_path / "run", progress=silent)
    result = train_tokenizer(config, data, tmp_path / "run", init=tmp_path / "upstream.pt", progress=silent)
    assert result.model is not None
    trained = load_tokenizer(result.model)
    before, after = start.state_dict(), trained.state_dict()
    for name in before:
        frozen = name.startswith(("encoder.", "quant_conv.", "quantize.embedding"))
        if frozen:
            assert torch.equal(before[name], after[name]), name
    for name in ("decoder.conv_in.weight", "decoder.conv_out.bias", "post_quant_conv.weight"):
        assert not torch.equal(before[name], after[name]), name
    images = to_tensor(ImageSet(data).load_batch(range(8)))
    assert torch.equal(start.eval().encode(images), trained.encode(images))


def test_the_average_is_what_is_exported_and_evaluated(data: Path, tmp_path: Path) -> None:
    task = make_task(data, picture_config(), valid=ImageSet(data, "valid"))
    for step in range(3):
        task.step(step)
    task.export(tmp_path / "model")
    saved = load_tokenizer(tmp_path / "model").state_dict()
    assert task.ema is not None
    for name, average in task.ema.averages.items():
        assert torch.equal(saved[name], average)
    assert not torch.equal(saved["decoder.conv_out.weight"], task.model.decoder.conv_out.weight)
    training = json.loads((tmp_path / "model" / "config.json").read_text())["training"]
    assert training == {"recipe": "pictures", "steps": 3, "ema": True}
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    task.evaluate(3)
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())


def test_accumulation_changes_nothing(data: Path) -> None:
    """Without a discriminator, whose BatchNorm sees its batch: one part or four, to rounding."""
    seen = []
    for accumulation in (1, 4):
        task = make_task(data, picture_config(accumulation=accumulation, disc_weight=0.0, revive_after=None))
        history = [values(task, step)["loss"] for step in range(3)]
        seen.append((history, task.model.decoder.conv_out.weight.detach().clone()))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-4)
    assert torch.allclose(seen[0][1], seen[1][1], atol=1e-4)


def test_the_discriminator_joins_in_its_step(data: Path) -> None:
    task = make_task(data, picture_config(disc_start=3))
    assert task.discriminator is not None
    before = task.discriminator.main[0].weight.detach().clone()
    assert "adversarial" not in values(task, 0) and "adversarial" not in values(task, 1)
    assert torch.equal(before, task.discriminator.main[0].weight)
    joined = values(task, 2)
    assert {"adversarial", "disc_loss", "logits_real", "logits_fake"} <= joined.keys()
    assert not torch.equal(before, task.discriminator.main[0].weight)
    assert all(parameter.requires_grad for parameter in task.discriminator.parameters())


def test_codes_come_after_a_plain_autoencoder(data: Path, tmp_path: Path) -> None:
    """Before ``quantize_from`` there are no codes and no codebook losses; at it, every code lies on a latent."""
    config = picture_config(quantize_from=3, disc_weight=0.0, revive_after=None, crop_size=None)
    task = make_task(data, config)
    before = task.model.quantize.embedding.weight.detach().clone()
    for step in range(3):
        line = values(task, step)
        assert line["codebook"] == line["commitment"] == line["usage"] == 0.0 < line["reconstruction"]
        assert torch.equal(task.model.quantize.embedding.weight, before) == (step < 2)
        if step == 1:
            with pytest.raises(InputError, match="quantize_from"):
                task.export(tmp_path / "early")
    assert not (tmp_path / "early").exists()
    assert not (task.model.quantize.embedding.weight == before).all(dim=1).any()
    assert values(task, 3)["codebook"] > 0
    with pytest.raises(InputError, match="below the run's 8 steps"):
        make_task(data, picture_config(quantize_from=8))
    assert values(make_task(data, picture_config(quantize_from=3, scope="decoder")), 0)["codebook"] > 0


@pytest.mark.parametrize("revive_after", [None, 2])
def test_the_codebook_waits_then_lies_on_latents(revive_after: int | None, data: Path) -> None:
    """Whatever ``revive_after``: no code moves before ``quantize_from``, then each onto a latent of its own."""
    config = picture_config(quantize_from=5, revive_after=revive_after, crop_size=None, mirror=False)
    task = make_task(data, config)
    weight_KC = task.model.quantize.embedding.weight
    before = weight_KC.detach().clone()
    for step in range(4):
        task.step(step)
        assert torch.equal(weight_KC, before)
    task.step(4)
    batch_BCHW = task.crops.batch(4, *task.order.batch(4), whole=False)
    with torch.no_grad():
        latents_BChw = task.model.train().latents(batch_BCHW)
    z_NC = F.normalize(latents_BChw.permute(0, 2, 3, 1).flatten(0, 2), dim=-1)
    distances_KN = (weight_KC.detach()[:, None] - z_NC).abs().amax(dim=-1)
    assert (distances_KN.amin(dim=1) < 1e-6).all()
    assert task.ema is not None
    assert torch.equal(task.ema.averages["quantize.embedding.weight"], weight_KC)
    moments = task.optimizer.state[weight_KC]
    assert not moments["exp_avg"].any() and not moments["exp_avg_sq"].any()
    placed = weight_KC.detach().clone()
    assert values(task, 5)["codebook"] > 0 and not torch.equal(weight_KC, placed)


@pytest.mark.parametrize("revive_after", [None, 2])
@pytest.mark.parametrize("saved", [4, 5], ids=["saved before it", "saved after it"])
def test_resume_across_the_first_codes(
    saved: int, revive_after: int | None, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 6 and resumed from a checkpoint on either side of ``quantize_from``: the same bytes."""
    config = picture_config(quantize_from=5, revive_after=revive_after, disc_weight=0.0, checkpoint_every=saved)
    train_tokenizer(config, data, tmp_path / "whole", progress=silent)
    original = TokenizerTask.step

    def step(self: TokenizerTask, number: int) -> Any:
        if number == 6:
            raise Killed
        return original(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTask, "step", step)
        with pytest.raises(Killed):
            train_tokenizer(config, data, tmp_path / "killed", progress=silent)
    assert [path.name for path in (tmp_path / "killed/checkpoints").iterdir()] == [f"step-{saved:07d}"]
    train_tokenizer(config, data, tmp_path / "killed", resume=True, progress=silent)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed/model" / name).read_bytes() == (tmp_path / "whole/model" / name).read_bytes()


def test_bf16_is_near(data: Path) -> None:
    exact, mixed = (
        values(make_task(data, picture_config(precision=precision)), 0)["loss"] for precision in ("fp32", "bf16")
    )
    assert mixed == pytest.approx(exact, rel=0.05) and mixed != exact


def test_perceptual_square(data: Path, vgg_weights: Path) -> None:
    """With real weights the perceptual term is there, its digest is noted, and the square is of the crop."""
    from retinar.train.perceptual import PerceptualLoss

    perceptual = PerceptualLoss(vgg_weights)
    config = picture_config(perceptual="vgg", perceptual_side=0.5, crop_size=32, perceptual_from=1)
    task = make_task(data, config, perceptual=perceptual)
    plain = make_task(data, picture_config(crop_size=32))
    assert "perceptual" not in (first := values(task, 0))
    assert first == values(plain, 0)  # before its step nothing of it is felt
    assert torch.equal(task.model.decoder.conv_out.weight, plain.model.decoder.conv_out.weight)
    assert values(task, 1)["perceptual"] > 0.1


def test_bad_input_is_one_sentence(data: Path, tmp_path: Path) -> None:
    def refused(words: str, folder: Path = data, init: Path | None = None, **changes: Any) -> None:
        with pytest.raises(InputError, match=words):
            train_tokenizer(picture_config(**changes), folder, tmp_path / "run", init=init, progress=silent)
        assert not (tmp_path / "run" / "model").exists()

    refused("32x32", model=dataclasses.replace(MODEL, image_size=64))
    refused("perceptual_weights=PATH", perceptual="vgg")
    refused("is not one", folder=tmp_path / "absent")
    save_tokenizer(tmp_path / "other", VQTokenizer(dataclasses.replace(MODEL, codebook_size=16)))
    refused(r"quantize\.embedding\.weight", init=tmp_path / "other")
    with pytest.raises(InputError, match="crop_size=32 or none"):
        make_task(data, picture_config(crop_size=48))
    with pytest.raises(InputError, match="crops of at least 24 pixels for disc_layers 3, found 16"):
        picture_config(disc_layers=3)
    assert values(make_task(data, picture_config(crop_size=24, disc_layers=3, disc_start=1)), 0)["disc_loss"] > 0


def test_the_weights_of_vgg_may_move(data: Path, tmp_path: Path, vgg_weights: Path) -> None:
    """A run goes on with the same file at another path; another file is another run."""
    config = picture_config(perceptual="vgg", crop_size=None, steps=1, disc_weight=0.0)
    moved = tmp_path / f"moved{vgg_weights.suffix}"
    moved.symlink_to(vgg_weights.resolve())
    first = dataclasses.replace(config, perceptual_weights=str(vgg_weights))
    train_tokenizer(first, data, tmp_path / "run", progress=silent)
    second = dataclasses.replace(config, perceptual_weights=str(moved), steps=2)
    assert train_tokenizer(second, data, tmp_path / "run", resume=True, progress=silent).step == 2


# --- crops


def test_crops(data: Path) -> None:
    images = ImageSet(data)
    crops = Crops(images, size=SIZE, crop_size=16, seed=5)
    indices, mirrored = np.array([3, 0, 3, 7, 1]), np.array([0, 1, 0, 0, 1])
    batch = crops.batch(9, indices, mirrored, whole=False)
    assert batch.shape == (5, 3, 16, 16) and batch.dtype == torch.float32
    assert not torch.equal(batch[0], batch[2])  # the same image, another place
    assert torch.equal(batch, Crops(images, size=SIZE, crop_size=16, seed=5).batch(9, indices, mirrored, whole=False))
    assert not torch.equal(batch, crops.batch(10, indices, mirrored, whole=False))
    for row, index, mirror in zip(batch, indices, mirrored, strict=True):
        source = to_tensor(images.load_batch([index]))[0]
        crop = row.flip(-1) if mirror else row
        windows = source.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4)
        assert (windows == crop).flatten(2).all(-1).any()


def test_whole_images_have_the_crops_pixels(data: Path) -> None:
    images = ImageSet(data)
    crops = Crops(images, size=SIZE, crop_size=16, seed=0)
    whole = crops.batch(0, np.arange(8), np.zeros(8, np.int64), whole=True)
    assert whole.shape == (2, 3, SIZE, SIZE)
    assert torch.equal(whole, to_tensor(images.load_batch([0, 1])))
    assert len(crops.batch(0, np.arange(2), np.zeros(2, np.int64), whole=True)) == 1


def test_pixels_to_numbers() -> None:
    got = to_tensor(np.array([0, 127, 128, 255], np.uint8).reshape(1, 1, 4, 1).repeat(3, axis=3))
    assert got[0, 0, 0].tolist() == pytest.approx([-1.0, 127 / 127.5 - 1, 128 / 127.5 - 1, 1.0], abs=1e-7)


def test_random_squares_cover_the_crop() -> None:
    corners = {random_square(32, 0.5, seed=0, step=step)[0].start for step in range(200)}
    assert corners == set(range(17))
    assert random_square(32, 1.0, seed=0, step=0) == (slice(0, 32), slice(0, 32))
    assert random_square(24, 0.1, seed=0, step=0)[0].stop - random_square(24, 0.1, seed=0, step=0)[0].start == 16


# --- revival


def revival(codes: int = 16, after: int = 3) -> tuple[VectorQuantizer, CodeRevival]:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(dataclasses.replace(MODEL, codebook_size=codes))
    return quantizer, CodeRevival(quantizer, after=after, seed=0)


def test_unused_codes_move_onto_latents() -> None:
    quantizer, revived = revival()
    latents = torch.randn(2, 8, 4, 4)
    before = quantizer.embedding.weight.detach().clone()
    assert [revived.due(step) for step in range(6)] == [False, False, True, False, False, True]
    revived.note(1, torch.tensor([0, 5]))
    moments, average = torch.ones(16, 8), before.clone()
    assert revived.revive(2, latents, [(moments, False), (average, True)]) == 14
    after = quantizer.embedding.weight.detach()
    z = F.normalize(latents.permute(0, 2, 3, 1).flatten(0, 2), dim=-1)
    for code in range(16):
        if code in (0, 5):
            assert torch.equal(after[code], before[code]) and (moments[code] == 1).all()
        else:
            assert (z - after[code]).abs().sum(1).min() < 1e-6 and (moments[code] == 0).all()
    assert torch.equal(average, after)
    assert len({tuple(row.tolist()) for row in after}) == 16  # no two onto the same latent
    assert revived.revive(2, latents, []) == 0  # they count as used now
    quantizer.zero_grad()
    assert len(quantizer(latents)[1].unique()) > len(before) // 2


def test_latents_that_are_no_numbers_move_nothing() -> None:
    """The loop names the step of the NaN; drawing among such latents would be a traceback."""
    quantizer, revived = revival()
    before = quantizer.embedding.weight.detach().clone()
    assert revived.revive(2, torch.full((1, 8, 4, 4), torch.nan), []) == 0
    assert torch.equal(quantizer.embedding.weight, before)


def test_more_unused_codes_than_latents() -> None:
    _, revived = revival(codes=40)
    assert revived.revive(2, torch.randn(1, 8, 4, 4), []) == 16
    assert (revived.last_used_K == 3).sum() == 16


def test_latents_that_codes_hit_already_are_not_taken() -> None:
    """Fifteen positions lie on a code (black background), one far from all: that one is drawn."""
    quantizer, revived = revival()
    rows = F.normalize(quantizer.embedding.weight.detach(), dim=-1)
    far = -rows.mean(0)
    latents = torch.stack([rows[0]] * 15 + [far]).T.reshape(1, 8, 4, 4)
    revived.note(1, torch.arange(15))
    assert revived.revive(2, latents, []) == 1
    assert torch.allclose(quantizer.embedding.weight[15], F.normalize(far, dim=0), atol=1e-6)


def test_revival_keeps_more_of_the_codebook_in_use(data: Path) -> None:
    used = []
    for after in (None, 2):
        config = picture_config(
            steps=12, revive_after=after, disc_weight=0.0, model=dataclasses.replace(MODEL, codebook_size=256)
        )
        task = make_task(data, config, valid=ImageSet(data, "valid"))
        for step in range(12):
            task.step(step)
        used.append(task.evaluate(12)["valid_usage"])
    assert used[1] > 1.5 * used[0]


def test_discriminator_file_is_upstreams(data: Path, tmp_path: Path) -> None:
    task = make_task(data, picture_config())
    task.export(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "discriminator.safetensors")
    PatchGAN(8, 1).load_state_dict(stored)
