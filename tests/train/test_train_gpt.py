"""The transformer's task: it learns, its parts agree with each other, and wrong input is named."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from retinar import cli
from retinar.engine.checkpoint import digest, load_gpt, load_tokenizer, read_config, save_gpt, save_tokenizer
from retinar.engine.config import TokenizerConfig
from retinar.engine.errors import InputError
from retinar.engine.model import GPT
from retinar.engine.progress import silent
from retinar.engine.tokenizer import VQTokenizer
from retinar.train import device, recipes
from retinar.train.code_fit import check_codes, default_codes, fit_to_codes, number_classes
from retinar.train.codes import CodeSet
from retinar.train.config import GPTTrainConfig, apply_overrides, to_dict
from retinar.train.gpt import GPTTask, attention_backend, start_from, train_gpt
from retinar.train.metrics_log import read_metrics
from tests.train.tiny import CLASSES, GRID, VOCAB, quiet_config, tiny_config, write_codes

CPU = torch.device("cpu")


def make_task(config: GPTTrainConfig, codes: Path) -> GPTTask:
    torch.manual_seed(0)
    return GPTTask(GPT(config.model), config, CodeSet(codes), steps=100)


@pytest.fixture
def codes(tmp_path: Path) -> Path:
    return write_codes(tmp_path / "codes")


def test_four_images_are_learned_by_heart(tmp_path: Path) -> None:
    """Loss falls from ln V past ln 8 = 2.08, all that can be learned of random codes without learning them by heart."""
    codes = write_codes(tmp_path / "codes", images=4, views=1)
    config = quiet_config(batch_size=4, accumulation=1, ema_decay=None)
    config = apply_overrides(config, ["optim.lr=0.01", "optim.schedule=constant"])
    task = make_task(config, codes)
    losses = [float(task.step(step)["loss"]) for step in range(30)]
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=1e-4)
    assert losses[-1] < 1.6


def test_accumulation_changes_nothing(codes: Path) -> None:
    """Without dropout, parts of 1, 2 and 8 images give the same losses, norms and weights."""
    runs = []
    for accumulation in (1, 4, 8):
        task = make_task(quiet_config(accumulation=accumulation), codes)
        values = [task.step(step) for step in range(3)]
        runs.append((values, task.model.state_dict()))
    for values, weights in runs[1:]:
        for mine, first in zip(values, runs[0][0], strict=True):
            for name in ("loss", "grad_norm"):
                torch.testing.assert_close(
                    torch.as_tensor(mine[name]), torch.as_tensor(first[name]), rtol=1e-4, atol=1e-6
                )
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, runs[0][1][name], rtol=1e-3, atol=2e-4)


def test_checkpointed_activations_change_nothing(codes: Path) -> None:
    """With dropout on: the recomputation drops the same elements."""
    losses = []
    for setting in ("none", "selective", "full"):
        task = make_task(tiny_config(activation_checkpointing=setting), codes)
        torch.manual_seed(1)
        losses.append([float(task.step(step)["loss"]) for step in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)


def test_bf16_keeps_master_weights_and_nearly_the_loss(codes: Path) -> None:
    exact, mixed = make_task(quiet_config(), codes), make_task(quiet_config(precision="bf16"), codes)
    for step in range(5):
        expected, found = float(exact.step(step)["loss"]), float(mixed.step(step)["loss"])
        assert found == pytest.approx(expected, rel=0.02)
    assert found != expected, "the forward pass was not in bf16"
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())
    assert all(t.dtype == torch.float32 for state in mixed.optimizer.state.values() for t in state.values())


def test_views_are_drawn_anew_or_not_at_all(codes: Path) -> None:
    random_views = make_task(tiny_config(), codes).order
    seen = {int(view) for step in range(4) for view in random_views.batch(step)[1]}
    assert seen == {0, 1}
    first = make_task(tiny_config(views="first"), codes).order
    assert not any(first.batch(step)[1].any() for step in range(4))


def test_validation_is_without_dropout_and_leaves_weights(codes: Path) -> None:
    config = tiny_config(eval_images=5, batch_size=4)
    task = make_task(config, codes)
    task.valid = CodeSet(codes)
    for step in range(2):
        task.step(step)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    first, second = task.evaluate(2), task.evaluate(2)
    assert first == second and 0 < first["valid_loss"] < 2 * math.log(VOCAB)
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())
    task.model.eval()
    chosen = np.unique(np.linspace(0, 11, 5).astype(np.int64))
    whole = task.model.loss(
        torch.from_numpy(np.asarray(task.valid.codes)[chosen, 0].astype(np.int64)),
        torch.from_numpy(np.asarray(task.valid.labels)[chosen].astype(np.int64)),
    )
    assert first["valid_loss"] == pytest.approx(whole.item(), rel=1e-5)


def test_a_run_leaves_a_model_that_samples_by_itself(tmp_path: Path) -> None:
    tokenizer = VQTokenizer(
        TokenizerConfig(
            ch=32, ch_mult=(1, 1), z_channels=32, codebook_size=VOCAB, image_size=2 * GRID, num_res_blocks=1
        )
    )
    save_tokenizer(tmp_path / "vq", tokenizer)
    codes = write_codes(tmp_path / "codes", tokenizer_digest=digest(tmp_path / "vq"))
    config = tiny_config(steps=3, accumulation=1)
    result = train_gpt(config, codes, tmp_path / "run", valid=codes, tokenizer=tmp_path / "vq", progress=silent)
    assert result.model == tmp_path / "run" / "model"
    stored = read_config(result.model)
    assert stored["classes"] == CLASSES and stored["training"] == {"recipe": "tiny", "steps": 3, "ema": True}
    assert digest(result.model / "tokenizer") == digest(tmp_path / "vq")
    load_tokenizer(result.model)
    model = load_gpt(result.model)
    assert model.config == config.model
    run = json.loads((tmp_path / "run" / "config.json").read_text())
    assert run["config"] == to_dict(config) and run["task"] == "gpt"
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [3]
    other = tmp_path / "other"
    save_tokenizer(other, VQTokenizer(tokenizer.config))
    with pytest.raises(InputError, match="tokenizer that made the codes"):
        train_gpt(config, codes, tmp_path / "run2", tokenizer=other, progress=silent)
    assert not (tmp_path / "run2").exists()


def test_the_average_is_what_is_exported(tmp_path: Path, codes: Path) -> None:
    task = make_task(tiny_config(), codes)
    for step in range(3):
        task.step(step)
    task.export(tmp_path / "averaged")
    assert task.ema is not None
    exported = load_gpt(tmp_path / "averaged")
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, task.ema.averages[name])
    assert not torch.equal(exported.output.weight, task.model.output.weight)
    plain = make_task(tiny_config(ema_decay=None), codes)
    plain.step(0)
    plain.export(tmp_path / "plain")
    assert torch.equal(load_gpt(tmp_path / "plain").output.weight, plain.model.output.weight)


def test_starting_from_a_checkpoint(tmp_path: Path, codes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config()
    source = GPT(dataclasses.replace(config.model, num_classes=5))
    with torch.no_grad():
        source.output.weight.normal_()
    model = GPT(config.model)
    table = model.cls_embedding.embedding_table.weight.clone()
    start_from(model, source)
    assert torch.equal(model.output.weight, source.output.weight)
    assert torch.equal(model.cls_embedding.embedding_table.weight, table)
    assert "class embeddings" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"tok_embeddings.*64.*32"):
        start_from(model, GPT(dataclasses.replace(config.model, vocab_size=32)))
    with pytest.raises(InputError, match="2 layers"):
        start_from(model, GPT(dataclasses.replace(config.model, n_layer=3)))
    save_gpt(tmp_path / "init", GPT(config.model))
    train_gpt(apply_overrides(config, ["steps=1"]), codes, tmp_path / "run", init=tmp_path / "init", progress=silent)
    with pytest.raises(InputError, match="init"):
        train_gpt(apply_overrides(config, ["steps=2"]), codes, tmp_path / "run", resume=True, progress=silent)


def test_codes_decide_for_small_recipes_and_are_checked_for_the_papers(codes: Path) -> None:
    code_set = CodeSet(codes)
    fitted = fit_to_codes(recipes.fundus_tiny(), code_set)
    assert (fitted.model.vocab_size, fitted.model.grid, fitted.model.num_classes) == (VOCAB, GRID, 2)
    check_codes(fitted, code_set)
    paper = recipes.fundus_xl()
    assert fit_to_codes(paper, code_set) == paper
    with pytest.raises(InputError, match=r"vocab_size 64 instead of 16384.*--set model.vocab_size=64 model.grid=4"):
        check_codes(paper, code_set)
    check_codes(apply_overrides(paper, ["model.vocab_size=64", "model.grid=4"]), code_set)


def test_a_split_may_lack_a_class(tmp_path: Path, codes: Path) -> None:
    """One photograph in a class lies in train: valid's only class still has the number that it has there."""
    valid = write_codes(tmp_path / "valid", images=3, classes=["npdr"])
    np.save(valid / "labels.npy", np.zeros(3, np.int64))
    code_set = CodeSet(valid)
    number_classes(code_set, CLASSES)
    assert code_set.labels.tolist() == [1, 1, 1] and code_set.meta["classes"] == CLASSES
    train_gpt(tiny_config(steps=1), codes, tmp_path / "run", valid=valid, progress=silent)
    assert "valid_loss" in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    other = write_codes(tmp_path / "other", classes=["npdr", "severe"])
    with pytest.raises(InputError, match=r"found severe in .*other"):
        train_gpt(tiny_config(steps=1), codes, tmp_path / "run2", valid=other, progress=silent)


def test_llamagens_own_codes_take_vocabulary_and_classes_from_the_config(tmp_path: Path) -> None:
    """Ten views, labels of some classes only, nothing said about the tokenizer; validation with fewer classes still."""
    random = np.random.default_rng(0)
    for split, labels in (("train", [0, 2, 2, 0]), ("valid", [0, 0])):
        for number, label in enumerate(labels):
            for name, array in (("codes", random.integers(0, VOCAB, (1, 10, GRID * GRID))), ("labels", [label])):
                folder = tmp_path / split / f"imagenet64_{name}"
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{number}.npy", np.asarray(array))
    tiny = tiny_config(steps=2)
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, num_classes=4))
    result = train_gpt(config, tmp_path / "train", tmp_path / "run", valid=tmp_path / "valid", progress=silent)
    assert result.model is not None and "valid_loss" in result.values
    assert read_config(result.model)["classes"] == ["0", "1", "2", "3"]
    with pytest.raises(InputError, match=r"num_classes 3 instead of 2.*--set model\.num_classes=3"):
        train_gpt(tiny, tmp_path / "train", tmp_path / "run2", progress=silent)
    tokenizer = VQTokenizer(TokenizerConfig(ch=32, ch_mult=(1, 1), z_channels=32, codebook_size=2 * VOCAB))
    save_tokenizer(tmp_path / "vq", tokenizer)
    with pytest.raises(InputError, match="a tokenizer of 64 codes"):  # before the training, not at its end
        train_gpt(config, tmp_path / "train", tmp_path / "run2", tokenizer=tmp_path / "vq", progress=silent)
    assert not (tmp_path / "run2").exists()


def test_attention_backend_is_chosen_or_refused() -> None:
    paper = recipes.fundus_xl()
    assert attention_backend(paper, CPU) is None
    assert attention_backend(recipes.fundus_cpu(), CPU) == "sdpa"
    assert attention_backend(apply_overrides(paper, ["attention_backend=reference"]), CPU) == "reference"
    with pytest.raises(InputError, match="attn_dropout_p"):
        attention_backend(apply_overrides(paper, ["attention_backend=sdpa"]), CPU)
    with pytest.raises(InputError, match="found 'magic'"):
        attention_backend(apply_overrides(paper, ["attention_backend=magic"]), CPU)
    with pytest.raises(InputError, match="flash: no CUDA device"):
        attention_backend(apply_overrides(paper, ["attention_backend=flash"]), CPU)


def test_split_folders_are_found(tmp_path: Path) -> None:
    train, valid = write_codes(tmp_path / "codes" / "train"), write_codes(tmp_path / "codes" / "valid")
    assert default_codes(tmp_path / "codes") == (train, valid)
    assert default_codes(train) == (train, None)


def command(*argv: object) -> int:
    return cli.main(["train", *map(str, argv)])


def test_print_config_is_the_whole_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("gpt", "--recipe", "fundus-xl", "--print-config") == 0
    assert json.loads(capsys.readouterr().out) == to_dict(recipes.fundus_xl())
    assert command("tokenizer", "--recipe", "vq8", "--set", "perceptual=none", "optim.lr=3e-4", "--print-config") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["perceptual"], printed["optim"]["lr"]) == ("none", 3e-4)


def test_the_command_trains_resumes_and_refuses(
    tmp_path: Path, codes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["model.dim=32", "model.n_layer=1", "batch_size=4", "device=cpu"]
    line = ["gpt", "--recipe", "fundus-tiny", "--data", codes, "--out", tmp_path / "run", "--set", *sizes, "steps=2"]
    assert command(*line) == 0
    capsys.readouterr()
    assert command(*line) == 2
    assert "--resume" in capsys.readouterr().err
    resumed = ["gpt", "--data", codes, "--out", tmp_path / "run", "--resume", "--json", "--set", "steps=3"]
    assert command(*resumed) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["step"], summary["ended"]) == (3, "finished") and "valid_loss" not in summary
    assert summary["model"] == str(tmp_path / "run" / "model")
    assert command(*resumed, "optim.lr=1") == 2
    assert "optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["gpt"], ["--recipe", "fundus-xl"]),
        (["gpt", "--recipe", "fundus-xxl", "--print-config"], ["did you mean fundus-xl"]),
        (["gpt", "--recipe", "fundus-tiny"], ["--data"]),
        (["gpt", "--recipe", "fundus-tiny", "--data", "CODES"], ["--out"]),
        (["gpt", "--recipe", "fundus-tiny", "--set", "lr=1", "--print-config"], ["optim.lr"]),
        (["gpt", "--recipe", "fundus-xl", "--data", "CODES", "--out", "RUN"], ["--set model.vocab_size=64"]),
        (["gpt", "--recipe", "fundus-tiny", "--data", "NOWHERE", "--out", "RUN"], ["NOWHERE"]),
        (
            ["gpt", "--recipe", "fundus-tiny", "--data", "CODES", "--out", "RUN", "--max-minutes", "nan"],
            ["max-minutes"],
        ),
        (["gpt", "--recipe", "fundus-tiny", "--data", "CODES", "--out", "RUN", "--init", "NOWHERE"], ["NOWHERE"]),
        (["gpt", "--resume", "--data", "CODES", "--out", "RUN"], ["RUN", "config.json"]),
        (["gpt", "--recipe", "fundus-tiny", "--data", "CODES", "--out", "RUN", "--set", "device=tpu"], ["device"]),
        (["iddpm", "--recipe", "fundus-tiny"], ["iddpm"]),
    ],
)
def test_bad_commands_are_one_sentence(
    argv: list[str], words: list[str], codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"CODES": str(codes), "RUN": str(tmp_path / "RUN"), "NOWHERE": str(tmp_path / "NOWHERE")}
    assert command(*(places.get(word, word) for word in argv)) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
    assert "Traceback" not in told
    assert not (tmp_path / "RUN" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="the C++ compiler that torch.compile needs is missing")
def test_compiled_blocks_change_nothing(codes: Path) -> None:
    """Without dropout (compiled code draws other random numbers): the same losses, the same names in the state."""
    runs = [make_task(quiet_config(compile=compiled), codes) for compiled in (False, True)]
    for step in range(3):
        plain, compiled = (float(task.step(step)["loss"]) for task in runs)
        assert compiled == pytest.approx(plain, rel=1e-5)
    assert runs[0].state_dict()["model"].keys() == runs[1].state_dict()["model"].keys()


def test_compile_without_a_compiler_is_said(
    codes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device.shutil, "which", lambda _: None)
    task = make_task(tiny_config(compile=True), codes)
    assert "uncompiled" in capsys.readouterr().err
    assert math.isfinite(float(task.step(0)["loss"]))
