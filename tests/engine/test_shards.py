"""Several processes for one folder: its bytes are those of one, and no death or interruption goes unnoticed."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from retinar.engine import children, provenance, shards
from retinar.engine.children import Child
from retinar.engine.errors import InputError
from retinar.engine.generate import Limits, generate_folder
from retinar.engine.image_folder import items_of
from retinar.engine.progress import SilentBar, silent
from retinar.engine.request import SamplingParams
from retinar.engine.sampler import Sampler
from retinar.engine.shards import CountingBar, Shards, Source

ROOT = Path(__file__).resolve().parents[2]
COUNTS = [("healthy", 7), ("npdr", 5)]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(model: Path, out: Path, devices: list[str] | None = None, **settings: Any) -> dict[str, Any]:
    """In processes on ``devices``, or here."""
    if devices is not None:
        settings["make"] = Shards(Source(model), devices)
    settings = {"seed": 3, "npz": True, "max_images": 2, "model": model, "progress": silent} | settings
    return generate_folder(Sampler.from_pretrained(model, device="cpu"), out, COUNTS, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, bytes]:
    """The folder of one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    make(tiny_checkpoint, out)
    return tree(out)


class Bar(SilentBar):
    """Calls ``at_image(images so far)`` at each image."""

    def __init__(self, label: str, total: int | None, at_image: Callable[[int], None]) -> None:
        super().__init__(label, total)
        self.at_image, self.notes = at_image, list[str]()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        super().advance(count, note)
        self.notes += [note] if note else []
        if note and note.endswith("images"):
            self.at_image(int(note.split()[0]))


def no_child_is_left() -> bool:
    return not multiprocessing.active_children()


def test_two_processes_make_the_folder_of_one(whole: dict[str, bytes], tiny_checkpoint: Path, tmp_path: Path) -> None:
    def at_image(number: int) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGINT)  # a terminal's Ctrl-C reaches them too: they leave it to the parent

    bars: list[Bar] = []

    def progress(label: str, total: int | None = None) -> Bar:
        bars.append(Bar(label, total, at_image))
        return bars[-1]

    summary = make(tiny_checkpoint, tmp_path / "out", ["cpu", "cpu"], progress=progress)
    assert summary == {"out": str(tmp_path / "out"), "images": 12, "made": 12, "kept": 0}
    assert tree(tmp_path / "out") == whole and no_child_is_left()
    [bar] = bars
    assert (bar.label, bar.done, bar.total) == ("codes", 12 * 36, 12 * 36)
    notes = [note for note in bar.notes if note != "decoding images on cpu"]  # what a child's loop left
    assert notes == ["loading in 2 processes", *(f"{number} of 12 images" for number in range(1, 13))]
    # nothing is missing now: nothing is started
    assert make(tiny_checkpoint, tmp_path / "out", ["nowhere"])["kept"] == 12


def test_a_killed_process_is_named_and_the_rest_can_be_made(
    whole: dict[str, bytes], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def at_image(number: int) -> None:
        if number == 2:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    out = tmp_path / "out"
    words = r"^the process for cpu ended .* \(exit code -9, SIGKILL\); run the same command again .*$"
    with pytest.raises(InputError, match=words):
        make(tiny_checkpoint, out, ["cpu"] * 2, max_images=1, progress=lambda label, total: Bar(label, total, at_image))
    assert no_child_is_left()
    there = {name: data for name, data in tree(out).items() if not name.endswith(".partial")}
    assert 3 <= len(there) < 13 and there.items() <= whole.items()  # the other one was stopped
    assert make(tiny_checkpoint, out)["kept"] == len(there) - 1
    assert tree(out) == whole


def test_ctrl_c_leaves_a_folder_that_continues(whole: dict[str, bytes], tiny_checkpoint: Path, tmp_path: Path) -> None:
    def at_image(number: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make(tiny_checkpoint, out, ["cpu"], max_images=1, progress=lambda label, total: Bar(label, total, at_image))
    assert no_child_is_left()
    there = tree(out)
    assert 2 <= len(there) < 13 and there.items() <= whole.items()  # no half file either
    assert make(tiny_checkpoint, out)["kept"] == len(there) - 1
    assert tree(out) == whole


PARENT = """
import sys
from pathlib import Path
from retinar.engine.generate import generate_folder
from retinar.engine.shards import Shards, Source
if __name__ == "__main__":
    source = Source(Path(sys.argv[1]))
    generate_folder(source.load("cpu"), sys.argv[2], [("healthy", 3000)], max_images=1, make=Shards(source, ["cpu"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc, which only Linux has")
def test_processes_end_when_their_parent_is_killed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    line = [sys.executable, str(tmp_path / "parent.py"), str(tiny_checkpoint), str(tmp_path / "out")]
    parent = subprocess.Popen(line, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/images/*/0*.png")):
        assert parent.poll() is None and time.monotonic() < deadline, "no image was made"
        time.sleep(0.02)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert children and all(alive(child) for child in children)
    parent.kill()
    parent.wait()
    while any(alive(child) for child in children):
        assert time.monotonic() < deadline, "a process outlived its parent"
        time.sleep(0.02)
    assert len(list(tmp_path.glob("out/images/*/0*.png"))) < 3000


def alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- the process, within this one -------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[Source, str, shards.Job], list[tuple[str, Any]]]:
    """``_work`` without a process: what it says on the line."""
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(children.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(children.warnings, "simplefilter", lambda action: None)

    def work(source: Source, device: str, job: shards.Job) -> list[tuple[str, Any]]:
        here, end = multiprocessing.Pipe()
        here.send(job)
        shards._work(end, source, device)
        assert handlers[signal.SIGINT] is signal.SIG_IGN
        with pytest.raises(SystemExit):
            handlers[signal.SIGTERM](signal.SIGTERM, None)
        said = []
        while here.poll():
            said.append(here.recv())
        return said

    return work


def job(out: Path, model: Path, **changes: Any) -> shards.Job:
    sampler = Sampler.from_pretrained(model, device="cpu")
    items = items_of(sampler.requests(["healthy", "npdr"], SamplingParams(), seed=3), sampler.classes)
    for item in items:
        (out / item.file).parent.mkdir(parents=True, exist_ok=True)
    made = shards.Job(out, items, Limits(2, 16, None), sampler.origin, torch.get_num_threads())
    return made._replace(**changes)


def test_a_process_tells_what_it_made(in_process: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        said = in_process(Source(tiny_checkpoint), "cpu", job(tmp_path, tiny_checkpoint, threads=before + 1))
    finally:
        torch.set_num_threads(before)
    # the parent's, not this machine's: it is in the provenance, and on a CPU it may change bits
    assert provenance.read(tmp_path / "images/healthy/000000.png").implementation["threads"] == before + 1
    assert sum(value for kind, value in said if kind == "codes") == 72
    assert [kind for kind, _ in said if kind not in ("codes", "note")] == ["image", "image", "done"]
    assert len(tree(tmp_path)) == 2


def test_what_a_process_refuses_comes_back(in_process: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    asked = job(tmp_path, tiny_checkpoint)
    [(kind, error)] = in_process(Source(tiny_checkpoint), "cuda:77", asked)
    assert kind == "failed" and isinstance(error, InputError) and "cuda:77" in str(error)
    changed = asked._replace(origin=dataclasses.replace(asked.origin, checkpoint="0" * 64))
    [(kind, error)] = in_process(Source(tiny_checkpoint), "cpu", changed)
    assert kind == "failed" and isinstance(error, InputError) and "was changed while" in str(error)
    [(kind, error)] = in_process(Source(tmp_path / "gone"), "cpu", asked)
    assert kind == "failed" and isinstance(error, InputError | OSError) and "gone" in str(error)
    [(kind, error)] = in_process(Source(tiny_checkpoint), "cpu", asked._replace(limits=None))
    assert kind == "failed" and isinstance(error, str) and "Traceback" in error


def test_a_disk_that_fills_up_under_a_process(in_process: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    asked = job(tmp_path, tiny_checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        *_, (kind, error) = in_process(Source(tiny_checkpoint), "cpu", asked)
    assert kind == "failed" and isinstance(error, OSError) and error.errno == 28
    assert tree(tmp_path) == {}


# --- the watcher, without processes -----------------------------------------------------------------------------------


class FakeProcess:
    def __init__(self, exitcode: int | None = None) -> None:
        self.exitcode = exitcode

    def join(self, timeout: float) -> None:
        pass


def child(device: str, exitcode: int | None = None) -> tuple[Child, Connection]:
    """A child without a process, and the end of the line that its process would hold."""
    made = Child.__new__(Child)
    made.device, made.done = device, False
    made.process = FakeProcess(exitcode)  # type: ignore[assignment]
    made.line, end = multiprocessing.Pipe()
    return made, end


def watch(*watched: Child) -> Bar:
    bar = Bar("codes", 8, lambda number: None)
    children.watch(watched, bar, 4)
    return bar


def test_counts_of_all_add_up() -> None:
    (one, first), (two, second) = child("cuda:0"), child("cuda:1")
    for message in (("note", "preparing steps"), ("codes", 3), ("image", None), ("codes", 2), ("done", None)):
        first.send(message)
    for message in (("codes", 3), ("image", None), ("done", None)):
        second.send(message)
    bar = watch(one, two)
    assert bar.done == 8 and one.done and two.done
    assert "preparing steps on cuda:0" in bar.notes and bar.notes[-1] == "2 of 4 images"


@pytest.mark.parametrize(
    "error", [InputError("lower --pages"), OSError(28, "No space left on device", "/x"), ModuleNotFoundError("triton")]
)
def test_errors_come_through_as_they_are(error: Exception) -> None:
    made, end = child("cuda:3")
    children.tell(end, error)
    with pytest.raises(type(error)) as caught:
        watch(made)
    assert str(caught.value) == str(error) and not made.done


def test_a_fault_of_ours_brings_its_traceback() -> None:
    made, end = child("cuda:3")
    children.tell(end, "Traceback: IndexError")
    with pytest.raises(RuntimeError, match="the process for cuda:3 failed:\nTraceback: IndexError"):
        watch(made)


@pytest.mark.parametrize(
    ("exitcode", "words"), [(-11, "exit code -11, SIGSEGV"), (1, r"\(exit code 1\)"), (-9, "SIGKILL")]
)
def test_a_death_without_a_word_is_told(exitcode: int, words: str) -> None:
    (alive, _), (dead, end) = child("cuda:0"), child("cuda:1", exitcode)
    end.close()
    with pytest.raises(InputError, match=f"the process for cuda:1 ended .*{words}"):
        watch(alive, dead)


def test_a_death_is_told_though_somebody_holds_the_line_open() -> None:
    (alive, _), (dead, end) = child("cuda:0"), child("cuda:1", -9)
    end.send(("codes", 1))  # what it had still said is heard first
    bar = Bar("codes", 8, lambda number: None)
    with pytest.raises(InputError, match="cuda:1 ended"):
        children.watch([alive, dead], bar, 4)
    assert bar.done == 1


def test_a_share_is_not_sent_to_the_dead() -> None:
    made, end = child("cuda:0", -9)
    end.close()
    made.send(None)
    with pytest.raises(InputError, match="cuda:0 ended"):
        watch(made)


@pytest.mark.parametrize("missing", [12, 2])
def test_shares_hold_every_class_and_no_process_is_idle(
    missing: int, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[list[tuple[int, int]]] = []

    class Started(Exception):
        pass

    def send(self: Child, job: shards.Job) -> None:
        shares.append([(item.request.index, item.request.label) for item in job.items])
        assert self.device == f"cuda:{len(shares) - 1}"
        assert job.limits == Limits(2, 16, None) and job.threads == torch.get_num_threads()
        if len(shares) == min(3, missing):
            raise Started

    def start(self: Child, work: Any, device: str, *arguments: Any) -> None:
        self.device, self.done = device, False

    make(tiny_checkpoint, tmp_path / "out", npz=False)
    for path in sorted(tmp_path.glob("out/images/*/*.png"))[:: 12 // missing]:
        path.unlink()
    monkeypatch.setattr(Child, "__init__", start)
    monkeypatch.setattr(Child, "send", send)
    monkeypatch.setattr(shards, "stop", lambda stopped: started.append(len(stopped)))
    started: list[int] = []
    with pytest.raises(Started):
        make(tiny_checkpoint, tmp_path / "out", ["cuda:0", "cuda:1", "cuda:2"], npz=False)
    assert started == [min(3, missing)]
    if missing == 12:
        assert sorted(each for share in shares for each in share) == [(i, int(i >= 7)) for i in range(12)]
        assert [len(share) for share in shares] == [4, 4, 4]
        assert all({label for _, label in share} == {0, 1} for share in shares)
    else:
        assert shares == [[(0, 0)], [(6, 0)]]


def test_counts_are_sent_a_few_times_a_second_and_none_is_lost() -> None:
    here, there = multiprocessing.Pipe()
    bar = CountingBar(there, "codes", 500)
    for _ in range(500):
        bar.advance(1)
    counts = []
    while here.poll():
        counts.append(here.recv()[1])
    assert sum(counts) == 500 and len(counts) < 50


def test_a_sampler_that_was_unloaded_makes_nothing_and_knows_everything(tiny_checkpoint: Path) -> None:
    sampler = Sampler.from_pretrained(tiny_checkpoint, device="cpu")
    known = sampler.origin, sampler.classes, sampler.require_tokenizer().config
    sampler.unload()
    sampler.unload()
    assert (sampler.origin, sampler.classes, sampler.require_tokenizer().config) == known
    assert all(parameter.is_meta for parameter in sampler.require_tokenizer().parameters())
    with pytest.raises(RuntimeError, match="the weights were unloaded"):
        sampler.generate([0])
