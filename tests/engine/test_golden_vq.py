"""The tokenizer against numbers that LlamaGen's own code produced from the same weights, on every backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from retinar.engine.checkpoint import load_tokenizer
from retinar.engine.tokenizer import VQTokenizer
from tests.conftest import Ran, every_backend

BACKENDS = every_backend("reference")
PIXELS = 5e-5  # absolute, in [-1, 1]: a hundredth of a grey level


@pytest.fixture(scope="module")
def expected(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "vq_expected.safetensors")


@pytest.fixture(params=["contiguous", "channels_last"])
def tokenizer(golden: Path, request: pytest.FixtureRequest) -> VQTokenizer:
    model = load_tokenizer(golden / "vq.pt", golden / "vq_config.json")
    return model.to(memory_format=torch.channels_last) if request.param == "channels_last" else model


@BACKENDS
def test_indices_and_quantised(tokenizer: VQTokenizer, expected: Mapping[str, Tensor], ran: Ran) -> None:
    codes_Bhw = tokenizer.encode(expected["images"])
    assert codes_Bhw.dtype == torch.int64
    assert torch.equal(codes_Bhw.flatten(), expected["indices"])
    torch.testing.assert_close(tokenizer.quantize.lookup(codes_Bhw), expected["quant"], rtol=0, atol=1e-6)
    quantized_BChw, same_Bhw = tokenizer.quantize(tokenizer.latents(expected["images"]))
    assert torch.equal(same_Bhw, codes_Bhw)
    torch.testing.assert_close(quantized_BChw, expected["quant"], rtol=0, atol=1e-6)


def test_decoded(tokenizer: VQTokenizer, expected: Mapping[str, Tensor]) -> None:
    codes_Bhw = expected["indices"].view(2, 8, 8)
    images_BCHW = tokenizer.decode(codes_Bhw)
    assert images_BCHW.dtype == torch.float32
    torch.testing.assert_close(images_BCHW, expected["decoded_from_code"], rtol=0, atol=PIXELS)
    torch.testing.assert_close(tokenizer.decode_latents(expected["quant"]), expected["decoded"], rtol=0, atol=PIXELS)


@BACKENDS
def test_training_losses_and_gradients(tokenizer: VQTokenizer, expected: Mapping[str, Tensor], ran: Ran) -> None:
    """Upstream's training objective without its perceptual part: mean square error plus both codebook losses."""
    tokenizer.train()
    output = tokenizer(expected["images"])
    torch.testing.assert_close(output.reconstruction, expected["train.reconstruction"], rtol=0, atol=PIXELS)
    torch.testing.assert_close(output.codebook_loss, expected["train.vq_loss"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(output.commitment_loss, expected["train.commit_loss"][0], rtol=1e-5, atol=0)
    assert torch.equal(output.codes_Bhw.flatten(), expected["indices"])
    error = torch.nn.functional.mse_loss(output.reconstruction, expected["images"])
    (error + output.codebook_loss + output.commitment_loss).backward()
    parameters = dict(tokenizer.named_parameters())
    wanted = {key.removeprefix("train.grad."): tensor for key, tensor in expected.items() if "train.grad." in key}
    assert len(wanted) == 9
    for key, gradient in wanted.items():
        grad = parameters[key].grad
        assert grad is not None
        relative = (grad - gradient).abs().max() / gradient.abs().max()
        assert relative < 1e-4, f"{key}: relative to its largest entry {relative:.1e}"
