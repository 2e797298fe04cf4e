"""Tiny models with weights that matter (an untrained output layer is zero), and checkpoints of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retinar.engine import checkpoint
from retinar.engine.config import GPTConfig, TokenizerConfig
from retinar.engine.model import GPT
from retinar.engine.sampler import Sampler
from retinar.engine.tokenizer import VQTokenizer

CLASSES = ("healthy", "npdr")


@pytest.fixture(scope="session")
def tiny_gpt() -> GPT:
    """2 layers, 4 heads of 16, 6x6 codes out of 64, two classes; logits with a spread of a few units."""
    torch.manual_seed(7)
    gpt = GPT(GPTConfig(n_layer=2, n_head=4, dim=64, multiple_of=64, vocab_size=64, num_classes=2, grid=6))
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.25)
    return gpt.eval()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> VQTokenizer:
    """6x6 codes -> 12x12 pixels."""
    torch.manual_seed(8)
    config = TokenizerConfig(
        ch=32, ch_mult=(1, 1), z_channels=32, codebook_size=64, image_size=12, num_res_blocks=1, attention=False
    )
    return VQTokenizer(config).eval()


@pytest.fixture
def tiny_sampler(tiny_gpt: GPT, tiny_tokenizer: VQTokenizer) -> Sampler:
    return Sampler(tiny_gpt, tiny_tokenizer, classes=CLASSES, device="cpu")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_gpt: GPT, tiny_tokenizer: VQTokenizer) -> Path:
    """A saved transformer with its tokenizer inside."""
    folder = tmp_path_factory.mktemp("checkpoint") / "gpt"
    checkpoint.save_gpt(folder, tiny_gpt, classes=CLASSES, tokenizer=tiny_tokenizer)
    return folder
