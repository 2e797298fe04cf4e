"""LlamaGen's training commands: its flags, its folders and lines, going on from its checkpoints and from ours."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retinar.engine.errors import InputError
from retinar.train.upstream import code_folder, train_c2i, train_c2i_fsdp, training
from retinar.train.upstream.code_folder import open_codes
from retinar.train.upstream.flags import Flags, exit_code, refuse_srun
from retinar.train.upstream.gpt_flags import check_flags, config_of, gpt_parser, total_steps, uses_tf32
from retinar.train.world import World
from tests.train.processes import run_processes
from tests.train.upstream_codes import flags, quiet_config, write_upstream_codes

QUIET = ("--dropout-p", "0", "--token-dropout-p", "0", "--mixed-precision", "none")
LOSS = re.compile(
    r"\[\x1b\[34m[\d-]{10} [\d:]{8}\x1b\[0m\] \(step=(\d{7})\) Train Loss: (\d+\.\d{4}), Train Steps/Sec: \d+\.\d\d"
)


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_upstream_codes(tmp_path_factory.mktemp("codes") / "flip")


@pytest.fixture(scope="module")
def trained(codes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of 4 steps with everything random, and the averages."""
    root = tmp_path_factory.mktemp("trained")
    assert train_c2i.main(flags(root, codes, "--ema")) == 0
    return root


def load(path: Path) -> Any:
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    return torch.equal(one, other)


def local(root: Path, run: int = 0) -> Path:
    return root / "results" / f"{run:03d}-GPT-tiny" / "checkpoints"


# --- the flags


def test_the_defaults_are_upstreams() -> None:
    needed = ["--code-path", "c", "--cloud-save-path", "s"]
    common = {
        "no_local_save": False, "gpt_model": "GPT-B", "gpt_type": "c2i", "vocab_size": 16384, "ema": False,
        "cls_token_num": 1, "dropout_p": 0.1, "token_dropout_p": 0.1, "drop_path_rate": 0.0, "no_compile": False,
        "results_dir": "results", "dataset": "imagenet_code", "image_size": 256, "downsample_size": 16,
        "num_classes": 1000, "epochs": 300, "lr": 1e-4, "weight_decay": 5e-2, "beta1": 0.9, "beta2": 0.95,
        "max_grad_norm": 1.0, "global_batch_size": 256, "global_seed": 0, "num_workers": 24, "log_every": 100,
        "ckpt_every": 5000, "gradient_accumulation_steps": 1, "mixed_precision": "bf16",
        "code_path": "c", "cloud_save_path": "s",
    }  # fmt: skip
    ddp = gpt_parser("train_c2i", "", fsdp=False).parse_args(needed)
    assert vars(ddp) == {**common, "gpt_ckpt": None}
    fsdp = gpt_parser("train_c2i_fsdp", "", fsdp=True).parse_args(needed)
    others = {"gpt_resume": None, "data_parallel": "fsdp", "grad_precision": None, "no_wandb": False}
    assert vars(fsdp) == {**common, **others, "wandb_project": None}
    for args in (ddp, fsdp):
        config = config_of(args)
        model, optim = config.model, config.optim
        assert (model.n_layer, model.dim, model.grid, model.num_classes) == (12, 768, 16, 1000)
        assert (model.attn_dropout_p, model.resid_dropout_p, model.class_dropout_prob) == (0.0, 0.1, 0.1)
        assert (optim.lr, optim.betas, optim.weight_decay, optim.grad_clip) == (1e-4, (0.9, 0.95), 0.05, 1.0)
        assert (optim.schedule, config.batch_size, config.compile, config.ema_decay) == ("constant", 256, True, None)
        assert total_steps(args, 1_281_167) == 300 * 5004
        check_flags(args)
    assert (config_of(ddp).parallel, config_of(ddp).precision) == ("ddp", "bf16")
    assert (config_of(fsdp).parallel, config_of(fsdp).reduce_precision) == ("fsdp", "bf16")


def test_flags_reach_the_config() -> None:
    def config(fsdp: bool, *more: str) -> Any:
        line = ["--code-path", "c", "--cloud-save-path", "s", "--no-wandb", *more] if fsdp else [
            "--code-path", "c", "--cloud-save-path", "s", *more]  # fmt: skip
        args = gpt_parser("x", "", fsdp=fsdp).parse_args(line)
        check_flags(args)
        return config_of(args), args

    model = config(False, "--image-size", "384", "--gpt-model", "GPT-XXL", "--drop-path-rate", "0.2")[0].model
    assert (model.grid, model.n_layer, model.drop_path_rate) == (24, 48, 0.2)
    assert config(False, "--image-size", "448", "--downsample-size", "8")[0].model.grid == 56
    found, args = config(False, "--mixed-precision", "none", "--max-grad-norm", "0", "--ema", "--global-seed", "3")
    assert (found.precision, found.optim.grad_clip, found.ema_decay, found.seed) == ("fp32", None, 0.9999, 3)
    assert uses_tf32(args), "upstream lets fp32 products be TF32"
    found, args = config(True, "--mixed-precision", "fp32", "--data-parallel", "hsdp")
    assert (found.precision, found.parallel, uses_tf32(args)) == ("fp32", "hsdp", False)
    assert uses_tf32(config(True, "--mixed-precision", "tf32")[1])
    assert config(True, "--grad-precision", "fp32")[0].reduce_precision == "fp32"
    assert config(True, "--data-parallel", "sdp")[0].parallel == "sdp"
    assert config(False, "--gradient-accumulation-steps", "4")[0].accumulation == 4
    assert config(False, "--beta1", "0.8", "--beta2", "0.9")[0].optim.betas == (0.8, 0.9)


REFUSED = [
    (False, ["--mixed-precision", "fp16"], r"--mixed-precision bf16 .* found fp16"),
    (False, ["--gpt-type", "t2i"], r"--gpt-type c2i, found t2i"),
    (False, ["--cls-token-num", "120"], r"--cls-token-num 1, found 120"),
    (False, ["--dataset", "imagenet"], r"--dataset imagenet_code .* found imagenet"),
    (False, ["--dataset", "t2i_code"], r"--dataset imagenet_code .* found t2i_code"),
    (False, ["--max-grad-norm", "-1"], r"--max-grad-norm of at least 0, found -1"),
    (False, ["--lr", "0"], r"optim\.lr above 0"),
    (False, ["--image-size", "128"], r"--image-size: invalid choice: 128"),
    (False, ["--gpt-modle", "GPT-B"], r"unknown --gpt-modle \(did you mean --gpt-model\?\)"),
    (False, ["--num-classes", "1"], r"--num-classes 1, found 1"),
    (False, ["--vocab-size", "8"], r"--vocab-size 8, found 31"),
    (False, ["--image-size", "384"], r"imagenet384_codes"),
    (False, ["--downsample-size", "8"], r"32x32 grid .* found 16x16"),
    (False, ["--global-batch-size", "3", "--gradient-accumulation-steps", "2"], r"--global-batch-size as a multiple"),
    (False, ["--gpt-ckpt", "no/such.pt"], r"no/such\.pt"),
    (True, ["--grad-precision", "fp16"], r"--grad-precision fp32 or bf16, found fp16"),
    (True, ["--mixed-precision", "fp32", "--grad-precision", "bf16"], r"--grad-precision fp32 with"),
    (True, ["--gpt-resume", "no/such"], r"no/such"),
]


@pytest.mark.parametrize("fsdp, more, sentence", REFUSED, ids=[" ".join(more) for _, more, _ in REFUSED])
def test_what_is_not_done_is_refused(
    fsdp: bool, more: list[str], sentence: str, codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = flags(tmp_path, codes, *(["--no-wandb"] if fsdp else []), *more)
    assert (train_c2i_fsdp if fsdp else train_c2i).main(line) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(sentence, told) and told.startswith("error: Expected") and told.endswith(".")
    assert not (tmp_path / "results").exists(), "refused before anything is made"


def test_a_named_project_of_wandb_is_insisted_on(
    codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert train_c2i_fsdp.main(flags(tmp_path, codes, "--wandb-project", "mine")) == 2
    assert "pip install wandb, or add --no-wandb." in capsys.readouterr().err
    line = ["--code-path", "c", "--cloud-save-path", "s"]
    assert config_of(gpt_parser("x", "", fsdp=True).parse_args(line)).wandb is None, "upstream's own launch lines run"
    assert "training without it" in capsys.readouterr().err


def test_failures_of_the_disk_and_of_flags_have_their_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> int:
        raise PermissionError(13, "Permission denied", "/there")

    def stop() -> int:
        raise KeyboardInterrupt

    assert (exit_code(refuse), exit_code(stop), exit_code(lambda: 0)) == (2, 130, 0)
    assert "/there" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"required: --needed"):
        parser = Flags("vq_train", "about")
        parser.add_argument("--needed", required=True)
        parser.parse_args([])


def test_a_full_gpu_is_told_with_the_flags_that_help(
    codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(training.GPTTask, "_loss", full)
    for script, more, helps in (
        (train_c2i, [], "--gradient-accumulation-steps 2, take train_c2i_fsdp"),
        (train_c2i_fsdp, ["--no-wandb", "--gradient-accumulation-steps", "2"], "steps 4, take more GPUs"),
    ):
        assert script.main(flags(tmp_path, codes, *more)) == 2
        assert helps in capsys.readouterr().err


# --- a run


def test_files_land_where_upstream_puts_them(trained: Path, codes: Path) -> None:
    assert sorted(path.name for path in local(trained).iterdir()) == ["0000002.pt", "0000004.pt"]
    (cloud,) = (trained / "cloud").iterdir()
    assert re.fullmatch(r"\d{4}(-\d\d){5}", cloud.name)
    copies = cloud / "000-GPT-tiny" / "checkpoints"
    assert [(copies / path.name).read_bytes() == path.read_bytes() for path in local(trained).iterdir()] == [True] * 2
    lines = (local(trained).parent / "log.txt").read_text().splitlines()
    found = [match for line in lines if (match := LOSS.fullmatch(line))]
    assert [int(match[1]) for match in found] == [2, 4]
    assert float(found[0][2]) == pytest.approx(np.log(32), abs=0.3)
    for said in ("Namespace(", "Dataset contains 8 images", "GPT Parameters: ", "Beginning epoch 0...", "Done!"):
        assert any(said in line for line in lines), said
    content = load(local(trained) / "0000004.pt")
    assert content["steps"] == 4 and content["args"].code_path == str(codes)
    assert content["model"].keys() == content["ema"].keys()
    assert not equal(content["model"], content["ema"])
    assert len(content["optimizer"]["state"]) == len(content["model"])


def test_a_restart_goes_on_at_the_exact_batch(trained: Path, codes: Path, tmp_path: Path) -> None:
    middle, end = (local(trained) / f"000000{step}.pt" for step in (2, 4))
    again = flags(tmp_path, codes, "--ema", "--gpt-ckpt", str(middle), "--no-local-save")
    assert train_c2i.main(again) == 0
    (cloud,) = (tmp_path / "cloud").iterdir()
    assert not list(local(tmp_path).iterdir()), "--no-local-save"
    mine, theirs = load(cloud / "000-GPT-tiny" / "checkpoints" / "0000004.pt"), load(end)
    for part in ("model", "ema"):
        assert equal(mine[part], theirs[part])
    assert equal(mine["optimizer"]["state"], theirs["optimizer"]["state"])
    log = (local(tmp_path).parent / "log.txt").read_text()
    assert "Initial state: steps=2, epochs=0" in log and "(step=0000002)" not in log


def test_weights_alone_are_fine_tuned_from_step_0(trained: Path, codes: Path, tmp_path: Path) -> None:
    weights = load(local(trained) / "0000004.pt")["model"]
    torch.save({"model": weights}, tmp_path / "weights.pt")
    line = flags(tmp_path, codes, "--gpt-ckpt", str(tmp_path / "weights.pt"), "--ckpt-every", "1")
    assert train_c2i.main([*line, "--lr", "1e-9"]) == 0
    first = load(local(tmp_path) / "0000001.pt")
    assert first["steps"] == 1 and all(float(state["step"]) == 1 for state in first["optimizer"]["state"].values())
    assert all(torch.allclose(first["model"][name], weights[name], atol=1e-7) for name in weights)
    assert "no optimizer in it" in (local(tmp_path).parent / "log.txt").read_text()


def test_accumulation_works_and_changes_nothing(codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "config_of", quiet_config)
    for parts in ("1", "2"):
        assert train_c2i.main(flags(tmp_path, codes, *QUIET, "--gradient-accumulation-steps", parts)) == 0
    near(*(load(local(tmp_path, run) / "0000004.pt")["model"] for run in (0, 1)))


def near(one: Any, other: Any) -> None:
    """Weights that differ by rounding alone."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).norm() <= 1e-4 * tensor.norm(), name


def test_processes_share_a_run_and_any_number_goes_on(
    codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, FSDP in fp32, with averages; then one goes on from the middle, to the same end."""
    more = (*QUIET[:4], "--mixed-precision", "fp32", "--no-wandb", "--ema")
    run_processes(2, "tests.train.upstream_codes", "train_c2i_fsdp", *flags(tmp_path / "two", codes, *more))
    (results,) = (tmp_path / "two" / "results").iterdir()
    (cloud,) = (tmp_path / "two" / "cloud").iterdir()
    assert re.fullmatch(r"\d{14}-GPT-tiny", results.name) and cloud.name == results.name
    assert sorted(path.name for path in cloud.iterdir()) == ["0000002", "0000004"]
    lines = (results / "log.txt").read_text().splitlines()
    assert [int(match[1]) for line in lines if (match := LOSS.fullmatch(line))] == [2, 4]

    monkeypatch.setattr(training, "config_of", quiet_config)
    assert train_c2i_fsdp.main(flags(tmp_path / "one", codes, *more, "--gpt-resume", str(cloud / "0000002"))) == 0
    (other,) = (tmp_path / "one" / "cloud").iterdir()
    ours = ["consolidated.pth", "ema.pth", "optimizer.00000-of-00001.pth", "resume_step.txt", "retinar.json"]
    assert sorted(path.name for path in (other / "0000004").iterdir()) == ours
    for name in ("consolidated.pth", "ema.pth"):
        near(*(torch.load(folder / "0000004" / name) for folder in (cloud, other)))


def test_a_refusal_is_told_by_the_first_process_alone(
    codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert train_c2i.main(flags(tmp_path, codes, "--mixed-precision", "fp16")) == 2
        assert train_c2i.main(["--code-path", "c"]) == 2
        assert capsys.readouterr().err.count("error: ") == (2 if rank == "0" else 0)


# --- the codes


def opened(path: Path, **changes: Any) -> Any:
    args = Namespace(code_path=str(path), cloud_save_path=str(path.parent / "cloud"), **changes)
    return open_codes(args, "imagenet256", World(torch.device("cpu")))


def test_any_number_of_files_is_packed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_upstream_codes(tmp_path / "codes", images=5, views=3, tokens=16)
    found = opened(path)
    assert found.codes.shape == (5, 3, 16) and found.labels.tolist() == [0, 1, 0, 1, 0]
    for i in range(5):
        assert np.array_equal(found.codes[i], np.load(path / "imagenet256_codes" / f"{i}.npy")[0])
    assert isinstance(found.codes, np.memmap)
    opened(path)
    assert capsys.readouterr().err.count("packing") == 1
    np.save(path / "imagenet256_codes" / "3.npy", np.full((1, 3, 16), 7))
    assert (opened(path).codes[3] == 7).all(), "changed files are packed again"
    (path / "imagenet256_codes" / "4.npy").unlink()
    assert len(opened(path)) == 4
    assert [entry.name for entry in path.iterdir() if "partial" in entry.name] == []


def test_what_a_killed_packing_left_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_upstream_codes(tmp_path / "codes", images=3, tokens=16)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr(code_folder.os, "getpid", lambda: ended.pid)
    monkeypatch.setattr(
        code_folder, "_finish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        opened(path)
    assert [entry.suffix for entry in path.glob(".packed*")] == [".partial"]
    monkeypatch.undo()
    assert len(opened(path)) == 3
    assert [entry.suffix for entry in path.glob(".packed*")] == [""]


def test_tasks_of_srun_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_PROCID", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"torchrun .* found 4 tasks of srun"):
        refuse_srun()
    monkeypatch.setenv("WORLD_SIZE", "4")
    refuse_srun()


def test_ten_crops_at_two_ranges_are_views_of_one_image(tmp_path: Path) -> None:
    path = write_upstream_codes(tmp_path / "flip_ten_crop", images=3, views=20, tokens=16)
    more = write_upstream_codes(tmp_path / "flip_ten_crop_105", images=3, views=20, tokens=16, seed=1)
    found = opened(path).codes
    assert found.shape == (3, 40, 16)
    for half, folder in ((found[:, :20], path), (found[:, 20:], more)):
        assert np.array_equal(half[1], np.load(folder / "imagenet256_codes" / "1.npy")[0])
    np.save(more / "imagenet256_labels" / "2.npy", np.array([1]))
    np.save(more / "imagenet256_codes" / "2.npy", np.zeros((1, 20, 16), np.int64))
    with pytest.raises(InputError, match=r"image 2 of .*_105 to have the label"):
        opened(path)


@pytest.mark.parametrize("damage", ["views", "float", "label", "cut", "high", "none", "square", "labels"])
def test_damaged_codes_are_a_sentence(damage: str, tmp_path: Path) -> None:
    path = write_upstream_codes(tmp_path / "codes", images=3, tokens=15 if damage == "square" else 16)
    codes, labels = path / "imagenet256_codes", path / "imagenet256_labels"
    if damage == "views":
        np.save(codes / "1.npy", np.zeros((1, 3, 16), np.int64))
    elif damage == "float":
        np.save(codes / "1.npy", np.zeros((1, 2, 16), np.float32))
    elif damage == "high":
        np.save(codes / "1.npy", np.full((1, 2, 16), 1 << 16))
    elif damage == "label":
        (labels / "1.npy").unlink()
    elif damage == "cut":
        (codes / "1.npy").write_bytes((codes / "1.npy").read_bytes()[:90])
    elif damage == "none":
        for file in codes.iterdir():
            file.unlink()
    elif damage == "labels":
        for file in labels.iterdir():
            file.unlink()
        labels.rmdir()
    with pytest.raises(InputError, match=r"Expected .* found .*: "):
        opened(path)
    assert not list(path.glob(".packed*[0-9a-f]")), "nothing that could be taken for whole"


def test_codes_that_cannot_be_written_to_are_packed_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_upstream_codes(tmp_path / "codes", images=3, tokens=16)
    monkeypatch.setattr(code_folder.os, "access", lambda *_: False)
    assert len(opened(path)) == 3
    assert not list(path.glob(".packed*")) and len(list((tmp_path / "cloud").glob(".packed*"))) == 1
