"""Configs: upstream's sizes to the number, upstream's field names, and errors that name what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinar.engine.config import (
    GPT_SIZES,
    TOKENIZER_SIZES,
    GPTConfig,
    TokenizerConfig,
    gpt_config,
    tokenizer_config,
)
from retinar.engine.errors import InputError

# LlamaGen's table: layers, heads, dim, head dim, ffn hidden, millions of parameters (16,384 codes, 1,000 classes).
TABLE = {
    "GPT-B": (12, 12, 768, 64, 2048, 110.9),
    "GPT-L": (24, 16, 1024, 64, 2816, 342.9),
    "GPT-XL": (36, 20, 1280, 64, 3584, 774.7),
    "GPT-XXL": (48, 24, 1536, 64, 4096, 1411),
    "GPT-XXXL": (48, 40, 2560, 64, 6912, 3893),
    "GPT-1B": (22, 32, 2048, 64, 5632, 1200),
    "GPT-3B": (24, 32, 3200, 100, 8704, 3097),
    "GPT-7B": (32, 32, 4096, 128, 11008, 6615),
}


@pytest.mark.parametrize("name", TABLE)
def test_upstream_sizes(name: str) -> None:
    layers, heads, dim, head_dim, hidden, millions = TABLE[name]
    config = gpt_config(name)
    assert (config.n_layer, config.n_head, config.dim) == (layers, heads, dim)
    assert (config.head_dim, config.ffn_hidden) == (head_dim, hidden)
    assert config.parameter_count / 1e6 == pytest.approx(millions, abs=0.05 if millions < 1000 else 0.5)


@pytest.mark.parametrize(
    ("name", "codes", "low", "high"),
    [("GPT-tiny", 1024, 0.9, 1.3), ("GPT-mini", 1024, 5, 6), ("GPT-small", 4096, 20, 25)],
)
def test_small_sizes(name: str, codes: int, low: float, high: float) -> None:
    assert low <= gpt_config(name, vocab_size=codes, num_classes=2).parameter_count / 1e6 <= high


def test_names_in_any_case_and_overrides() -> None:
    assert gpt_config("gpt-xl", num_classes=2, block_size=576) == gpt_config("GPT-XL", num_classes=2, grid=24)
    assert gpt_config(gpt_config("GPT-B"), attn_dropout_p=0.1).attn_dropout_p == 0.1


def test_upstream_names(golden: Path, tmp_path: Path) -> None:
    config = gpt_config(golden / "gpt_config.json")
    assert (config.n_layer, config.n_head, config.dim, config.grid, config.num_classes) == (2, 4, 64, 6, 2)
    vq = tokenizer_config(str(golden / "vq_config.json"))
    assert (vq.ch, vq.ch_mult, vq.z_channels, vq.grid) == (32, (1, 1, 1, 2), 32, 8)

    flags = {"gpt-model": "GPT-L", "image-size": 384, "downsample-size": 16, "gpt-type": "c2i", "dropout-p": 0.2}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    config = gpt_config(tmp_path / "flags.json")
    assert (config.n_layer, config.grid, config.resid_dropout_p, config.ffn_dropout_p) == (24, 24, 0.2, 0.2)

    mults = {
        "encoder_ch_mult": [1, 2],
        "decoder_ch_mult": [1, 2],
        "codebook_l2_norm": True,
        "codebook_show_usage": True,
    }
    assert tokenizer_config(mults).ch_mult == (1, 2)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("GPT-XLL", "did you mean GPT-"),
        ("nothing-like-it", "known are GPT-tiny"),
        ({"n_layers": 2}, "did you mean n_layer"),
        ({"dim": "64"}, "Expected dim as int, found '64'"),
        ({"n_layer": True}, "Expected n_layer as int"),
        ({"dim": 65}, "multiple of 4"),
        ({"dim": 60, "n_head": 10}, "multiple of 4"),
        ({"n_head": 4, "dim": 64, "n_kv_head": 3}, "divide n_head 4"),
        ({"block_size": 35}, "block_size as the square"),
        ({"block_size": 36, "grid": 7}, "found 36 and 7"),
        ({"vocab_size": 0}, "Expected vocab_size above 0"),
        ({"norm_eps": float("nan")}, "Expected norm_eps above 0"),
        ({"attn_dropout_p": 1.0}, r"Expected attn_dropout_p in \[0, 1\)"),
        ({"model_type": "t2i"}, "Expected model_type 'c2i'"),
        ({"cls_token_num": 120}, "Expected cls_token_num 1"),
        ({"null_class": False}, "without a null class"),
        ("missing.json", "cannot be read"),
    ],
)
def test_bad_transformers(source: Any, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        gpt_config(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("VQ-9", "did you mean VQ-"),
        ({"chanels": 3}, "tokenizer field"),
        ({"ch_mult": [1, 0]}, "positive whole numbers"),
        ({"ch_mult": [1, 2.5]}, "Expected ch_mult as tuple"),
        ({"image_size": 250}, "multiple of 8"),
        ({"codebook_l2_norm": False}, "Expected codebook_l2_norm True"),
        ({"encoder_ch_mult": [1, 2], "decoder_ch_mult": [1, 3]}, "one ch_mult"),
    ],
)
def test_bad_tokenizers(source: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        tokenizer_config(source)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_bad_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="JSON object"):
        gpt_config(tmp_path / "config.json")


@pytest.mark.parametrize("size", [256, 384, 512])
@pytest.mark.parametrize(("name", "factor"), [("VQ-8", 8), ("VQ-16", 16), ("VQ-8-narrow", 8), ("VQ-8-tiny", 8)])
def test_tokenizer_grids(name: str, factor: int, size: int) -> None:
    config = tokenizer_config(name, image_size=size)
    assert (config.downsample, config.grid) == (factor, size // factor)


@given(
    size=st.sampled_from(sorted(GPT_SIZES)),
    grid=st.integers(1, 64),
    codes=st.integers(1, 70000),
    classes=st.integers(1, 1000),
    dropout=st.floats(0, 1, exclude_max=True),
    null_class=st.booleans(),
)
def test_transformer_configs_survive_json(
    size: str, grid: int, codes: int, classes: int, dropout: float, null_class: bool
) -> None:
    config = GPTConfig(
        **GPT_SIZES[size],
        grid=grid,
        vocab_size=codes,
        num_classes=classes,
        drop_path_rate=dropout,
        null_class=null_class,
        class_dropout_prob=dropout if null_class else 0.0,
    )
    text = json.dumps(config.to_dict())
    assert gpt_config(json.loads(text)) == config
    assert gpt_config({"format": 1, "config": json.loads(text)}) == config
    assert config.block_size == grid**2 and config.class_rows == classes + null_class


@given(size=st.sampled_from(sorted(TOKENIZER_SIZES)), factor=st.integers(1, 8), beta=st.floats(0.01, 1))
def test_tokenizer_configs_survive_json(size: str, factor: int, beta: float) -> None:
    config = TokenizerConfig(**TOKENIZER_SIZES[size] | {"image_size": 64 * factor}, commit_loss_beta=beta)
    assert tokenizer_config(json.loads(json.dumps(config.to_dict()))) == config
