"""The command line's own manners: help, exit codes, one sentence for a failure, one JSON line."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from retinar import cli, failures, ui
from retinar.engine.errors import InputError
from retinar.engine.progress import Progress

ROOT = Path(__file__).resolve().parent.parent.parent
NEEDED = {"doctor", "demo", "prepare", "train", "encode", "generate", "evaluate", "reproduce", "convert", "bench"}


def run_python(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120, **kwargs)


def test_every_verb_of_the_design_is_offered() -> None:
    assert set(cli.verbs()) >= NEEDED


def test_help_lists_the_verbs_quickly_and_without_torch() -> None:
    start = time.perf_counter()
    code = "import sys; from retinar.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    said = run_python("-c", code, env={"PYTHONPATH": str(ROOT)})
    assert said.returncode == 0, said.stderr
    assert all(f"  {verb}" in said.stdout for verb in cli.verbs())
    assert time.perf_counter() - start < 5  # under 1 s on an idle machine


@pytest.mark.parametrize("verb", sorted(NEEDED))
def test_help_of_every_verb_has_an_example_and_needs_no_torch(verb: str) -> None:
    code = f"import sys; from retinar.cli import main; sys.exit(main(['{verb}', '--help']) or 'torch' in sys.modules)"
    said = run_python("-c", code, env={"PYTHONPATH": str(ROOT), "COLUMNS": "120"})
    assert said.returncode == 0, said.stderr
    assert f"retinar {verb}" in said.stdout.replace("usage: retinar", "usage:"), "no example"


@pytest.mark.parametrize("module", ["retinar", "retinar.cli"])
def test_modules_are_the_console_script(module: str) -> None:
    said = run_python("-m", module, "--version", env={"PYTHONPATH": str(ROOT)})
    assert (said.returncode, said.stdout.split()[0]) == (0, "retinar")


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["generat"], "did you mean `retinar generate`"),
        (["--frobnicate"], "the option '--frobnicate'"),
        (["serve-me-tea"], "found the verb"),
        (["doctor", "--frobnicate"], "--frobnicate"),
        (["generate"], "--help"),
        (["generate", "--count", "many"], "--help"),
    ],
)
def test_a_line_that_cannot_be_read(argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1 and told.err.startswith("retinar: ")
    assert hint in told.err and not set("│╭─") & set(told.err)


@dataclass
class Probe:
    """A verb that does what the test asks."""

    error: BaseException | None = None
    summary: dict[str, object] = field(default_factory=dict)

    def run(self, progress: Progress) -> dict[str, object]:
        if self.error is not None:
            raise self.error
        return self.summary


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    task = Probe()
    monkeypatch.setattr(cli, "parse", lambda verb, argv: task)
    return task


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("Expected a folder of photographs at x,\nfound none: give another."), "x, found none"),
        (OSError(errno.ENOSPC, "No space left on device", "/mnt/a/b"), "free space at /mnt/a/b"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), "/root/x"),
        (OSError(errno.EROFS, "Read-only file system", "/ro"), "read-only"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a file in its place"),
        (FileNotFoundError(errno.ENOENT, "No such file", "gone"), "gone"),
        (OSError("4096 requested and 12 written"), "12 written"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk full"),
        (ModuleNotFoundError("No module named 'cleanfid'", name="cleanfid"), "cleanfid"),
    ],
)
def test_a_failure_that_people_can_mend_is_one_sentence(
    probe: Probe, error: BaseException, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    probe.error = error
    assert cli.main(["doctor"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and words in told and "Traceback" not in told


def test_a_fault_of_ours_is_not_hidden(probe: Probe, capsys: pytest.CaptureFixture[str]) -> None:
    probe.error = RuntimeError("shapes do not match")
    assert cli.main(["doctor"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert failures.sentence(probe.error) is None


def test_traceback_flag_shows_everything(probe: Probe, capsys: pytest.CaptureFixture[str]) -> None:
    probe.error = InputError("Expected this, found that: mend it.")
    assert cli.main(["doctor", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(probe: Probe, capsys: pytest.CaptureFixture[str]) -> None:
    probe.error = KeyboardInterrupt()
    assert cli.main(["doctor"]) == 130
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "again" in told


def test_a_training_that_was_stopped_says_so_in_its_exit_code(probe: Probe) -> None:
    probe.summary = {"ended": "interrupted", "step": 3}
    assert cli.main(["doctor"]) == 130
    probe.summary = {"ended": "finished", "step": 3}
    assert cli.main(["doctor"]) == 0


def test_json_is_one_line_of_strict_json(probe: Probe, capsys: pytest.CaptureFixture[str]) -> None:
    probe.summary = {"out": Path("a/b"), "fid": math.nan, "counts": {"healthy": 3}, "labels": ("healthy",)}
    assert cli.main(["doctor", "--json"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert json.loads(said) == {"out": "a/b", "fid": None, "counts": {"healthy": 3}, "labels": ["healthy"]}


def test_summary_for_people(probe: Probe, capsys: pytest.CaptureFixture[str]) -> None:
    probe.summary = {"out": Path("a/b"), "classes": {"healthy": 3}, "rows": [{"op": "x", "n": 1}, {"op": "yy", "n": 2}]}
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "out: a/b\nclasses:\n  healthy: 3\nrows:\n  op  n\n  x   1\n  yy  2\n"


def test_set_may_be_repeated_and_stand_anywhere() -> None:
    line = ["gpt", "--set", "a=1", "b=2", "--out", "run", "--set=c=3", "--set", "typo", "folder"]
    assert cli.gather_set(line) == ["gpt", "--out", "run", "folder", "--set", "a=1", "b=2", "c=3", "typo"]
    assert cli.gather_set(["--out", "x"]) == ["--out", "x"]


def test_terminal_progress_opens_and_closes_nested_bars() -> None:
    screen = ui.Terminal()
    with screen("stage", 2) as outer:
        with screen("inner", None) as inner:
            inner.advance(3, note="loss 1.0")
            assert screen.opened == 2
        outer.advance()
        assert [task.completed for task in screen.live.tasks] == [1, 3]
    assert screen.opened == 0 and not screen.live.tasks
