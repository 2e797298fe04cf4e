"""Seconds an image and decibels, on a decoder small enough to be done at once; and what is not there is named."""

from __future__ import annotations

import json
import math

import pytest
from torch import Tensor

from retinar.bench import images
from retinar.engine.vq_decoder import BFloat16Decoder


def silent(sentence: str) -> None:
    pass


def test_both_decoders_have_a_row() -> None:
    said: list[str] = []
    found = images.measured(said.append, exercise=True)
    assert found["model"] == "VQ-8" and found["pixels"] == 32 and found["absent"] == []
    fp32, bf16 = found["rows"]
    assert (fp32["backend"], bf16["backend"]) == ("fp32", "bf16") and fp32["psnr"] is None
    for row in (fp32, bf16):
        assert row["threads"] == found["threads"] >= 1 and row["images"] == images.SIZES["exercise"].least
        assert 0 < row["image_min"] <= row["image_p50"] <= row["image_max"] < 20
    assert 45 < bf16["psnr"] < 90  # rounded, and not by much
    assert any("bf16" in sentence and "dB" in sentence for sentence in said)
    json.dumps(found)


@pytest.mark.parametrize(("error", "decibels"), [(0.02, 40.0), (0.2, 20.0)])
def test_an_error_costs_its_decibels(error: float, decibels: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(BFloat16Decoder):
        def decode(self, codes_Bhw: Tensor) -> Tensor:
            return self.tokenizer.decode(codes_Bhw) + error

        def __init__(self, tokenizer: images.VQTokenizer) -> None:
            self.tokenizer = tokenizer

    monkeypatch.setattr(images, "BFloat16Decoder", Wrong)
    _, bf16 = images.measured(silent, exercise=True)["rows"]
    assert bf16["psnr"] == pytest.approx(decibels, abs=0.01)
    assert images.psnr(0.0) == math.inf


def test_a_cpu_without_bfloat16_has_no_row_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "bfloat16_pays", lambda: False)
    monkeypatch.setitem(images.SIZES, "cpu", images.SIZES["exercise"])
    found = images.measured(silent)
    assert [row["backend"] for row in found["rows"]] == ["fp32"]
    assert found["absent"] == [{"backend": "bf16", "reason": images.ABSENT}]


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert images.main(["--exercise"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2
