"""``retinar prepare`` on the command line: one summary, one sentence for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retinar import cli
from retinar.engine.progress import silent
from retinar.train.data.phantoms import write_phantoms


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepare") / "DR_grading"
    write_phantoms(
        out, {"train": {"healthy": 2, "npdr": 2}, "test": {"healthy": 1, "npdr": 1}}, size=48, progress=silent
    )
    return out


def test_it_prepares_and_says_so_in_one_line(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["prepare", str(phantoms.parent), str(out), "--size", "32", "--workers", "1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["counts"] == {"train": {"healthy": 2, "npdr": 2}, "test": {"healthy": 1, "npdr": 1}}
    assert (out / "manifest.jsonl").is_file()
    assert cli.main(["prepare", str(phantoms.parent), str(out), "--size", "32", "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["made"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent", "out"], "absent does not exist"),
        (["empty", "out"], "found none"),
        (["graded", "out"], "1 of 2 listed photographs do not exist"),
        (["graded", "out", "--classes", "npdr"], "healthy=0 npdr=2,3"),
        (["fine", "out", "--classes", "x=7"], "'7'"),
        (["fine", "full"], "found something.txt"),
        (["graded", "out", "--layout", "zip"], "zip"),
        (["fine", "/proc/out"], "/proc/out"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something.txt").touch()
    (tmp_path / "graded" / "train").mkdir(parents=True)
    (tmp_path / "graded" / "train" / "a.jpg").touch()
    (tmp_path / "graded" / "train.txt").write_text("a.jpg 0\nb.jpg 2\n")
    write_phantoms(tmp_path / "fine", {"train": {"healthy": 1, "npdr": 1}}, size=48, progress=silent)
    assert cli.main(["prepare", *arguments]) == 2
    told = capsys.readouterr()
    assert words in told.err and "Traceback" not in told.err
    assert not (tmp_path / "out").exists()
