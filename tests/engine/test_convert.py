"""Converting both ways keeps every bit, and says what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from retinar.commands.convert import Convert
from retinar.engine.checkpoint import load_gpt, load_tokenizer, read_config, save_tokenizer
from retinar.engine.convert import convert
from retinar.engine.errors import InputError
from retinar.engine.progress import silent


def stored(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=True)
    return content.get("model", content)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("file", ["gpt_ddp.pt", "gpt_consolidated.pth"])
@pytest.mark.parametrize("back", ["back.pt", "back.pth"])
def test_transformers_there_and_back(tmp_path: Path, golden: Path, file: str, back: str) -> None:
    summary = convert(golden / file, tmp_path / "gpt", golden / "gpt_config.json", classes=("healthy", "npdr"))
    count = sum(tensor.numel() for tensor in stored(golden / file).values())
    assert (summary["kind"], summary["parameters"]) == ("gpt", count)
    config = read_config(tmp_path / "gpt")
    assert config["classes"] == ["healthy", "npdr"]
    assert config.get("steps") == (1234 if file == "gpt_ddp.pt" else None)
    convert(tmp_path / "gpt", tmp_path / "out" / back)
    content = torch.load(tmp_path / "out" / back, weights_only=True)
    assert set(content) == {"model", "config"} if back == "back.pt" else "model" not in content
    assert same(stored(tmp_path / "out" / back), stored(golden / file))
    # Views of packed matrices are not written with the whole matrix behind them.
    assert (tmp_path / "out" / back).stat().st_size < 1.05 * (golden / "gpt_consolidated.pth").stat().st_size
    if back == "back.pt":  # knows its own config again
        assert load_gpt(tmp_path / "out" / back).config == load_gpt(tmp_path / "gpt").config


def test_bf16_stays_bf16(tmp_path: Path, golden: Path) -> None:
    half = {key: tensor.bfloat16() for key, tensor in stored(golden / "gpt_ddp.pt").items()}
    torch.save(half, tmp_path / "half.pth")
    convert(tmp_path / "half.pth", tmp_path / "gpt", str(golden / "gpt_config.json"))
    convert(tmp_path / "gpt", tmp_path / "copy")
    convert(tmp_path / "copy", tmp_path / "back.pth")
    assert same(stored(tmp_path / "back.pth"), half)


def test_tokenizers_there_and_back(tmp_path: Path, golden: Path) -> None:
    content = torch.load(golden / "vq.pt", weights_only=True)
    torch.save(content | {"discriminator": {"main.0.weight": torch.ones(3)}}, tmp_path / "vq.pt")
    summary = convert(tmp_path / "vq.pt", tmp_path / "vq", {"image_size": 64})
    assert summary["kind"] == "tokenizer" and summary["notes"] == ["the discriminator was left out"]
    assert not (tmp_path / "vq" / "discriminator.safetensors").exists()
    assert read_config(tmp_path / "vq")["steps"] == 7

    assert convert(tmp_path / "vq.pt", tmp_path / "vq", discriminator=True)["notes"] == []
    for name in ("back.pt", "back.pth"):  # upstream reads tokenizers under "model" only
        convert(tmp_path / "vq", tmp_path / name, discriminator=True)
        back = torch.load(tmp_path / name, weights_only=True)
        assert same(back["model"], content["model"])
        assert torch.equal(back["discriminator"]["main.0.weight"], torch.ones(3))


def test_a_tokenizer_goes_into_the_transformers_folder(tmp_path: Path, golden: Path) -> None:
    convert(golden / "gpt_ddp.pt", tmp_path / "gpt", golden / "gpt_config.json", tokenizer=golden / "vq.pt")
    assert load_tokenizer(tmp_path / "gpt").config.codebook_size == 256
    convert(tmp_path / "gpt", tmp_path / "copy")  # and comes along
    assert load_tokenizer(tmp_path / "copy").config == load_tokenizer(tmp_path / "gpt").config
    assert (tmp_path / "copy" / "README.md").read_text() == (tmp_path / "gpt" / "README.md").read_text()
    assert "tokenizer was left out" in convert(tmp_path / "gpt", tmp_path / "out.pt")["notes"][0]


def test_in_place(tmp_path: Path, golden: Path) -> None:
    """The source may be the destination: it is read whole first."""
    convert(golden / "gpt_ddp.pt", tmp_path / "gpt", golden / "gpt_config.json")
    before = read_config(tmp_path / "gpt")["sha256"]
    convert(tmp_path / "gpt", tmp_path / "gpt", classes=("a", "b"))
    after = read_config(tmp_path / "gpt")
    assert (after["sha256"], after["classes"], after["steps"]) == (before, ["a", "b"], 1234)


def test_what_does_not_fit(tmp_path: Path, golden: Path) -> None:
    vq = load_tokenizer(golden / "vq.pt")
    save_tokenizer(tmp_path / "vq", vq)
    with pytest.raises(InputError, match="found a tokenizer"):
        convert(tmp_path / "vq", tmp_path / "out", classes=("a",))
    with pytest.raises(InputError, match="name a folder"):
        convert(golden / "gpt_ddp.pt", tmp_path / "out.pt", golden / "gpt_config.json", classes=("a", "b"))
    with pytest.raises(InputError, match="no weight shows its grid"):
        convert(golden / "gpt_ddp.pt", tmp_path / "out")
    fields = json.loads((tmp_path / "vq" / "config.json").read_text()) | {"kind": "iddpm"}
    (tmp_path / "vq" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match="found a diffusion model"):
        convert(tmp_path / "vq", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vq"]


def test_the_command(tmp_path: Path, golden: Path) -> None:
    command = Convert(src=golden / "gpt_ddp.pt", dst=tmp_path / "gpt", config=str(golden / "gpt_config.json"))
    summary = command.run(silent)
    assert json.loads(json.dumps(summary))["kind"] == "gpt"
    Convert(src=golden / "gpt_consolidated.pth", dst=tmp_path / "again", grid=6, classes=("x", "y")).run(silent)
    assert load_gpt(tmp_path / "again").config.grid == 6
