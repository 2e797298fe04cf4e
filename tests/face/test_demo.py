"""The demo end to end at the smallest sizes; `make slow` runs the real one and holds its claims."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retinar import demo
from retinar.engine.errors import InputError
from retinar.engine.progress import silent
from tests.face.world import Shell

TINY = demo.Plan(
    size=32,
    phantoms=(6, 2, 4),
    images=3,
    tokenizer=("steps=3", "quantize_from=1", "batch_size=4", "model.codebook_size=32", "model.ch=8"),
    gpt=("steps=3", "batch_size=4", "model.n_layer=1", "model.dim=32"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo.demo(TINY, out, progress=silent)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_every_stage_leaves_what_it_names(made: tuple[Path, dict[str, object]]) -> None:
    out, summary = made
    for name in ("sheet", "metrics", "tokenizer", "transformer"):
        assert Path(str(summary[name])).exists(), name
    assert len(list((out / "samples" / "images").glob("*/*.png"))) == 2 * TINY.images
    assert (out / "photographs" / "train.txt").is_file() and (out / "prepared" / "manifest.jsonl").is_file()
    figures = json.loads((out / "metrics.json").read_text())
    assert set(figures["fid"]) == {"healthy", "npdr"}
    for row in figures["fid"].values():
        assert (row["n_real"], row["n_generated"], row["n_random"]) == (4, 3, 3)
        assert row["generated"] > 0 and row["random_codes"] > 0
    assert 0 <= figures["probe"]["generated"] <= 1
    assert len(figures["passed"]) == 3


def test_claims_follow_from_the_figures(made: tuple[Path, dict[str, object]]) -> None:
    _, summary = made
    fid, probe, passed = summary["fid"], summary["probe"], summary["passed"]
    assert isinstance(fid, dict) and isinstance(probe, dict) and isinstance(passed, dict)
    wanted = [row["generated"] < row["random_codes"] for row in fid.values()] + [probe["generated"] >= 0.8]
    assert list(passed.values()) == wanted


def test_a_second_run_makes_nothing_anew(made: tuple[Path, dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    out, summary = made
    before = contents(out)
    monkeypatch.setattr(demo, "score", None)  # would fail if called
    again = demo.demo(TINY, out, progress=silent)
    assert contents(out) == before
    assert {key: again[key] for key in ("fid", "probe", "passed")} == {
        key: summary[key] for key in ("fid", "probe", "passed")
    }


def test_another_demo_in_the_same_folder_is_refused(made: tuple[Path, dict[str, object]]) -> None:
    with pytest.raises(InputError, match="another"):
        demo.demo(demo.Plan(size=64), made[0], progress=silent)


def test_a_stopped_demo_goes_on(
    made: tuple[Path, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two stages, then the same call again: the same files as without the stop."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(demo, "encode", stop)
        with pytest.raises(KeyboardInterrupt):
            demo.demo(TINY, out, progress=silent)
    monkeypatch.setattr(demo, "score", lambda *_: {"passed": {}, "fid": {}, "probe": {}})  # slow, and not asked here
    demo.demo(TINY, out, progress=silent)
    images = "samples/images"
    assert contents(out / images) == contents(made[0] / images)


def test_arguments_are_checked_before_anything_is_written(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for flag, value in [
        ("--images", "1"),
        ("--size", "20"),
        ("--size", "50"),
        ("--seed", "-1"),
        ("--minutes", "0"),
        ("--minutes", "nan"),
    ]:
        shell.refused("demo", "--out", out, flag, value, words=flag.strip("-"))
    assert not out.exists()


@pytest.mark.slow
def test_the_demo_keeps_its_claims(shell: Shell, tmp_path: Path) -> None:
    said = shell("demo", "--out", tmp_path / "demo", "--json")
    assert said.code == 0, said.err
    summary = json.loads(said.out)
    assert summary["passed"] and all(summary["passed"].values()), summary
