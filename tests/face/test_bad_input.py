"""Bad input at the real command line: one sentence, exit code 2, no traceback, nothing that a later run would trust."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.face.world import Shell, World, photograph, write_source

ROOT = Path(__file__).resolve().parent.parent.parent


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- folders and photographs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "empty", "a file"])
def test_folders_that_hold_nothing(kind: str, shell: Shell, world: World, tmp_path: Path) -> None:
    bad, out = tmp_path / "bad", tmp_path / "out"
    if kind == "empty":
        bad.mkdir()
    elif kind == "a file":
        bad.write_text("not a folder")
    shell.refused("prepare", bad, out, words=str(bad))
    shell.refused("train", "tokenizer", "--recipe", "vq8-tiny", "--data", bad, "--out", out, words=str(bad))
    shell.refused("train", "gpt", "--recipe", "fundus-tiny", "--data", bad, "--out", out, words=str(bad))
    shell.refused("encode", bad, "--tokenizer", world.tokenizer, "--out", out, words=str(bad))
    shell.refused("encode", world.prepared, "--tokenizer", bad, "--out", out, words=str(bad))
    shell.refused("generate", "--model", bad, "--out", out, words=str(bad))
    shell.refused("evaluate", bad, world.prepared / "train", words=str(bad))
    shell.refused("convert", bad, out, words=str(bad))
    shell.refused("reproduce", bad, words=str(bad))
    if kind != "empty":
        shell.refused("demo", "--data", bad / "photographs", "--out", out, words=str(bad))
    assert not out.exists() or not any(p.is_file() for p in out.rglob("*") if p.name != "demo.json")


def test_unreadable_photographs_are_listed_and_left_out(shell: Shell, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (source / "train" / "train000.jpg").write_bytes(b"this is no photograph")
    whole = (source / "train" / "train001.jpg").read_bytes()
    (source / "train" / "train001.jpg").write_bytes(whole[: len(whole) // 2])
    said = shell("prepare", source, tmp_path / "out", "--size", 32, "--workers", 1, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["skipped"] == 2
    assert "train000.jpg" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_a_source_of_unreadable_photographs(shell: Shell, tmp_path: Path) -> None:
    for label in ("healthy", "npdr"):
        for index in range(2):
            path = tmp_path / "source" / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    said = shell("prepare", tmp_path / "source", tmp_path / "out", "--size", 32, "--workers", 1)
    assert "Traceback" not in said.err
    again = shell("train", "tokenizer", "--recipe", "vq8-tiny", "--data", tmp_path / "out", "--out", tmp_path / "run")
    assert again.code == 2 and again.err.count("\n") == 1


def test_grade_file_that_names_missing_files(shell: Shell, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (source / "train" / "train002.jpg").unlink()
    shell.refused("prepare", source, tmp_path / "out", words="train002.jpg")
    assert not (tmp_path / "out").exists()
    assert shell("prepare", source, tmp_path / "out", "--size", 32, "--workers", 1, "--skip-missing").code == 0


@pytest.mark.parametrize(
    ("line", "words"), [("new.jpg 9", "'9'"), ("train000.jpg", "train.txt"), ("train000.jpg 2", "train000.jpg")]
)
def test_grade_file_with_a_bad_line(line: str, words: str, shell: Shell, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    photograph(source / "train" / "new.jpg", seed=99)
    with (source / "train.txt").open("a") as grades:
        grades.write(line + "\n")
    shell.refused("prepare", source, tmp_path / "out", words=words)
    assert not (tmp_path / "out").exists()


def test_classes_that_name_unknown_labels(shell: Shell, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    shell.refused("prepare", source, tmp_path / "out", "--classes", "healthy=0 npdr=7", words="7")
    shell.refused("prepare", source, tmp_path / "out", "--classes", "healthy", words="healthy")


def test_an_image_that_cannot_be_reproduced(shell: Shell, tmp_path: Path) -> None:
    photograph(tmp_path / "photo.png", seed=1)
    shell.refused("reproduce", tmp_path / "photo.png", words="photo.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    shell.refused("reproduce", tmp_path / "broken.png", words="broken.png")


# ---- names and numbers ----------------------------------------------------------------------------------------------


def test_unknown_label(shell: Shell, world: World, tmp_path: Path) -> None:
    told = shell.refused(
        "generate", "--model", world.gpt, "--label", "helthy", "--out", tmp_path / "out", words="helthy"
    )
    assert "healthy" in told and "npdr" in told
    shell.refused("generate", "--model", world.gpt, "--label", "2", "--out", tmp_path / "out", words="2")
    assert not (tmp_path / "out").exists()


def test_unknown_recipe_and_key(shell: Shell, world: World, tmp_path: Path) -> None:
    line = ("train", "gpt", "--data", world.codes, "--out", tmp_path / "run")
    assert "fundus-tiny" in shell.refused(*line, "--recipe", "fundus-tinny", words="fundus-tinny")
    told = shell.refused(*line, "--recipe", "fundus-tiny", "--set", "optim.lrr=1", words="optim.lrr")
    assert "optim.lr" in told.replace("optim.lrr", "")
    shell.refused(*line, "--recipe", "fundus-tiny", "--set", "batch_size=many", words="batch_size")
    shell.refused(*line, "--recipe", "fundus-tiny", "--set", "batch_size", words="key=value")
    shell.refused(*line, "--recipe", "fundus-tiny", "--set", "batch_size=0", words="batch_size")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--cfg-scale", value) for value in ("nan", "-1", "inf")),
        *(("--count", value) for value in ("0", "-3", "many")),
        *(("--temperature", value) for value in ("nan", "-1")),
        *(("--top-p", value) for value in ("0", "1.5")),
        *((flag, "0") for flag in ("--page-size", "--max-images")),
        *((flag, "-1") for flag in ("--top-k", "--seed")),
        *(("--gpus", value) for value in ("0", "-1", "99")),
    ],
)
def test_numbers_out_of_range(flag: str, value: str, shell: Shell, world: World, tmp_path: Path) -> None:
    shell.refused("generate", "--model", world.gpt, "--out", tmp_path / "out", flag, value)
    assert not (tmp_path / "out").exists()


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing weights", "config", "no json"])
def test_corrupted_checkpoint(damage: str, shell: Shell, world: World, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.gpt, model)
    weights, config = model / "model.safetensors", model / "config.json"
    if damage == "flipped":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(bytes(data))
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing weights":
        weights.unlink()
    elif damage == "config":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"config": {"n_layers": 3}}))
    else:
        config.write_text("{ half a file")
    words = "n_layers" if damage == "config" else str(model)
    shell.refused("generate", "--model", model, "--count", 1, "--out", tmp_path / "out", words=words)
    shell.refused("convert", model, tmp_path / "model.pt", words=words)
    assert not (tmp_path / "out").exists() and not (tmp_path / "model.pt").exists()


def test_checkpoint_of_another_shape(shell: Shell, world: World, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.gpt, model)
    content = json.loads((model / "config.json").read_text())
    content["config"]["dim"] = 32
    (model / "config.json").write_text(json.dumps(content))
    shell.refused("generate", "--model", model, "--count", 1, "--out", tmp_path / "out", words="shape")
    assert not (tmp_path / "out").exists()


def test_the_wrong_kind_of_checkpoint(shell: Shell, world: World, tmp_path: Path) -> None:
    shell.refused("generate", "--model", world.tokenizer, "--out", tmp_path / "out", words="tokenizer")
    shutil.copytree(world.gpt, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer"))
    shell.refused("encode", world.prepared, "--tokenizer", tmp_path / "bare", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_malicious_pickle_is_refused_and_not_run(shell: Shell, tmp_path: Path) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'sprung'}",)

    (tmp_path / "model.pt").write_bytes(pickle.dumps({"model": Trap()}))
    shell.refused("convert", tmp_path / "model.pt", tmp_path / "out", words="model.pt")
    shell.refused("generate", "--model", tmp_path / "model.pt", "--out", tmp_path / "out", words="model.pt")
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()


# ---- output ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc"])
def test_output_that_cannot_be_written(place: str, shell: Shell, world: World, tmp_path: Path) -> None:
    blocker = tmp_path / "blocker"
    blocker.write_text("in the way")
    out = {"a file": blocker, "below a file": blocker / "out", "/proc": Path("/proc/retinar")}[place]
    words = "/proc/retinar" if place == "/proc" else str(blocker)
    shell.refused("prepare", world.source, out, "--workers", 1, "--size", 32, words=words)
    shell.refused("encode", world.prepared, "--tokenizer", world.tokenizer, "--out", out, words=words)
    shell.refused("generate", "--model", world.gpt, "--count", 1, "--out", out, words=words)
    shell.refused("convert", world.gpt, out / "model.pt", words=words)
    line = ("train", "gpt", "--recipe", "fundus-tiny", "--data", world.codes, "--out", out)
    shell.refused(*line, "--set", "steps=1", words=words)
    shell.refused("demo", "--out", out, words=words)
    assert blocker.read_text() == "in the way"


def test_a_folder_that_belongs_to_something_else(shell: Shell, world: World, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    shell.refused("prepare", world.source, tmp_path, words=str(tmp_path))
    shell.refused("generate", "--model", world.gpt, "--count", 1, "--out", tmp_path, words=str(tmp_path))
    line = ("train", "gpt", "--recipe", "fundus-tiny", "--data", world.codes, "--out", tmp_path)
    shell.refused(*line, words=str(tmp_path))
    shell.refused("demo", "--out", tmp_path, words=str(tmp_path))
    assert files(tmp_path) == {"thesis.txt": b"precious"}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The disk runs full when the n-th file is flushed; the list holds how many may still be."""
    left, real = [0], os.fsync

    def fsync(handle: object) -> None:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        real(handle)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", fsync)
    yield left


@pytest.mark.parametrize("flushes", [0, 1, 3])
def test_disk_full_while_generating(
    flushes: int, shell: Shell, world: World, tmp_path: Path, full_disk: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("generate", "--model", world.gpt, "--count", 2, "--seed", 3, "--out")
    full_disk[0] = flushes
    said = shell(*line, tmp_path / "out")
    assert said.code == 2 and "disk full" in said.err.splitlines()[-1] and "Traceback" not in said.err
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.undo()
    assert shell(*line, tmp_path / "out").code == 0
    assert shell(*line, tmp_path / "whole").code == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_disk_full_while_preparing_training_and_converting(
    shell: Shell, world: World, tmp_path: Path, full_disk: list[int]
) -> None:
    full_disk[0] = 1
    lines = {
        "prepared": ("prepare", world.source, tmp_path / "prepared", "--workers", 1, "--size", 32),
        "codes": ("encode", world.prepared, "--tokenizer", world.tokenizer, "--out", tmp_path / "codes"),
        "run": ("train", "gpt", "--recipe", "fundus-tiny", "--data", world.codes, "--out", tmp_path / "run"),
    }
    for name, line in lines.items():
        full_disk[0] = 1
        said = shell(*line, *(("--set", "steps=2", "batch_size=2") if name == "run" else ()))
        assert said.code == 2 and "disk full" in said.err.splitlines()[-1], (name, said.code, said.err)
        assert "Traceback" not in said.err
    full_disk[0] = 0
    shell.refused("convert", world.gpt, tmp_path / "model.pt", words="disk full")
    assert not (tmp_path / "model.pt").exists() and not (tmp_path / "codes" / "meta.json").exists()
    assert not (tmp_path / "run" / "model").exists() and not list(tmp_path.glob("run/checkpoints/step-*"))


def test_a_disk_that_is_really_full(shell: Shell, world: World, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs of 48 KiB is not permitted here (needs root)")
    try:
        said = shell("generate", "--model", world.gpt, "--count", 40, "--label", "npdr", "--out", small / "out")
        assert said.code == 2 and "disk full" in said.err.splitlines()[-1] and "Traceback" not in said.err
        assert not list(small.rglob("*.partial"))
        said = shell("convert", world.gpt, small / "model.pt")
        assert said.code == 2 and "disk full" in said.err.splitlines()[-1] and "Traceback" not in said.err
        assert not (small / "model.pt").exists()
        line = ("train", "gpt", "--recipe", "fundus-tiny", "--data", world.codes, "--out", small / "run")
        said = shell(*line, "--set", "steps=1", "batch_size=2")
        assert said.code == 2 and "disk full" in said.err.splitlines()[-1] and "Traceback" not in said.err
        assert not list(small.glob("run/checkpoints/step-*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ---- half-written run folders ---------------------------------------------------------------------------------------


def test_half_written_run_folder(shell: Shell, world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = ("train", "gpt", "--recipe", "fundus-tiny", "--data", world.codes, "--out", run)
    sets = ("--set", "steps=4", "batch_size=2", "checkpoint_every=2", "keep_last=2", "log_every=1", "eval_every=2")
    assert shell(*line, *sets).code == 0
    shell.refused(*line, *sets, words="--resume")  # a run is there: never overwritten silently
    whole = files(run / "model")

    newest = max(run.glob("checkpoints/step-*"))
    data = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-64])
    shutil.rmtree(run / "model")
    said = shell(*line, *sets, "--resume")
    assert said.code == 0, said.err
    assert files(run / "model")["model.safetensors"] == whole["model.safetensors"]

    (run / "config.json").write_text("{")
    shell.refused(*line, *sets, "--resume", words="config.json")


def test_half_written_generated_folder(shell: Shell, world: World, tmp_path: Path) -> None:
    line = ("generate", "--model", world.gpt, "--count", 2, "--out", tmp_path / "out")
    assert shell(*line).code == 0
    whole = files(tmp_path / "out")
    image = next((tmp_path / "out").rglob("0*.png"))
    image.write_bytes(image.read_bytes()[:60])
    (tmp_path / "out" / "manifest.jsonl").unlink()
    assert shell(*line).code == 0
    assert files(tmp_path / "out") == whole
    shell.refused(*line, "--seed", 5, words=str(tmp_path / "out"))
    (tmp_path / "out" / "run.json").write_text("{")
    shell.refused(*line, words="run.json")


def test_half_written_codes(shell: Shell, world: World, tmp_path: Path) -> None:
    codes = tmp_path / "codes"
    shutil.copytree(world.codes, codes)
    (codes / "codes.npy").write_bytes((codes / "codes.npy").read_bytes()[:-16])
    line = ("train", "gpt", "--recipe", "fundus-tiny", "--data", codes, "--out", tmp_path / "run", "--set", "steps=1")
    shell.refused(*line, words=str(codes))
    (codes / "meta.json").unlink()
    shell.refused(*line, words=str(codes))
    assert not (tmp_path / "run" / "model").exists()


# ---- the real process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--model", "absent", "--out", "out", "--cfg-scale", "nan"],
        ["prepare", "absent", "out"],
        ["demo", "--data", "absent", "--out", "out"],
    ],
)
def test_in_a_process_of_its_own(argv: list[str], tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "retinar.cli", *argv],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said.returncode == 2 and said.stdout == ""
    assert said.stderr.count("\n") == 1 and said.stderr.startswith("retinar: "), said.stderr
    assert not (tmp_path / "out").exists()
