"""Training iDDPM: it learns, resumes exactly, and several processes train as one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retinar.bench.baselines.iddpm import UNet, iddpm_config
from retinar.bench.baselines.iddpm.checkpoint import is_iddpm, load_iddpm, save_iddpm
from retinar.bench.baselines.iddpm.recipes import IDDPM_RECIPES, iddpm_recipe
from retinar.bench.baselines.iddpm.timesteps import EVEN, SEEN, Timesteps
from retinar.bench.baselines.iddpm.train_config import IDDPMTrainConfig
from retinar.bench.baselines.iddpm.training import IDDPMTask, step_flops, train_iddpm
from retinar.engine.checkpoint import load_gpt, read_config
from retinar.engine.errors import InputError
from retinar.engine.progress import silent
from retinar.train.config import apply_overrides, from_dict, to_dict
from retinar.train.data.images import ImageSet
from retinar.train.metrics_log import read_metrics
from retinar.train.world import World
from tests.bench.iddpm_tiny import LEARNED, MODEL, SIZE, STEPS, tiny_config, train
from tests.train.pictures import write_pictures
from tests.train.processes import run_processes

CPU = torch.device("cpu")
DROPPING = {"dropout_p": 0.2, "class_dropout_prob": 0.3}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), train=7, valid=4, size=SIZE)


def run(config: IDDPMTrainConfig, pictures: Path, out: Path, **options: Any) -> Any:
    return train_iddpm(config, pictures, out, progress=silent, **options)


def reported(run_folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run_folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "model" / "model.safetensors")


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    error = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return (error / sum(float(tensor.square().sum()) for tensor in wanted.values())) ** 0.5


def test_a_run_learns_and_leaves_a_checkpoint(pictures: Path, tmp_path: Path) -> None:
    config = tiny_config(steps=40, log_every=10, eval_every=20, batch_size=16, accumulation=1, meters=True)
    result = run(config, pictures, tmp_path / "run")
    assert (result.step, result.reason, result.model) == (40, "finished", tmp_path / "run" / "model")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["mse"] < 0.6 * lines[0]["mse"]
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["mse"] + lines[-1]["vb"])
    assert lines[-1]["valid_loss"] < lines[1]["valid_loss"] and lines[-1]["images_per_s"] > 0
    stored = read_config(result.model)
    assert stored["kind"] == "iddpm" and stored["classes"] == ["healthy", "npdr"]
    assert stored["training"] == {"recipe": "tiny", "steps": 40, "ema": True}
    assert "healthy, npdr" in (result.model / "README.md").read_text()
    assert load_iddpm(result.model).config == config.model


@pytest.mark.parametrize("objective", ["hybrid", "vlb"])
def test_resume_is_exact(objective: str, pictures: Path, tmp_path: Path) -> None:
    """A run that stops after each step, with every dropout on, ends bitwise as one that does not."""
    more = {"timesteps": "loss-second-moment"} if objective == "vlb" else {}
    config = tiny_config({**DROPPING, "objective": objective, "diffusion_steps": 4}, **more)
    run(config, pictures, tmp_path / "whole")
    for step in range(STEPS):
        result = run(config, pictures, tmp_path / "parts", resume=True, max_minutes=1e-9)
        assert result.step == step + 1
    assert reported(tmp_path / "parts") == reported(tmp_path / "whole")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    with pytest.raises(InputError, match=r"model\.noise_schedule \('cosine', now 'linear'\)"):
        other = apply_overrides(config, ["model.noise_schedule=linear", "model.diffusion_steps=40"])
        run(other, pictures, tmp_path / "parts", resume=True)


@pytest.fixture(scope="module")
def spread(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes give in each mode."""
    out = tmp_path_factory.mktemp("modes")
    names = ("ddp", "fsdp", "vlb")
    run_processes(2, "tests.bench.iddpm_tiny", str(out), str(pictures), *names)
    return {name: torch.load(out / f"{name}.pt") for name in names}


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "vlb"])
def test_two_processes_train_as_one(mode: str, spread: dict[str, Any], pictures: Path) -> None:
    """Each draws its share of the same noise, diffusion steps and labels left out."""
    alone, found = train(World(CPU), str(pictures), **(LEARNED if mode == "vlb" else {})), spread[mode]
    torch.testing.assert_close(found["values"], alone["values"], rtol=1e-4, atol=1e-6)
    assert found["valid"] == pytest.approx(alone["valid"], rel=1e-4)
    assert distance(found["model"], alone["model"]) < 1e-4 and distance(found["ema"], alone["ema"]) < 1e-4
    assert torch.equal(found["seen"], alone["seen"]) and int(found["seen"].sum()) == (48 if mode == "vlb" else 0)


def make(pictures: Path, **changes: Any) -> IDDPMTask:
    torch.manual_seed(1)
    config = tiny_config(**changes)
    sets = (ImageSet(pictures, split) for split in ("train", "valid"))
    return IDDPMTask(UNet(config.model), config, next(sets), steps=STEPS, valid=next(sets))


def test_validation_can_be_compared(pictures: Path) -> None:
    """The same images, diffusion steps and noise whatever the seed and the batch; of the averaged weights, and the
    model's own stay as they are."""
    task, other = make(pictures), make(pictures, seed=5, batch_size=2, accumulation=1)
    assert task.evaluate(0) == task.evaluate(3)
    assert other.evaluate(0) == pytest.approx(task.evaluate(0), rel=1e-5)
    assert task.evaluate(0)["valid_mse"] == pytest.approx(1.0, abs=0.1)  # a fresh network predicts nothing
    for step in range(3):
        task.step(step)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    averaged = task.evaluate(3)
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())
    assert task.ema is not None
    task.model.load_state_dict(task.ema.averages)
    task.ema = None
    assert task.evaluate(3) == averaged


def test_labels_are_left_out_and_noise_is_new_each_step(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(pictures, model={"class_dropout_prob": 0.5}, batch_size=16, accumulation=1)
    seen: list[Any] = []
    losses = task._losses
    monkeypatch.setattr(task, "_losses", lambda *given: (seen.append(given), losses(*given))[1])
    for step in (0, 1, 0):
        task.step(step)
    (x_0, t_0, noise_0, labels_0), (_, t_1, noise_1, labels_1), (x_2, t_2, noise_2, labels_2) = seen
    assert torch.equal(x_0, x_2) and torch.equal(t_0, t_2) and torch.equal(noise_0, noise_2)
    assert torch.equal(labels_0, labels_2) and set(torch.cat([labels_0, labels_1]).tolist()) == {0, 1, 2}
    assert not torch.equal(t_0, t_1) and not torch.equal(noise_0, noise_1)
    assert len({float(each.sum()) for each in noise_0}) == 16 and float(x_0.abs().max()) <= 1


def test_steps_are_drawn_where_the_losses_are_large() -> None:
    timesteps = Timesteps("loss-second-moment", 5, 4000, seed=3)
    t_B, weights_B = timesteps.draw(0)
    assert torch.equal(weights_B, torch.ones(4000)) and torch.bincount(t_B).min() > 700
    losses_T = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])
    for _ in range(SEEN + 3):
        timesteps.update(torch.arange(5), losses_T)
    t_B, weights_B = timesteps.draw(1)
    share_T = (1 - EVEN) * losses_T / losses_T.sum() + EVEN / 5
    drawn_T = torch.bincount(t_B, minlength=5) / 4000
    assert float((drawn_T - share_T).abs().max()) < 6 * (0.25 / 4000) ** 0.5
    torch.testing.assert_close(weights_B, 1 / (5 * share_T[t_B]))
    assert float((losses_T[t_B] * weights_B).mean()) == pytest.approx(4.0, rel=0.02)  # the plain mean, less noisy
    assert torch.equal(timesteps.draw(1)[0], t_B) and not torch.equal(timesteps.draw(2)[0], t_B)


def test_a_gradient_that_is_not_finite_is_left_out(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = make(pictures, guard="skip", model={"dropout_p": 0.0})
    with torch.no_grad():
        task.model.out[2].bias.fill_(float("inf"))
    before = {name: parameter.clone() for name, parameter in task.model.named_parameters()}
    values = task.step(0)
    assert values["skipped"] == 1.0 and "loss" not in values and "left out" in capsys.readouterr().err
    assert all(torch.equal(before[name], parameter) for name, parameter in task.model.named_parameters())


def test_starting_from_a_checkpoint(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    source = UNet(tiny_config({"num_classes": 5}).model)
    save_iddpm(tmp_path / "start", source, classes=("a", "b", "c", "d", "e"))
    config = tiny_config(steps=1, optim=dataclasses.replace(tiny_config().optim, lr=1e-12))
    run(config, pictures, tmp_path / "run", init=tmp_path / "start")
    assert "new class embeddings (3 rows)" in capsys.readouterr().err
    found = weights(tmp_path / "run")
    for name, tensor in source.state_dict().items():
        if name != "label_emb.weight":
            torch.testing.assert_close(found[name], tensor)
    with pytest.raises(InputError, match="Expected"):
        run(tiny_config({"num_channels": 32}), pictures, tmp_path / "other", init=tmp_path / "start")


def test_what_does_not_fit_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"3 classes in .*found 2"):
        run(tiny_config({"num_classes": 3}), pictures, tmp_path / "run")
    with pytest.raises(InputError, match="expected 32x32 pixels"):
        run(tiny_config({"image_size": 32, "attention_resolutions": ()}), pictures, tmp_path / "run")
    with pytest.raises(InputError, match=r"it is for model\.objective=vlb"):
        tiny_config(timesteps="loss-second-moment")
    assert not (tmp_path / "run").exists()


def test_recipes() -> None:
    for name in IDDPM_RECIPES:
        config = iddpm_recipe(name)
        assert config.recipe == name and from_dict(IDDPMTrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    public = iddpm_recipe("iddpm-256")
    assert (public.optim.lr, public.optim.weight_decay, public.batch_size, public.ema_decay) == (1e-4, 0.0, 128, 0.9999)
    changed = apply_overrides(
        public, ["model.noise_schedule=cosine", "model.channel_mult=1,2,2", "model.attention_resolutions="]
    )
    assert changed.model.channel_mult == (1, 2, 2) and changed.model.noise_schedule == "cosine"
    assert changed.model.attention_resolutions == ()
    for name, words in (("iddpm-265", "did you mean iddpm-256"), ("fundus-cpu", "that one is for `train gpt`")):
        with pytest.raises(InputError, match=words):
            iddpm_recipe(name)
    with pytest.raises(InputError, match="linear or cosine"):
        apply_overrides(public, ["model.noise_schedule=sigmoid"])


def test_flops_of_the_recipe() -> None:
    """Against the widths by hand: a convolution of 3x3 counts 18 for each pair of channels and pixel, thrice."""
    config = tiny_config({"channel_mult": (1,), "attention_resolutions": ()})
    width, side = 16, SIZE**2
    convolutions = (3 + 6) * width + 10 * width**2 + 2 * (2 * width) * width - 2 * width**2
    assert 3 * 18 * side * convolutions < step_flops(config) < 1.5 * 3 * 18 * side * convolutions


def test_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UNet(iddpm_config("iDDPM-tiny", **MODEL))
    save_iddpm(tmp_path / "model", model, classes=("healthy", "npdr"), extra={"note": 1})
    again = load_iddpm(tmp_path / "model")
    assert is_iddpm(tmp_path / "model") and read_config(tmp_path / "model")["note"] == 1
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    save_iddpm(tmp_path / "model", model.bfloat16())  # in its place
    assert read_config(tmp_path / "model")["classes"] == []
    with pytest.raises(InputError, match="found a diffusion model"):
        load_gpt(tmp_path / "model")
    for classes in (("a",), ("a", "a")):
        with pytest.raises(InputError, match="2 different class names"):
            save_iddpm(tmp_path / "other", model, classes=classes)
    with open(tmp_path / "model" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(InputError, match="damaged"):
        load_iddpm(tmp_path / "model")


def test_public_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UNet(iddpm_config("iDDPM-tiny", **MODEL))
    torch.save(model.state_dict(), tmp_path / "ema.pt")
    again = load_iddpm(tmp_path / "ema.pt", {"size": "iDDPM-tiny", **MODEL})
    assert torch.equal(again.time_embed[0].weight, model.time_embed[0].weight)
    assert is_iddpm(tmp_path / "ema.pt", "lsun-256") and not is_iddpm(tmp_path / "ema.pt", "GPT-B")
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"a": 1}, tmp_path / "other.pt")
    for name, config, words in (
        ("ema.pt", None, "Expected the config"),
        ("ema.pt", "iDDPM-tiny", "the config they were trained with"),
        ("gone.pt", "iDDPM-tiny", "found none"),
        ("text.pt", "iDDPM-tiny", "unsafe or damaged"),
        ("other.pt", "iDDPM-tiny", "state dict"),
    ):
        with pytest.raises(InputError, match=words):
            load_iddpm(tmp_path / name, config)
