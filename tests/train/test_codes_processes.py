"""Encoding in several processes: the bytes of one, and what is left by any that dies is gone on with."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from retinar.commands.encode import Encode
from retinar.engine.checkpoint import save_tokenizer
from retinar.engine.errors import InputError
from retinar.engine.progress import SilentBar, silent
from retinar.engine.tokenizer import VQTokenizer
from retinar.train.codes import encode_folder
from retinar.train.encoding import shares
from tests.train.pictures import MODEL, write_pictures
from tests.train.processes import finish, start_processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: data, a tokenizer, and the codes of one process."""
    root = tmp_path_factory.mktemp("encode")
    write_pictures(root / "data", train=7, valid=1)
    torch.manual_seed(0)
    save_tokenizer(root / "vq", VQTokenizer(MODEL))
    encode_folder(root / "data", root / "vq", root / "codes" / "train", progress=silent)
    for split in ("train", "valid"):
        encode_folder(root / "data", root / "vq", root / "ten" / split, split, views="ten-crop", progress=silent)
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int, folder: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        encode_folder(folder / "data", folder / "vq", tmp_path, progress=silent)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path) == files(folder / "codes" / "train")


class Counting(SilentBar):
    """Calls ``at(bar)`` once so many images are done."""

    def __init__(self, images: int, at: Callable[[SilentBar], None]) -> None:
        super().__init__("", None)
        self.images, self.at = images, at

    def advance(self, count: int = 1, note: str | None = None) -> None:
        super().advance(count, note)
        if self.done >= self.images:
            self.at(self)


def test_a_killed_process_is_told_and_its_work_is_done_by_the_next_call(folder: Path, tmp_path: Path) -> None:
    def kill(bar: SilentBar) -> None:
        for child in multiprocessing.active_children()[:1]:
            os.kill(child.pid or 0, signal.SIGKILL)

    data, vq = folder / "data", folder / "vq"
    with pytest.raises(InputError, match=r"the process for cpu ended .*SIGKILL"):
        encode_folder(data, vq, tmp_path / "out", devices=["cpu"] * 2, progress=lambda *_: Counting(0, kill))
    assert not multiprocessing.active_children()
    assert len(list((tmp_path / "out" / ".encoding").glob("0*"))) <= 7  # the other one's
    seen: list[SilentBar] = []

    def counting(label: str, total: int | None = None) -> SilentBar:
        seen.append(SilentBar(label, total))
        return seen[-1]

    encode_folder(data, vq, tmp_path / "out", progress=counting)
    assert [(bar.label, bar.done, bar.total) for bar in seen] == [("encode train", 14, 14)]
    assert files(tmp_path / "out") == files(folder / "codes" / "train")


def test_under_torchrun(folder: Path, tmp_path: Path) -> None:
    """Two processes go on with what one has left, split after split."""

    def stop(bar: SilentBar) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        encode_folder(
            folder / "data", folder / "vq", out / "train", views="ten-crop", progress=lambda *_: Counting(3, stop)
        )
    begun = {path.name: path.stat().st_mtime_ns for path in (out / "train" / ".encoding").iterdir()}
    assert len(begun) == 3
    flags = ("--tokenizer", str(folder / "vq"), "--out", str(out), "--views", "ten-crop", "--device", "cpu")
    codes, told = finish(start_processes(2, "retinar", "encode", str(folder / "data"), *flags))
    assert codes == [0, 0] and "encode train (2 processes, the first one's share): 6/6" in told[0], told
    assert "encode" not in told[1]
    assert files(out) == files(folder / "ten")


def test_a_photograph_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "data", train=3, valid=0)
    (tmp_path / "data" / "train" / "npdr" / "npdr1.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"npdr1\.png"):
        encode_folder(tmp_path / "data", folder / "vq", tmp_path / "out", progress=silent)
    assert len(list((tmp_path / "out" / ".encoding").iterdir())) == 4  # those before it


def test_shares_are_contiguous_and_even() -> None:
    assert shares([0, 4, 8, 12, 16], 2) == [[0, 4, 8], [12, 16]]
    assert shares([3], 3) == [[3], [], []] and shares([], 2) == [[], []]


def test_what_the_command_refuses(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(words: str, **flags: object) -> None:
        with pytest.raises(InputError, match=words):
            Encode(folder / "data", folder / "vq", tmp_path / "none", **{"device": "cpu", **flags}).run(silent)  # type: ignore[arg-type]

    refused("--processes of at least 1", processes=0)
    refused("--processes with --device cpu", processes=2, gpus=2)
    refused("uses cuda:0 and on", gpus=2)
    refused("crop range", views="ten-crop", crop_range=0.5)
    if torch.cuda.device_count() < 9:
        refused("expected 9 GPUs", gpus=9, device="cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("found both", processes=2)
    assert not (tmp_path / "none").exists()
