"""A frozen tokenizer against a fine-tuned one: a checkpoint that holds only its weights, fine-tuned and compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from retinar.engine.checkpoint import load_tokenizer
from retinar.engine.errors import InputError
from retinar.engine.metrics.features import FeatureStore
from retinar.engine.metrics.inception import Inception
from retinar.engine.metrics.reconstruction import evaluate_reconstruction
from retinar.engine.progress import silent
from retinar.engine.tokenizer import VQTokenizer
from retinar.train import tokenizer_comparison
from retinar.train.tokenizer import train_tokenizer
from retinar.train.tokenizer_comparison import FINETUNED, FROZEN, compare, main, save_sheet, table
from tests.train.pictures import MODEL, SIZE, draw, picture_config, write_pictures


class MeanDifference(nn.Module):
    """In place of LPIPS: the mean absolute difference, hence twice the L1 of pixels from 0 to 1."""

    digest = "0" * 64

    def forward(self, made_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
        return (made_BCHW - images_BCHW).abs().mean()


def inception() -> Inception:
    def network(x: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1).repeat(1, 43)[:, :2048]

    pytest.importorskip("cleanfid", reason="the package clean-fid is missing (pip install 'retinar[metrics]')")
    return Inception(network, "stand-in", "0" * 64, True, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"), train=6, valid=3)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """A file {"model": weights} and nothing else, as the published ones are, and what training makes of it."""
    folder = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    start = VQTokenizer(MODEL)
    torch.save({"model": start.state_dict()}, folder / "frozen.pt")
    config = picture_config(start="checkpoint", steps=8, ema_decay=None, crop_size=None, revive_after=None)
    result = train_tokenizer(config, data, folder / "run", init=folder / "frozen.pt", progress=silent)
    assert result.model is not None
    (folder / "config.json").write_text(json.dumps(MODEL.to_dict()))
    found = {FROZEN: folder / "frozen.pt", FINETUNED: result.model, "config": folder / "config.json"}
    before, after = start.state_dict(), load_tokenizer(result.model).state_dict()
    name = "decoder.conv_out.weight"
    assert 0 < (before[name] - after[name]).abs().max() < 0.1  # from these weights, not from others
    return found


def loaded(tokenizers: dict[str, Path]) -> dict[str, VQTokenizer]:
    return {name: load_tokenizer(tokenizers[name], MODEL) for name in (FROZEN, FINETUNED)}


def test_every_figure_of_both_on_the_same_photographs(data: Path, tokenizers: dict[str, Path]) -> None:
    store = FeatureStore(inception())
    found = compare(
        data / "valid",
        loaded(tokenizers),
        perceptual=MeanDifference(),  # type: ignore[arg-type]
        store=store,
        floor=data / "train",
        progress=silent,
    )
    frozen, finetuned = found["figures"][FROZEN], found["figures"][FINETUNED]
    assert [row["label"] for row in frozen] == [row["label"] for row in finetuned] == ["healthy", "npdr", "all"]
    assert [row["images"] for row in frozen] == [3, 3, 6]
    for row in (*frozen, *finetuned):
        assert row["lpips"] == pytest.approx(2 * row["l1"], rel=1e-5)
        assert row["rfid"]["clean"] > 0 and 0 < row["codes_used"] <= 32 and row["perplexity"] <= row["codes_used"]
    assert finetuned[-1]["psnr"] > frozen[-1]["psnr"] and finetuned[-1]["lpips"] < frozen[-1]["lpips"]
    assert {label: floor["n_sample"] for label, floor in found["floor"].items()} == {"healthy": 3, "npdr": 3, "all": 6}
    told = table(found)
    assert told.count("\n| all |") == 2 and told.count("\n- FID of") == 3 and "not measured" not in told
    assert f"| {finetuned[-1]['psnr']:.2f} |" in told


def test_figures_are_those_of_retinar_evaluate(data: Path, tokenizers: dict[str, Path]) -> None:
    store, both = FeatureStore(inception()), loaded(tokenizers)
    (data / "valid" / "npdr" / "broken.png").write_bytes(b"no picture")
    found = compare(data / "valid", both, perceptual=None, store=store, progress=silent)
    for name, tokenizer in both.items():
        wanted = evaluate_reconstruction(data / "valid", tokenizer, store)
        assert found["figures"][name] == [{**row.to_dict(), "lpips": None} for row in wanted]
    (data / "valid" / "npdr" / "broken.png").unlink()


def test_what_is_left_out_is_said(data: Path, tokenizers: dict[str, Path]) -> None:
    found = compare(data / "valid", loaded(tokenizers), perceptual=None, store=None, limit=2, progress=silent)
    assert [row["images"] for row in found["figures"][FROZEN]] == [2, 2, 4] and found["floor"] == {}
    assert table(found).count("not measured") == 12


def test_the_sheet_has_a_row_for_each(data: Path, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    save_sheet(data / "valid", loaded(tokenizers), tmp_path / "sheet.png", count=4)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert pixels.shape == (3 * SIZE, 4 * SIZE, 3)
    assert np.array_equal(pixels[:SIZE, :SIZE], draw(1000))


def test_the_command(
    data: Path,
    tokenizers: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tokenizer_comparison, "load_inception", lambda path, device: inception())
    flags = ["--data", str(data), "--split", "valid", "--frozen", str(tokenizers[FROZEN]), "--device", "cpu"]
    flags += ["--finetuned", str(tokenizers[FINETUNED]), "--config", str(tokenizers["config"])]
    assert main([*flags, "--also", f"again={tokenizers[FROZEN]}", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert told.out.count("| again |") == 3 and told.out.startswith("| class ") and "sheet.png" in told.err
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["figures"]["again"] == stored["figures"][FROZEN] != stored["figures"][FINETUNED]
    assert stored["tokenizers"][FROZEN]["path"] == "frozen.pt" and stored["inception"]["source"] == "stand-in"
    assert (tmp_path / "out" / "table.md").read_text() == told.out
    for wrong, said in (
        (["--limit", "1"], "Expected --limit"),
        (["--also", f"{FROZEN}=x"], "--also NAME=PATH with another name"),
        (["--split", "test"], "Expected a folder of images"),
        (["--frozen", str(tmp_path / "no.pt")], "no.pt"),
    ):
        assert main([*flags, "--no-rfid", "--out", str(tmp_path / "none"), *wrong]) == 2
        error = capsys.readouterr().err
        assert said in error and error.splitlines()[-1].startswith("error: ") and "Traceback" not in error
    assert not (tmp_path / "none").exists()


def test_tokenizers_of_two_sizes_do_not_compare(data: Path, tokenizers: dict[str, Path]) -> None:
    both = loaded(tokenizers)
    both[FINETUNED] = VQTokenizer(type(MODEL)(**{**MODEL.to_dict(), "image_size": 16}))
    with pytest.raises(InputError, match=r"one size, found 32 \(frozen\) and 16 \(fine-tuned\)"):
        compare(data / "valid", both, perceptual=None, store=None, progress=silent)
