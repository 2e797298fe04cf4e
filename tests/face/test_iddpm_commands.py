"""The diffusion model by the same commands as the transformer: train, resume, generate, reproduce."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.face.world import Shell, World

SMALL = (
    *("model.image_size=32", "model.num_channels=16", "model.norm_groups=4", "model.channel_mult=1,2"),
    *("model.attention_resolutions=none", "model.diffusion_steps=30", "batch_size=4", "meters=false"),
)
SETS = ("--set", *(text.replace("=none", "=16") for text in SMALL), "device=cpu")


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run; read only."""
    from retinar import cli

    out = tmp_path_factory.mktemp("iddpm") / "run"
    line = ["train", "iddpm", "--recipe", "iddpm-tiny", "--data", world.prepared, "--out", out, *SETS, "steps=2"]
    assert cli.main([str(part) for part in line]) == 0
    return out


def test_a_run_is_resumed_without_its_recipe(run: Path, world: World, shell: Shell, tmp_path: Path) -> None:
    longer = tmp_path / "run"
    shutil.copytree(run, longer)
    line = ("train", "iddpm", "--data", world.prepared, "--out", longer, "--resume", "--json", "--set", "steps=3")
    said = shell(*line)
    assert said.code == 0, said.err
    summary = json.loads(said.out)
    assert (summary["step"], summary["ended"], summary["model"]) == (3, "finished", str(longer / "model"))
    assert summary["valid_loss"] > 0 and "resuming" in said.err
    shell.refused(*line[:1], "gpt", *line[2:], words="found a iddpm run")


def test_print_config(shell: Shell) -> None:
    said = shell("train", "iddpm", "--recipe", "iddpm-256", "--print-config", "--set", "model.noise_schedule=cosine")
    config = json.loads(said.out)
    assert config["model"]["noise_schedule"] == "cosine" and config["model"]["image_size"] == 256
    shell.refused("train", "iddpm", "--recipe", "iddpm-256", "--plan", words="--plan with `train gpt` only")
    shell.refused("train", "iddpm", "--recipe", "iddpm-255", words="did you mean iddpm-256")
    shell.refused("train", "iddpm", words="known are iddpm-256")


def test_generate_and_reproduce(run: Path, shell: Shell, tmp_path: Path) -> None:
    model, out = run / "model", tmp_path / "images"
    line = ("generate", "--model", model, "--label", "npdr", "--count", 2, "--steps", 3, "--device", "cpu")
    said = shell(*line, "--out", out, "--sampler", "ddim", "--eta", "0.5", "--cfg-scale", "1.5", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out) == {
        "out": str(out),
        "images": 2,
        "made": 2,
        "kept": 0,
        "sheet": str(out / "sheet.png"),
    }
    parameters = json.loads((out / "run.json").read_text())["parameters"]
    assert parameters == {"steps": 3, "sampler": "ddim", "eta": 0.5, "cfg_scale": 1.5}
    again = json.loads(shell("reproduce", out / "images/npdr/000001.png", "--json").out)
    assert again["equal"] and again["verdict"] == "equal: the same pixels"
    shell.refused("reproduce", out / "images/npdr/000001.png", "--model", tmp_path / "gone", words="check the path")
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"model": str(tmp_path / "gone")}))
    shell.refused("reproduce", out / "images/npdr/000001.png", words="name it with --model")
    shell.refused("reproduce", out / "images/npdr/000001.png", "--tokenizer", model, words="leave out --tokenizer")
    both = shell(*line[:3], "--count", 1, "--steps", 2, "--out", tmp_path / "both", "--device", "cpu", "--json")
    assert json.loads(both.out)["images"] == 2, "every class that the checkpoint names"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--top-k", "0"), "--top-k means nothing"),
        (("--top-k", "5"), "--top-k means nothing for a diffusion model"),
        (("--temperature", "1"), "--temperature means nothing"),
        (("--tokenizer", "x"), "--tokenizer means nothing"),
        (("--pin",), "--pin means nothing"),
        (("--dtype", "int8"), "float32 or bfloat16"),
        (("--steps", "31"), "at most the 30"),
        (("--steps", "0"), "steps must be"),
        (("--sampler", "ancestral", "--eta", "1"), "eta is DDIM's"),
        (("--label", "nobody"), "unknown label"),
        (("--config", "iDDPM-tiny"), "leave it out"),
    ],
    ids=str,
)
def test_flags_that_mean_nothing_are_refused(
    flags: tuple[str, ...], words: str, run: Path, shell: Shell, tmp_path: Path
) -> None:
    shell.refused(
        "generate", "--model", run / "model", "--out", tmp_path / "out", "--device", "cpu", *flags, words=words
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--steps", "--eta"])
def test_a_transformer_knows_no_steps(flag: str, world: World, shell: Shell, tmp_path: Path) -> None:
    line = ("generate", "--model", world.gpt, "--out", tmp_path / "out", "--device", "cpu", flag, "1")
    shell.refused(*line, words=f"{flag} means nothing for a transformer")


def test_photographs_that_do_not_fit(world: World, shell: Shell, tmp_path: Path) -> None:
    line = ("train", "iddpm", "--recipe", "iddpm-tiny", "--data", world.prepared, "--out", tmp_path / "run")
    shell.refused(*line, "--set", "device=cpu", words="prepare with --size 48")
    shell.refused(*line, "--tokenizer", world.tokenizer, words="--tokenizer with `train gpt` only")
    shell.refused(*line, *SETS, "model.num_classes=3", words="found 2 (healthy, npdr)")
