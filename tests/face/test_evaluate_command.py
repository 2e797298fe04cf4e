"""``retinar evaluate`` as a person runs it, with a stand-in for Inception given by --inception."""

from __future__ import annotations

import json
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
    assert cli.main(line) == 0
    assert "PSNR dB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
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
        (["REAL", "--reconstruct", "lost"], "lost"),
        (["REAL", "FAKE", "--save", "absent/scores.json"], "--save"),
    ],
)
def test_bad_input_is_one_sentence(
    folders: tuple[str, str], options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = dict(zip(("REAL", "FAKE"), folders, strict=True))
    assert cli.main(["evaluate", *(named.get(option, option) for option in options)]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and words in told.err and "Traceback" not in told.err
