"""``retinar evaluate`` as a person runs it, with a stand-in for Inception given by --inception."""

from __future__ import annotations

import json
import os
import shlex
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from retinar import cli

pytest.importorskip("cleanfid", reason="the package clean-fid is missing (pip install 'retinar[metrics]')")


class Grid(nn.Module):
    """2,048 features of the picture's coarse colours."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, [4, 4]).flatten(1).repeat(1, 43)[:, :2048]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("network") / "inception.pt"
    torch.jit.save(torch.jit.script(Grid()), str(path))
    return str(path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    rng = np.random.default_rng(0)
    for side, count in (("real", 9), ("fake", 6)):
        for label in ("healthy", "npdr"):
            (tmp_path / side / label).mkdir(parents=True)
            for index in range(count):
                pixels = np.kron(rng.integers(0, 256, (4, 4, 3), np.uint8), np.ones((5, 5, 1), np.uint8))
                Image.fromarray(pixels).save(tmp_path / side / label / f"{index}.png")
    return str(tmp_path / "real"), str(tmp_path / "fake")


def test_table_has_counts_floors_and_notes(
    folders: tuple[str, str], network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", *folders, "--inception", network, "--mode", "both", "--floor"]) == 0
    told = capsys.readouterr().out
    table = [line.split() for line in told.splitlines() if line.startswith(("healthy", "npdr", "all"))]
    assert [row[:4] for row in table] == [
        [label, mode, real, fake]
        for mode in ("clean", "legacy")
        for label, real, fake in (("healthy", "9", "6"), ("npdr", "9", "6"), ("all", "18", "12"))
    ]
    assert "(10 x 4 against 5)" in told and "±" in told
    assert "fewer than 2,048 images" in told and "not the network of 2015" in told


def test_json_is_one_line_and_the_saved_file_holds_the_same(
    folders: tuple[str, str], network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(folders[1]) / "npdr" / "broken.png"
    broken.write_bytes(b"x")
    saved = tmp_path / "scores.json"
    assert cli.main(["evaluate", *folders, "--inception", network, "--json", "--save", str(saved)]) == 0
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    found = json.loads(told)
    assert found == json.loads(saved.read_text())
    assert [score["label"] for score in found["scores"]] == ["healthy", "npdr", "all"]
    assert found["skipped"][0]["file"] == str(broken) and len(found["inception"]["sha256"]) == 64


def test_a_name_that_is_no_utf8(
    folders: tuple[str, str], network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        Path(os.fsdecode(os.fsencode(folders[1]) + b"/npdr/b\xff.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    saved = tmp_path / "scores.json"
    assert cli.main(["evaluate", *folders, "--inception", network, "--json", "--save", str(saved)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(saved.read_text()) and found["skipped"][0]["file"].endswith("b\udcff.png")


def test_a_folder_against_itself(folders: tuple[str, str], network: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", folders[0], folders[0], "--inception", network, "--json"]) == 0
    assert all(score["metrics"]["fid"] < 0.01 for score in json.loads(capsys.readouterr().out)["scores"])


def test_reconstruction_of_a_tokenizer(
    folders: tuple[str, str], network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from retinar.engine.checkpoint import save_tokenizer
    from retinar.engine.config import TokenizerConfig
    from retinar.engine.tokenizer import VQTokenizer

    torch.manual_seed(0)
    config = TokenizerConfig(
        ch=32, ch_mult=(1, 1), z_channels=32, codebook_size=64, image_size=16, num_res_blocks=1, attention=False
    )
    save_tokenizer(tmp_path / "tokenizer", VQTokenizer(config))
    line = ["evaluate", folders[0], "--reconstruct", str(tmp_path / "tokenizer"), "--inception", network]
    assert cli.main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["label"], row["images"]) for row in found["reconstruction"]] == [
        ("healthy", 9),
        ("npdr", 9),
        ("all", 18),
    ]
    assert found["reconstruction"][2]["rfid"]["clean"] > 0 and len(found["tokenizer"]["sha256"]) == 64
    broken = Path(folders[0]) / "npdr" / "broken.png"
    broken.write_bytes(b"x")
    assert cli.main(line) == 0
    told = capsys.readouterr().out
    assert "PSNR dB" in told and f"left out: {broken}: cannot identify" in told


def test_all_metrics_with_intervals(folders: tuple[str, str], network: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["evaluate", *folders, "--inception", network, "--metrics", "fid,kid", "--bootstrap", "20", "--floor"]
    assert cli.main(line) == 0
    told = capsys.readouterr().out
    rows = [row for row in told.splitlines() if row.startswith(("healthy", "npdr", "all"))]
    assert [row.split()[4] for row in rows] == ["FID", "KID"] * 3 and all(" to " in row for row in rows)
    assert cli.main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    low, high = found["scores"][0]["intervals"]["fid"]
    assert low < found["scores"][0]["metrics"]["fid"] < high


@pytest.fixture
def train(folders: tuple[str, str]) -> str:
    """Training photographs; one generated image is a copy of one of them."""
    root = Path(folders[0]).parent / "train"
    rng = np.random.default_rng(1)
    for label in ("healthy", "npdr"):
        (root / label).mkdir(parents=True)
        for index in range(9):
            pixels = np.kron(rng.integers(0, 256, (4, 4, 3), np.uint8), np.ones((5, 5, 1), np.uint8))
            Image.fromarray(pixels).save(root / label / f"{index}.png")
    Image.open(root / "healthy" / "0.png").save(Path(folders[1]) / "healthy" / "0.png")
    return str(root)


def test_a_report_of_everything(
    folders: tuple[str, str], train: str, network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_spec("torchvision") is None:
        pytest.skip("torchvision is missing (pip install 'retinar[metrics]')")
    pytest.importorskip("sklearn", reason="scikit-learn is missing (pip install 'retinar[metrics]')")
    report = tmp_path / "report"
    line = ["evaluate", *folders, "--train", train, "--inception", network, "--report", str(report), "--reading", "8"]
    line += ["--seeds", "1", "--steps", "1", "--bootstrap", "10", "--metrics", "fid,kid"]
    assert cli.main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("report") == str(report / "report.html")
    saved = json.loads((report / "metrics.json").read_text())
    made_by = saved.pop("made_by")
    assert saved == found
    assert (
        shlex.split(made_by["command"])[:4] == ["retinar", "evaluate", *folders] and "--steps 1" in made_by["command"]
    )
    assert set(made_by["command"].split()) >= {"--report", "--train", "--inception", "--seeds", "--bootstrap"}
    assert found["scores"][0]["floor"]["fid"]["source"] == train
    assert {row["trained_on"] for row in found["usefulness"]["rows"]} == {"real", "synthetic", "both"}
    closest = found["memorisation"]["pairs"][0]
    assert (
        closest["flagged"]
        and [Path(closest[side]).parts[-2:] for side in ("generated", "train")] == [("healthy", "0.png")] * 2
    )
    measured = found["memorisation"]["distances"]["inception"]["held_out"]
    assert len(measured) + len(found["memorisation"]["leaked"]) == 18
    page = (report / "report.html").read_text(encoding="utf-8")
    for heading in ("Distance from the photographs", "Memorisation", "Usefulness to a classifier", "Reading by people"):
        assert heading in page
    plots = {path.stem for path in (report / "plots").iterdir()}
    assert {"scores", "nearest-inception", "usefulness", "class-fidelity", "closest-pairs"} <= plots
    assert len(list((report / "reading").glob("0*.png"))) == 8


def test_the_command_on_the_page_gives_the_same_again() -> None:
    line = ["photo graphs", "images", "--report", "r", "--run", "a", "--run", "b c", "--floor", "--limit", "9"]
    line += ["--metrics", "fid,kid", "--mode", "both", "--bootstrap", "0", "--parts", "none", "--floor-from", "x'y"]
    task = cli.parse("evaluate", line)
    told = shlex.split(task.command_line())
    assert told[:2] == ["retinar", "evaluate"] and cli.parse("evaluate", told[2:]) == task


def test_training_photographs_without_a_class_cost_no_figure(
    folders: tuple[str, str], network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "evaluate",
        *folders,
        "--train",
        str(Path(folders[1]) / "npdr"),
        "--inception",
        network,
        "--json",
    ]
    assert cli.main(line) == 0
    found = json.loads(capsys.readouterr().out)
    assert [score["label"] for score in found["scores"]] == ["healthy", "npdr", "all"]
    assert found["scores"][0]["floor"]["fid"]["source"] == folders[0]
    assert any("no subfolder healthy, npdr: the floor is of" in text for text in found["warnings"])


def test_a_report_of_what_there_is(
    folders: tuple[str, str],
    network: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without training photographs and weights, what cannot be measured is told, and the rest is there."""
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    line = ["evaluate", *folders, "--inception", network, "--report", str(tmp_path / "report"), "--metrics", "fid"]
    assert cli.main(line) == 0
    told = capsys.readouterr().out
    assert "note: memorisation was left out: give the training photographs with --train DIR" in told
    assert "note: LPIPS was left out" in told and "note: diversity was left out" in told
    assert f"report: {tmp_path / 'report' / 'report.html'}" in told
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "memorisation was left out" in page and 'id="memorisation"' not in page


def test_a_part_that_fails_of_its_own_accord_costs_itself_alone(
    folders: tuple[str, str], network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training photographs among the test photographs: memorisation and usefulness refuse them, the scores stand."""
    line = ["evaluate", *folders, "--train", folders[0], "--inception", network, "--metrics", "fid", "--bootstrap", "0"]
    assert cli.main([*line, "--report", str(tmp_path / "report"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["scores"]) == 3 and "memorisation" not in found and "usefulness" not in found
    assert any(text.startswith("memorisation was left out: Expected held-out") for text in found["warnings"])
    assert cli.main([*line, "--parts", "memorisation"]) == 2
    assert "held-out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give REAL"),
        (["REAL", "FAKE", "--parts", "usefulnes"], "'usefulnes'"),
        (["REAL", "FAKE", "--parts", "memorisation"], "--train DIR"),
        (["REAL", "FAKE", "--parts", "usefulness", "--train", "FLAT"], "two class subfolders"),
        (["REAL", "FAKE", "--parts", "usefulness", "--train", "REAL", "--seeds", "0"], "--seeds"),
        (["REAL", "FAKE", "--train", "gone"], "gone"),
        (["REAL", "FAKE", "--valid", "gone"], "gone"),
        (["REAL", "FAKE", "--vgg", "gone.pth"], "gone.pth"),
        (["REAL", "FAKE", "--bootstrap", "1"], "2 draws"),
        (["REAL", "FAKE", "--run", "REAL"], "--report DIR with --run"),
        (["REAL", "FAKE", "--reading", "8"], "--report DIR with --reading"),
        (["REAL", "FAKE", "--report", "REAL"], "found other files"),
        (["REAL", "FAKE", "--report", "NEW", "--run", "REAL"], "metrics.jsonl"),
        (["REAL", "FAKE", "--report", "NEW", "--reading", "3"], "--reading of at least 4"),
        (["REAL", "--score-reading", "form.csv", "key.csv"], "key.csv"),
        (["REAL"], "--reconstruct TOKENIZER"),
        (["REAL", "nowhere"], "nowhere"),
        (["REAL", "FAKE", "--metrics", "fid,fod"], "'fod'"),
        (["REAL", "FAKE", "--metrics", ""], "at least one metric"),
        (["REAL", "FAKE", "--inception", "no.pt"], "no.pt"),
        (["REAL", "FAKE", "--floor-from", "gone"], "gone"),
        (["REAL", "FAKE", "--limit", "1"], "--limit"),
        (["REAL", "FAKE", "--batch-size", "-1"], "--batch-size"),
        (["REAL", "FAKE", "--mode", "tidy"], "tidy"),
        (["REAL", "FAKE", "--device", "abacus"], "abacus"),
        (["REAL", "FAKE", "--device", "cuda:99"], "cuda:99"),
        (["REAL", "FAKE", "--seed", "-1"], "--seed"),
        (["REAL", "FAKE", "--save", "REAL"], "--save"),
        (["REAL", "FAKE", "--vgg", "TEXT"], "damaged"),
        (["REAL", "FAKE", "--train", "TRAIN", "--report", "NEW", "--network", "resnet19"], "'resnet19'"),
        (["REAL", "FAKE", "--train", "TRAIN", "--report", "NEW", "--steps", "0"], "1 step"),
        (["REAL", "FAKE", "--train", "TRAIN", "--report", "NEW", "--weights", "gone.pth"], "gone.pth"),
        (["REAL", "FAKE", "--train", "TRAIN", "--report", "NEW", "--positive", "amd"], "--positive"),
        (["REAL", "--reconstruct", "lost"], "lost"),
        (["REAL", "FAKE", "--save", "absent/scores.json"], "--save"),
    ],
)
def test_bad_input_is_one_sentence(
    folders: tuple[str, str], options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = Path(folders[0]) / "healthy"
    named = {"REAL": folders[0], "FAKE": folders[1], "FLAT": str(flat), "NEW": str(flat.parent.parent / "report")}
    named |= {"TRAIN": folders[1], "TEXT": str(flat.parent.parent / "hello.pth")}
    Path(named["TEXT"]).write_text("hello, no weights")
    assert cli.main(["evaluate", *(named.get(option, option) for option in options)]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and words in told.err and "Traceback" not in told.err
