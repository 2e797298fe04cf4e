"""What int8 costs, on a model small enough to know the answer of: itself, and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retinar.bench import int8_quality
from retinar.engine.config import GPTConfig
from retinar.engine.model import GPT
from retinar.engine.precision import PRECISIONS
from retinar.kernels import ops

pytestmark = pytest.mark.skipif(not ops.native_info()["loaded"], reason=str(ops.native_info()["reason"]))


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(2)
    model = GPT(GPTConfig(n_layer=2, n_head=2, dim=64, multiple_of=64, vocab_size=61, num_classes=2, grid=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    return model.eval()


def test_float32_is_the_training_forward(gpt: GPT) -> None:
    codes_BT, labels_B = torch.randint(61, (3, 16)), torch.tensor([0, 1, 1])
    found = int8_quality.log_probabilities(gpt, PRECISIONS["float32"], codes_BT, labels_B)
    with torch.no_grad():
        expected = gpt(codes_BT, labels_B).log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_rounding_costs_little_and_not_nothing(gpt: GPT) -> None:
    found = int8_quality.compare(gpt, torch.randint(61, (4, 16)), torch.tensor([0, 1, 0, 1]))
    assert list(found) == ["float32", "bfloat16", "int8", "int8-cache"] and "kl" not in found["float32"]
    for name in ("bfloat16", "int8", "int8-cache"):
        assert 0 < found[name]["kl"] < 0.05 and found[name]["same_argmax"] > 0.8, name
        assert found[name]["nll"] == pytest.approx(found["float32"]["nll"], abs=0.05)
    assert found["int8"]["kl"] > found["bfloat16"]["kl"]


def test_codes_that_are_not_there_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert int8_quality.main(["--model", str(tmp_path / "none"), "--codes", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and not told.out
