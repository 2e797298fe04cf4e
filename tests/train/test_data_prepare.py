"""Preparation as a whole: files, manifest, resuming, interruption, and folders that are not ours."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinar.engine.errors import InputError
from retinar.engine.files import sha256_file
from retinar.engine.progress import silent
from retinar.train.data import prepare as module
from retinar.train.data.images import ImageSet
from retinar.train.data.manifest import JOURNAL, MANIFEST, SKIPPED, read_manifest, read_skipped
from retinar.train.data.prepare import prepare

ROOT = Path(__file__).resolve().parent.parent.parent


def picture(seed: int, width: int = 80, height: int = 64) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def source(root: Path, per_class: int = 4, splits: tuple[str, ...] = ("train", "valid", "test")) -> Path:
    """Grades 0 to 3 in turn, so half of the photographs are healthy and npdr and the others are left out or npdr."""
    for s, split in enumerate(splits):
        (root / split).mkdir(parents=True)
        lines = []
        for grade in (0, 1, 2, 3):
            for i in range(per_class):
                name = f"p{s}{grade}{i:03d}_left.jpg"
                picture(s * 10_000 + grade * 1000 + i).save(root / split / name, quality=90)
                lines.append(f"{name} {grade}\n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def run(src: Path, out: Path, **options: object) -> dict:
    return prepare(src, out, size=64, progress=silent, **{"workers": 1, **options})


def snapshot(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def times(out: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in sorted(out.rglob("*"))}


def test_files_and_manifest_tell_the_same(tmp_path: Path) -> None:
    src, out = source(tmp_path / "src"), tmp_path / "out"
    summary = run(src, out)
    assert summary["counts"] == {split: {"healthy": 4, "npdr": 8} for split in ("train", "valid", "test")}
    assert summary["left_out"] == {"1": 12}
    assert (summary["made"], summary["reused"], summary["skipped"]) == (36, 0, 0)
    json.dumps(summary)
    records = read_manifest(out)
    assert [r.file for r in records] == sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png"))
    for record in records[::5]:
        assert sha256_file(out / record.file) == record.sha256
        assert sha256_file(src / record.source) == record.source_sha256
        image = Image.open(out / record.file)
        assert (image.mode, image.size) == ("RGB", (64, 64))
        assert record.file.startswith(f"{record.split}/{record.label}/")
        assert record.source_size == (80, 64) and not record.upsampled
        assert record.patient == Path(record.source).stem.removesuffix("_left")
    assert not (out / JOURNAL).exists()


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A source with some bad files, and what one worker makes of it."""
    src = source(tmp_path_factory.mktemp("once") / "src")
    (src / "train" / "p00000_left.jpg").write_bytes(b"")
    whole = (src / "valid" / "p12001_left.jpg").read_bytes()
    (src / "valid" / "p12001_left.jpg").write_bytes(whole[: len(whole) // 2])
    (src / "test" / "p23002_left.jpg").unlink()
    (src / "test" / "p23002_left.jpg").mkdir()
    run(src, src.parent / "out")
    return src, snapshot(src.parent / "out")


def test_bad_files_are_listed_and_skipped(once: tuple[Path, dict[str, bytes]]) -> None:
    src, files = once
    skips = {skip.source: skip.reason for skip in read_skipped(src.parent / "out")}
    assert set(skips) == {"train/p00000_left.jpg", "valid/p12001_left.jpg", "test/p23002_left.jpg"}
    assert skips["train/p00000_left.jpg"] == "the file is empty"
    assert "truncated" in skips["valid/p12001_left.jpg"]
    assert "directory" in skips["test/p23002_left.jpg"]
    assert sum(name.endswith(".png") for name in files) == 33


def test_two_workers_write_the_same_bytes(once: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    src, files = once
    assert run(src, tmp_path / "out", workers=2)["workers"] == 2
    assert snapshot(tmp_path / "out") == files


def test_a_second_run_touches_nothing(once: tuple[Path, dict[str, bytes]]) -> None:
    src, _ = once
    before = times(src.parent / "out")
    summary = run(src, src.parent / "out")
    assert (summary["made"], summary["reused"], summary["skipped"]) == (0, 33, 3)
    assert times(src.parent / "out") == before


@pytest.mark.parametrize("state", ["no journal line", "torn line", "half a file", "no manifest yet"])
def test_an_interrupted_run_is_completed(once: tuple[Path, dict[str, bytes]], tmp_path: Path, state: str) -> None:
    """The states that a kill can leave, made by hand."""
    src, files = once
    out = tmp_path / "out"
    run(src, out)
    lines = (out / MANIFEST).read_text().splitlines(keepends=True)
    planned = "".join(json.dumps({"file": json.loads(line)["file"], "planned": True}) + "\n" for line in lines)
    (out / MANIFEST).unlink()
    journal = planned + "".join(lines[:10])
    done = 10
    for line in lines[20:]:
        (out / json.loads(line)["file"]).unlink()
    if state == "torn line":
        journal += lines[10][:40]
    if state == "half a file":
        victim = out / json.loads(lines[3])["file"]
        victim.write_bytes(victim.read_bytes()[:100])
        (victim.parent / f".{victim.name}.123.partial").write_bytes(b"x")
        done = 9
    if state == "no manifest yet":
        journal, done = planned, 0
    (out / JOURNAL).write_text(journal)
    with pytest.raises(InputError, match="interrupted"):
        ImageSet(out, "train")
    summary = run(src, out)
    assert (summary["made"], summary["reused"]) == (33 - done, done)
    assert snapshot(out) == files


def test_kill_9_at_any_moment_and_resume(tmp_path: Path) -> None:
    src, out = source(tmp_path / "src", per_class=40, splits=("train", "test")), tmp_path / "out"
    run(src, tmp_path / "whole")
    code = f"""
import sys, time
from pathlib import Path
from retinar.train.data import prepare as m
make = m.make
def slow(job):
    time.sleep(0.02)
    return make(job)
m.make = slow
m.prepare(Path({str(src)!r}), Path({str(out)!r}), size=64, workers=1)
"""
    for wait in (5, 40):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        deadline = time.monotonic() + 60
        while len(list(out.glob("*/*/*.png"))) < wait and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (out / MANIFEST).exists()
    summary = run(src, out)
    assert summary["reused"] >= 30 and summary["made"] > 0
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_ctrl_c_stops_soon_and_the_next_run_goes_on(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    (src / "train" / "a").mkdir(parents=True)
    picture(1, 2000, 1500).save(tmp_path / "large.jpg")
    for i in range(100):
        os.link(tmp_path / "large.jpg", src / "train" / "a" / f"{i}.jpg")
    command = [sys.executable, "-m", "retinar.cli", "prepare", str(src), str(out), "--size", "64", "--workers", "2"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell's background jobs ignore Ctrl-C and hand that on, to the tests and from them to this process
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("*/*/*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: parent and workers
    _, told = process.communicate(timeout=30)
    assert process.returncode != 0 and "Traceback" not in told
    assert not (out / MANIFEST).exists()
    assert run(src, out)["counts"] == {"train": {"a": 100}}


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, time
from pathlib import Path
from retinar.train.data.pool import parallel
from tests_pool_probe import linger
if __name__ == "__main__":
    list(parallel(linger, {{i: {str(tmp_path)!r} for i in range(64)}}, 2))
"""
    probe = "import os, time\nfrom pathlib import Path\n\ndef linger(folder):\n"
    probe += "    (Path(folder) / f'{os.getpid()}.pid').touch()\n    time.sleep(0.2)\n"
    (tmp_path / "tests_pool_probe.py").write_text(probe)
    (tmp_path / "main.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = [int(p.stem) for p in tmp_path.glob("*.pid")]
    assert len(workers) == 2
    process.kill()
    process.wait()

    def alive(pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/stat") as handle:
                return handle.read().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def test_a_full_disk_is_an_error_not_a_skip_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, out = source(tmp_path / "src"), tmp_path / "out"
    made, replace_file = [], os.replace

    def full(a: object, b: object) -> None:
        if str(b).endswith(".png"):
            made.append(b)
            if len(made) > 7:
                raise OSError(28, "No space left on device", str(b))
        replace_file(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            run(src, out)
    assert not (out / MANIFEST).exists() and not list(out.rglob("*.partial"))
    assert run(src, out)["reused"] == 7


def test_changes_of_source_grades_size_and_results_are_followed(tmp_path: Path) -> None:
    src, out = source(tmp_path / "src", per_class=2, splits=("train", "test")), tmp_path / "out"
    run(src, out)
    picture(77).save(src / "train" / "p00000_left.jpg")  # another photograph
    (out / "test" / "npdr" / "p12000_left.png").write_bytes(b"damaged")
    assert run(src, out)["made"] == 2
    text = (src / "train.txt").read_text()
    (src / "train.txt").write_text(text.replace("p02000_left.jpg 2", "p02000_left.jpg 3"))  # stays npdr
    assert run(src, out)["made"] == 0
    assert {r.grade for r in read_manifest(out) if "p02000" in r.file} == {"3"}
    (src / "train.txt").write_text(text.replace("p02000_left.jpg 2", "p02000_left.jpg 0"))  # changes class
    assert run(src, out)["made"] == 1
    assert (out / "train/healthy/p02000_left.png").is_file() and not (out / "train/npdr/p02000_left.png").exists()
    (src / "train" / "p03000_left.jpg").write_bytes(b"broken now")
    assert run(src, out)["skipped"] == 1
    assert not (out / "train/npdr/p03000_left.png").exists()
    assert prepare(src, out, size=32, workers=1, progress=silent)["made"] == 11
    assert {r.size for r in read_manifest(out)} == {32}
    assert run(src, out, classes="healthy=0")["counts"] == {"train": {"healthy": 3}, "test": {"healthy": 2}}
    assert not (out / "train" / "npdr").exists()


def test_small_photographs_are_enlarged_and_counted(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "src" / "train" / "a").mkdir(parents=True, exist_ok=True)
        picture(i, 40 + 30 * i, 40 + 30 * i).save(tmp_path / "src" / "train" / "a" / f"{i}.png")
    summary = run(tmp_path / "src", tmp_path / "out")
    assert summary["upsampled"] == 1
    assert [r.upsampled for r in read_manifest(tmp_path / "out")] == [True, False, False]


def test_equal_names_are_told_apart_whatever_the_order(tmp_path: Path) -> None:
    for folder, name, seed in (("x", "1.jpg", 1), ("y", "1.jpg", 2), ("x", "1.png", 3), ("y", "2.jpg", 4)):
        path = tmp_path / "src" / "train" / "a" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    run(tmp_path / "src", tmp_path / "out")
    files = {r.source: r.file for r in read_manifest(tmp_path / "out")}
    assert len(set(files.values())) == 4
    assert files["train/a/y/2.jpg"] == "train/a/2.png"
    (tmp_path / "src/train/a/y/2.jpg").unlink()
    run(tmp_path / "src", tmp_path / "out")
    assert {r.source: r.file for r in read_manifest(tmp_path / "out")}.items() <= files.items()


def test_a_made_split_keeps_patients_together(tmp_path: Path) -> None:
    for label in ("healthy", "npdr"):
        (tmp_path / "src" / label).mkdir(parents=True)
        for i in range(10):
            for eye in ("left", "right"):
                picture(i).save(tmp_path / "src" / label / f"{label}{i}_{eye}.png")
    summary = run(tmp_path / "src", tmp_path / "out")
    assert summary["counts"] == {
        "train": {"healthy": 10, "npdr": 10},
        "valid": {"healthy": 4, "npdr": 4},
        "test": {"healthy": 6, "npdr": 6},
    }
    sides: dict[str, set[str]] = {}
    for record in read_manifest(tmp_path / "out"):
        sides.setdefault(record.patient, set()).add(record.split)
    assert len(sides) == 20 and all(len(side) == 1 for side in sides.values())


def test_leaks_of_a_given_split_are_reported_and_dropped_on_request(tmp_path: Path) -> None:
    src = source(tmp_path / "src", splits=("train", "test"))
    with open(src / "train.txt", "a") as handle:
        handle.write("p10000_right.jpg 0\n")
    picture(5).save(src / "train" / "p10000_right.jpg")
    kept = run(src, tmp_path / "kept")
    assert kept["leaks"] == {
        "patients": 1, "photographs": 2, "dropped": 0, "first": [{"patient": "p10000", "splits": ["test", "train"]}],
    }  # fmt: skip
    dropped = run(src, tmp_path / "dropped", drop_leaks=True)
    assert dropped["leaks"]["dropped"] == 1
    assert kept["counts"]["train"]["healthy"] == dropped["counts"]["train"]["healthy"] + 1
    assert not (tmp_path / "dropped/train/healthy/p10000_right.png").exists()


def test_missing_photographs_end_up_in_the_list_of_skipped(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    (src / "train" / "p00000_left.jpg").unlink()
    with pytest.raises(InputError, match=r"p00000_left.jpg"):
        run(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary = run(src, tmp_path / "out", skip_missing=True)
    assert (summary["missing"], summary["skipped"]) == (1, 0)
    assert "p00000" in (tmp_path / "out" / SKIPPED).read_text()


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "src" / "train" / "a").mkdir(parents=True)
    (tmp_path / "src" / "train" / "a" / "1.jpg").write_bytes(b"no")
    with pytest.raises(InputError, match=r"none of 1 photographs could be read \(train/a/1.jpg: not an image"):
        run(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_folders_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    src = source(tmp_path / "src", splits=("train",))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.docx").touch()
    (tmp_path / "file").touch()
    for out, words in (
        (other, "thesis.docx"),
        (tmp_path / "file", "is a file"),
        (src, "apart from the source"),
        (src / "out", "apart from the source"),
        (tmp_path, "apart from the source"),
    ):
        with pytest.raises(InputError, match=words):
            run(src, out)
    out = tmp_path / "out"
    run(src, out)
    (out / "notes.txt").touch()  # beside the photographs: harmless
    run(src, out)
    picture(1).save(out / "train" / "npdr" / "mine.png")
    with pytest.raises(InputError, match=r"mine.png is not of an earlier preparation"):
        run(src, out)
    (out / "train" / "npdr" / "mine.png").unlink()
    with pytest.raises(InputError, match="other photographs"):
        run(source(tmp_path / "second", splits=("test",)), out)
    (out / MANIFEST).write_text("{}\n")
    with pytest.raises(InputError, match=r"line 1 of .*manifest"):
        run(src, out)


@pytest.mark.parametrize("options", [{"size": 4}, {"workers": 0}, {"classes": "a"}, {"layout": "zip"}])
def test_wrong_options_are_told(tmp_path: Path, options: dict) -> None:
    with pytest.raises(InputError):
        prepare(
            source(tmp_path / "src", 1, ("train",)), tmp_path / "out", **{"workers": 1, "progress": silent, **options}
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_real_photographs_are_prepared_in_time(photographs: Path, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = prepare(photographs, tmp_path / "out", workers=2, progress=silent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert summary["counts"] == {
        "train": {"healthy": 888, "npdr": 454},
        "valid": {"healthy": 355, "npdr": 182},
        "test": {"healthy": 529, "npdr": 269},
    }
    # 90 s on two processors; processor time, so that other work on the machine does not decide.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 90
    assert summary["skipped"] == 0
    assert summary["duplicates"]["across_splits"] == 1  # IDRiD 13 and 397 show one eye
    assert summary["duplicates"]["within_splits"] == 3
