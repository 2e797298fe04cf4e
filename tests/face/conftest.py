"""A complete small world for the command line: photographs, prepared folder, codes, tokenizer, transformer."""

from __future__ import annotations

import pytest
import torch

from tests.face.world import Shell, World, write_source


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Read only: tests that change something copy it first."""
    from retinar.engine.checkpoint import digest, load_tokenizer, save_gpt, save_tokenizer
    from retinar.engine.config import GPTConfig, tokenizer_config
    from retinar.engine.model import GPT
    from retinar.engine.tokenizer import VQTokenizer
    from retinar.train.codes import encode_folder
    from retinar.train.data.prepare import prepare

    root = tmp_path_factory.mktemp("world")
    world = World(root / "source", root / "prepared", root / "tokenizer", root / "codes", root / "gpt")
    write_source(world.source)
    prepare(world.source, world.prepared, size=32, workers=1)
    torch.manual_seed(0)
    sizes = {"ch": 8, "ch_mult": (1, 1, 1, 1), "z_channels": 8, "codebook_size": 32, "num_res_blocks": 1}
    tokenizer = VQTokenizer(tokenizer_config("VQ-8-tiny", image_size=32, **sizes))
    save_tokenizer(world.tokenizer, tokenizer)
    encode_folder(world.prepared, world.tokenizer, world.codes, split="train")
    sizes = {"n_layer": 1, "n_head": 2, "dim": 16, "multiple_of": 16}
    gpt = GPT(GPTConfig(**sizes, vocab_size=32, num_classes=2, grid=4))
    save_gpt(world.gpt, gpt, classes=("healthy", "npdr"), tokenizer=load_tokenizer(world.tokenizer))
    assert digest(world.gpt / "tokenizer") == digest(world.tokenizer)
    return world
