"""Folders: complete, resumable after kill -9 to the byte, never two runs in one; and reproduce."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from retinar.commands.generate import Generate
from retinar.commands.reproduce import Reproduce
from retinar.engine import generate, image_folder, images
from retinar.engine.errors import InputError
from retinar.engine.generate import generate_folder
from retinar.engine.model import GPT
from retinar.engine.progress import Bar, SilentBar, silent
from retinar.engine.reproduce import reproduce
from retinar.engine.sampler import Sampler
from retinar.engine.tokenizer import VQTokenizer

COUNTS = [("healthy", 5), ("npdr", 4)]
ROOT = Path(__file__).resolve().parents[2]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(sampler: Sampler, out: Path, counts: list = COUNTS, **settings: Any) -> dict[str, Any]:
    return generate_folder(sampler, out, counts, **({"seed": 3, "npz": True, "progress": silent} | settings))


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_gpt: GPT, tiny_tokenizer: VQTokenizer
) -> tuple[Sampler, Path, dict[str, bytes]]:
    """An uninterrupted run."""
    sampler = Sampler(tiny_gpt, tiny_tokenizer, classes=("healthy", "npdr"), device="cpu")
    out = tmp_path_factory.mktemp("whole") / "out"
    summary = make(sampler, out)
    assert summary == {"out": str(out), "images": 9, "made": 9, "kept": 0}
    return sampler, out, tree(out)


def test_the_folder_is_complete(whole: tuple[Sampler, Path, dict[str, bytes]]) -> None:
    _, out, files = whole
    pngs = [f"images/healthy/{i:06d}.png" for i in range(5)] + [f"images/npdr/{i:06d}.png" for i in range(5, 9)]
    assert sorted(files) == sorted([*pngs, "manifest.jsonl", "run.json", "samples.npz", "sheet.png"])
    lines = [json.loads(line) for line in files["manifest.jsonl"].decode().splitlines()]
    assert [line["file"] for line in lines] == pngs and [line["index"] for line in lines] == list(range(9))
    assert [line["label"] for line in lines] == ["healthy"] * 5 + ["npdr"] * 4
    run = json.loads(files["run.json"])
    assert run["labels"] == [["healthy", 5], ["npdr", 4]] and run["seed"] == 3 and run["parameters"]["cfg_scale"] == 2.0
    with np.load(out / "samples.npz") as archive:
        for pixels_HWC, name in zip(archive["arr_0"], pngs, strict=True):
            assert np.array_equal(pixels_HWC, np.asarray(Image.open(out / name)))


def test_images_are_those_of_generate(whole: tuple[Sampler, Path, dict[str, bytes]]) -> None:
    sampler, out, _ = whole
    image = sampler.generate(["npdr"], seed=3, start_index=6)[0]
    with Image.open(out / "images/npdr/000006.png") as opened:
        assert np.array_equal(np.asarray(opened), np.asarray(image)) and image.info.items() <= opened.info.items()


def test_another_batch_gives_the_same_bytes(whole: tuple[Sampler, Path, dict[str, bytes]], tmp_path: Path) -> None:
    make(whole[0], tmp_path / "out", max_images=2, page_size=4, pages=30)
    assert tree(tmp_path / "out") == whole[2]


def test_a_second_call_makes_nothing(whole: tuple[Sampler, Path, dict[str, bytes]]) -> None:
    sampler, out, files = whole
    assert make(sampler, out)["made"] == 0
    assert tree(out) == files


def test_damage_of_every_kind_is_repaired(whole: tuple[Sampler, Path, dict[str, bytes]], tmp_path: Path) -> None:
    sampler, source, files = whole
    out = tmp_path / "out"
    shutil.copytree(source, out)
    (out / "images/healthy/000000.png").unlink()
    (out / "images/healthy/000001.png").write_bytes(files["images/healthy/000001.png"][:100])
    (out / "images/healthy/000002.png").write_bytes(b"")
    shutil.copy(out / "images/npdr/000005.png", out / "images/npdr/000006.png")  # whole, but of another index
    Image.new("RGB", (12, 12)).save(out / "images/npdr/000007.png")
    touched = Image.open(out / "images/npdr/000008.png")
    touched.load()
    touched.putpixel((0, 0), (1, 2, 3))
    images.save_png(touched, out / "images/npdr/000008.png")
    (out / "images/npdr/.000008.png.4242.partial").write_bytes(b"half")
    (out / ".sheet.png.4242.partial").write_bytes(b"half")
    (out / "sheet.png").unlink()
    (out / "manifest.jsonl").write_text("{}\n")
    assert make(sampler, out)["made"] == 6
    assert tree(out) == files


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are finished in threads beside the decode loop."""
    monkeypatch.setattr("retinar.engine.sampler.default_workers", lambda device: 3)


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are finished between the decode loop's steps."""
    monkeypatch.setattr("retinar.engine.sampler.default_workers", lambda device: 0)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("retinar-")]


@pytest.mark.parametrize("workers", [0, 3])
def test_threads_beside_the_loop_give_the_same_bytes(
    workers: int, whole: tuple[Sampler, Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retinar.engine.sampler.default_workers", lambda device: workers)
    make(whole[0], tmp_path / "out", max_images=4)
    assert tree(tmp_path / "out") == whole[2] and not threads()


class Stop(SilentBar):
    """Ctrl-C after some codes."""

    def advance(self, count: int = 1, note: str | None = None) -> None:
        super().advance(count, note)
        if self.label == "codes" and self.done > 200:
            raise KeyboardInterrupt


def test_ctrl_c_then_resume(whole: tuple[Sampler, Path, dict[str, bytes]], tmp_path: Path, in_turn: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(whole[0], tmp_path / "out", max_images=2, progress=lambda label, total: Stop(label, total))
    there = tree(tmp_path / "out")
    assert "run.json" in there and "manifest.jsonl" not in there and 2 <= len(there) < 10
    summary = make(whole[0], tmp_path / "out")
    assert summary["kept"] == len(there) - 1 and tree(tmp_path / "out") == whole[2]


def test_ctrl_c_with_threads_then_resume(
    whole: tuple[Sampler, Path, dict[str, bytes]], tmp_path: Path, beside: None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(whole[0], tmp_path / "out", max_images=2, progress=lambda label, total: Stop(label, total))
    there = tree(tmp_path / "out")
    assert "run.json" in there and "manifest.jsonl" not in there and len(there) < 10 and not threads()
    assert all(there[name] == whole[2][name] for name in there)  # whole files and no others
    assert make(whole[0], tmp_path / "out")["kept"] == len(there) - 1
    assert tree(tmp_path / "out") == whole[2]


SLOW = """
import sys, time, torch
from retinar.engine.generate import generate_folder
from retinar.engine.progress import SilentBar
from retinar.engine.sampler import Sampler
class Slow(SilentBar):
    def advance(self, count=1, note=None):
        time.sleep(0.004)
torch.set_num_threads(1)
generate_folder(Sampler.from_pretrained(sys.argv[1], device="cpu"), sys.argv[2], [("healthy", 5), ("npdr", 4)],
    seed=3, npz=True, max_images=2, model=sys.argv[1], progress=Slow)
"""


def test_kill_9_then_resume_is_byte_equal(tmp_path: Path, tiny_checkpoint: Path) -> None:
    sampler = Sampler.from_pretrained(tiny_checkpoint, device="cpu")
    make(sampler, tmp_path / "whole", model=tiny_checkpoint)
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(tiny_checkpoint), str(out)], env=environment)
    deadline = time.monotonic() + 120
    while len(list(out.glob("images/*/0*.png"))) < 3:
        assert child.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    there = len(list(out.glob("images/*/0*.png")))
    assert there < 9 and not (out / "manifest.jsonl").exists()
    summary = make(sampler, out, model=tiny_checkpoint)
    assert summary["kept"] == there and "kept_from_another_implementation" not in summary
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "its seed is 3, and 4 was asked for"),
        ({"cfg_scale": 1.5}, "its parameters is .*1.5"),
        ({"start_index": 1}, "its start_index is 0, and 1"),
        ({"counts": [("healthy", 9)]}, "its labels is"),
    ],
    ids=str,
)
def test_another_run_in_the_folder_is_refused(
    whole: tuple[Sampler, Path, dict[str, bytes]], change: dict[str, Any], message: str
) -> None:
    sampler, out, files = whole
    with pytest.raises(InputError, match=f"holds a different run: {message}"):
        make(sampler, out, **change)
    assert tree(out) == files


def test_another_precision_is_another_run(
    whole: tuple[Sampler, Path, dict[str, bytes]], tiny_gpt: GPT, tiny_tokenizer: VQTokenizer
) -> None:
    other = Sampler(tiny_gpt, tiny_tokenizer, classes=("healthy", "npdr"), device="cpu", dtype=torch.bfloat16)
    with pytest.raises(InputError, match='its dtype is "float32", and "bfloat16"'):
        make(other, whole[1])


def test_images_of_another_implementation_are_kept_and_counted(
    whole: tuple[Sampler, Path, dict[str, bytes]], tiny_gpt: GPT, tiny_tokenizer: VQTokenizer, tmp_path: Path
) -> None:
    shutil.copytree(whole[1], tmp_path / "out")
    (tmp_path / "out/images/npdr/000008.png").unlink()
    other = Sampler(tiny_gpt, tiny_tokenizer, classes=("healthy", "npdr"), device="cpu")
    other.origin.implementation["threads"] = 99
    summary = make(other, tmp_path / "out")
    assert summary["made"] == 1 and summary["kept_from_another_implementation"] == 8


def test_strange_folders_are_refused(whole: tuple[Sampler, Path, dict[str, bytes]], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/holiday.txt").write_text("mine")
    with pytest.raises(InputError, match="is no folder of a generate run"):
        make(whole[0], tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["holiday.txt"]
    (tmp_path / "half").mkdir()
    (tmp_path / "half/run.json").write_text('{"format": 1,')
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        make(whole[0], tmp_path / "half")
    with pytest.raises(InputError, match="is no folder of a generate run"):
        make(whole[0], tmp_path / "full/holiday.txt")
    with pytest.raises(OSError, match="holiday"):
        make(whole[0], tmp_path / "full/holiday.txt/out")


def test_a_full_disk_leaves_no_half_file(
    whole: tuple[Sampler, Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_turn: None
) -> None:
    save, calls = Image.Image.save, []

    def failing(self: Image.Image, path: Any, *arguments: Any, **settings: Any) -> None:
        calls.append(path)
        save(self, path, *arguments, **settings)
        if len(calls) == 4:
            raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", failing)
        with pytest.raises(OSError, match="No space left"):
            make(whole[0], tmp_path / "out")
    assert len(tree(tmp_path / "out")) == 4  # run.json and three images
    assert make(whole[0], tmp_path / "out")["kept"] == 3
    assert tree(tmp_path / "out") == whole[2]


def test_a_full_disk_found_by_a_thread(
    whole: tuple[Sampler, Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: None
) -> None:
    flush, left = os.fsync, [4]

    def failing(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        flush(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="No space left") as caught:
            make(whole[0], tmp_path / "out", max_images=3)
    assert caught.value.errno == 28 and not threads()
    there = tree(tmp_path / "out")
    assert sorted(there) == sorted(there.keys() & whole[2].keys()) and len(there) == 4
    assert make(whole[0], tmp_path / "out")["kept"] == 3
    assert tree(tmp_path / "out") == whole[2]


@pytest.mark.parametrize(
    ("counts", "message"),
    [([("healthy", 0)], "count must be at least 1, got 0"), ([], "one label"), ([("dme", 2)], "healthy, npdr")],
    ids=str,
)
def test_nothing_is_written_for_bad_requests(tiny_sampler: Sampler, tmp_path: Path, counts: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(tiny_sampler, tmp_path / "out", counts)
    with pytest.raises(InputError, match="pool has 2"):
        make(tiny_sampler, tmp_path / "out", pages=2)
    assert not (tmp_path / "out").exists()


def test_class_names_cannot_leave_the_folder(tiny_gpt: GPT, tiny_tokenizer: VQTokenizer, tmp_path: Path) -> None:
    sampler = Sampler(tiny_gpt, tiny_tokenizer, classes=("../../up", "__.._up"), device="cpu")
    make(sampler, tmp_path / "in/out", [(0, 1), (1, 1)], npz=False)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    assert len(list((tmp_path / "in/out/images").glob("*/00000?.png"))) == 2
    assert image_folder._folder_name("..") == "_" and image_folder._folder_name("a/b") == "a_b"


def test_labels_in_any_order_keep_their_indices(tiny_sampler: Sampler, tmp_path: Path) -> None:
    make(tiny_sampler, tmp_path / "out", [("npdr", 2), (0, 1)], start_index=40, npz=False)
    names = sorted(str(path.relative_to(tmp_path / "out/images")) for path in tmp_path.glob("out/images/*/*"))
    assert names == ["healthy/000042.png", "npdr/000040.png", "npdr/000041.png"]


# --- reproduce and the commands -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A folder made by the command."""
    out = tmp_path_factory.mktemp("published") / "out"
    command = Generate(model=tiny_checkpoint, out=out, label=["healthy,npdr"], count=2, seed=6, top_k=20, device="cpu")
    assert command.run(silent)["images"] == 4
    return out


def test_reproduce_finds_its_checkpoint_and_is_equal(published: Path) -> None:
    report = Reproduce(published / "images/npdr/000003.png").run(silent)
    assert report["equal"] is True and report["codes_differing"] == 0 and report["largest_pixel_difference"] == 0
    assert report["same_implementation"] is True and report["file_untouched"] is True
    assert str(report["verdict"]).startswith("equal")


def test_reproduce_away_from_its_folder_needs_the_checkpoint(
    published: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copy(published / "images/healthy/000000.png", tmp_path / "a.png")
    with pytest.raises(InputError, match="name it with --model"):
        reproduce(tmp_path / "a.png", progress=silent)
    assert reproduce(tmp_path / "a.png", tiny_checkpoint, progress=silent)["equal"]


def test_reproduce_counts_what_differs(published: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with Image.open(published / "images/healthy/000000.png") as image:
        image.load()
    red = image.getpixel((4, 4))[0]  # type: ignore[index]
    image.putpixel((4, 4), ((red + 100) % 256, *image.getpixel((4, 4))[1:]))  # type: ignore[index]
    image.info["implementation"] = image.info["implementation"].replace('"runner": "', '"runner": "other ')
    image.info["seed"] = "7"
    images.save_png(image, tmp_path / "a.png")
    report = reproduce(tmp_path / "a.png", tiny_checkpoint, progress=silent)
    assert not report["equal"] and not report["file_untouched"] and not report["same_implementation"]
    assert 0 < report["codes_differing"] <= report["codes"] == 36
    assert report["implementation_differences"].keys() == {"runner"}
    was, now = report["implementation_differences"]["runner"]
    assert was == f"other {now}"
    assert "codes differ" in report["verdict"] and "another implementation" in report["verdict"]


def test_reproduce_refuses_another_checkpoint(
    published: Path, tiny_gpt: GPT, tiny_tokenizer: VQTokenizer, tmp_path: Path
) -> None:
    import copy

    from retinar.engine import checkpoint

    other = copy.deepcopy(tiny_gpt)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    checkpoint.save_gpt(tmp_path / "other", other, classes=("healthy", "npdr"), tokenizer=tiny_tokenizer)
    with pytest.raises(InputError, match=r"was made by the checkpoint \w{12}, but .*other is \w{12}"):
        reproduce(published / "images/healthy/000000.png", tmp_path / "other", progress=silent)


def test_upstreams_files_work_without_conversion(golden: Path, tmp_path: Path) -> None:
    config = str(golden / "gpt_config.json")
    files = {"model": golden / "gpt_ddp.pt", "tokenizer": golden / "vq.pt"}
    Generate(**files, config=config, label=["0,1"], count=1, out=tmp_path / "out", device="cpu").run(silent)
    shutil.copy(tmp_path / "out/images/1/000001.png", tmp_path / "a.png")
    assert Reproduce(tmp_path / "out/images/0/000000.png").run(silent)["equal"]
    assert Reproduce(tmp_path / "a.png", **files, config=config).run(silent)["equal"]
    assert Image.open(tmp_path / "a.png").size == (48, 48)


def test_the_command_defaults_to_every_class(tiny_checkpoint: Path, tmp_path: Path) -> None:
    Generate(model=tiny_checkpoint, out=tmp_path / "out", count=1, device="cpu").run(silent)
    assert sorted(path.name for path in (tmp_path / "out/images").iterdir()) == ["healthy", "npdr"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count"),
        ({"threads": 0}, "threads"),
        ({"top_p": 0.0}, "top-p"),
        ({"label": ["x"]}, "unknown"),
        ({"max_images": 0}, "max-images must be at least 1, got 0"),
        ({"gpus": 0}, "gpus must be at least 1, got 0"),
        ({"gpus": -2}, "gpus must be at least 1, got -2"),
        ({"gpus": 2}, "--gpus 2 uses cuda:0 and on, but --device is cpu"),
        ({"gpus": 2, "device": "cuda:1"}, "but --device is cuda:1"),
        ({"gpus": 99, "device": None}, r"expected 99 GPUs, found \d+ in this machine"),
        ({"gpus": 99, "device": "cuda"}, "expected 99 GPUs"),
    ],
    ids=str,
)
def test_the_command_refuses_at_the_door(
    tiny_checkpoint: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Generate(**({"model": tiny_checkpoint, "out": tmp_path / "out", "device": "cpu"} | settings)).run(silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gpus", [1, 3])
def test_the_command_hands_on_what_was_asked_for(
    gpus: int, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retinar.engine import shards
    from retinar.engine.shards import Shards, Source

    def generate_folder(sampler: Sampler, *_: Any, **settings: Any) -> dict[str, Any]:
        given.update(settings)
        return {}

    def load(self: Source, device: str | None) -> Sampler:
        loaded.append(device)
        return Sampler.from_pretrained(self.model, device="cpu")

    given: dict[str, Any] = {}
    loaded: list[str | None] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(generate, "generate_folder", generate_folder)
    monkeypatch.setattr(shards.Source, "load", load)
    command = Generate(model=tiny_checkpoint, out=tmp_path / "out", gpus=gpus, batch_invariant=True, dtype="bfloat16")
    if gpus == 1:
        command.device = "cpu"
    command.run(silent)
    source = Source(tiny_checkpoint, dtype="bfloat16", batch_invariant=True)
    devices = [f"cuda:{number}" for number in range(gpus)]
    assert given["make"] == (generate.make_here if gpus == 1 else Shards(source, devices))
    assert loaded == (["cpu"] if gpus == 1 else ["cuda:0"])
    assert "max_images" not in given


def test_the_commands_flags_reach_the_provenance(tiny_checkpoint: Path, tmp_path: Path) -> None:
    line = {"model": tiny_checkpoint, "count": 1, "label": ["npdr"], "device": "cpu"}
    for name, flags in {"plain": {}, "half": {"dtype": "bfloat16"}, "invariant": {"batch_invariant": True}}.items():
        Generate(**line, **flags, out=tmp_path / name).run(silent)
    images_of = {path.parts[-4]: path for path in tmp_path.glob("*/images/npdr/000000.png")}
    assert Image.open(images_of["plain"]).info["dtype"] == "float32"  # a CPU's default
    assert Image.open(images_of["half"]).info["dtype"] == "bfloat16"
    assert images_of["plain"].read_bytes() == images_of["invariant"].read_bytes()  # always so on a CPU
    assert Reproduce(images_of["half"]).run(silent)["equal"]


def test_bars_are_bars() -> None:
    bar: Bar = Stop("x", 1)
    with bar:
        bar.advance()
