"""What golden vectors cannot show: widths, sizes, usage for any batch, gradients, memory formats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from retinar.engine.config import TOKENIZER_SIZES, TokenizerConfig, tokenizer_config
from retinar.engine.errors import InputError
from retinar.engine.tokenizer import USAGE_WINDOW, VQTokenizer
from retinar.engine.vq_blocks import group_norm

TINY = TokenizerConfig(ch=16, ch_mult=(1, 2), z_channels=16, codebook_size=32, image_size=16, num_res_blocks=1)


def build(config: TokenizerConfig = TINY, seed: int = 0) -> VQTokenizer:
    torch.manual_seed(seed)
    return VQTokenizer(config)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("VQ-8", 70.11), ("VQ-16", 71.88), ("VQ-8-narrow", 4.57), ("VQ-16-narrow", 4.68), ("VQ-8-tiny", 0.71)],
)
def test_named_sizes(name: str, millions: float) -> None:
    """Upstream's two have the sizes that its code builds; ours stay small."""
    with torch.device("meta"):
        model = VQTokenizer(tokenizer_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert set(TOKENIZER_SIZES) >= {"VQ-8", "VQ-16", "VQ-8-narrow", "VQ-8-tiny"}


@pytest.mark.parametrize("side", [256, 384, 512])
def test_image_sizes(side: int) -> None:
    with torch.device("meta"):
        model = VQTokenizer(tokenizer_config("VQ-16", image_size=side))
        z_BChw = model.latents(torch.zeros(1, 3, side, side))
        assert z_BChw.shape == (1, 8, model.config.grid, model.config.grid) == (1, 8, side // 16, side // 16)
        assert model.decode_latents(z_BChw).shape == (1, 3, side, side)


@pytest.mark.parametrize("attention", [True, False])
def test_shapes_of_oblong_images(attention: bool) -> None:
    model = build(TokenizerConfig(**TINY.to_dict() | {"attention": attention})).eval()
    codes_Bhw = model.encode(torch.rand(3, 3, 8, 20) * 2 - 1)
    assert codes_Bhw.shape == (3, 4, 10) and codes_Bhw.dtype == torch.int64
    assert model.decode(codes_Bhw).shape == (3, 3, 8, 20)
    assert any("attn" in name or "mid.1" in name for name, _ in model.named_parameters()) == attention


@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (64, 32), (96, 32), (512, 32), (16, 16), (48, 16), (8, 8)])
def test_narrow_widths_take_fewer_groups(channels: int, groups: int) -> None:
    norm = group_norm(channels, 32)
    assert isinstance(norm, nn.GroupNorm) and norm.num_groups == groups and norm.eps == 1e-6


def test_codes_survive_decoding_to_the_nearest_entry() -> None:
    """lookup gives unit vectors that quantise back to their own code."""
    model = build()
    codes_Bhw = torch.arange(32).view(1, 4, 8)
    entries_BChw = model.quantize.lookup(codes_Bhw)
    torch.testing.assert_close(entries_BChw.norm(dim=1), torch.ones(1, 4, 8))
    quantized_BChw, again_Bhw = model.quantize(entries_BChw * 3)  # length does not matter
    assert torch.equal(again_Bhw, codes_Bhw)
    torch.testing.assert_close(quantized_BChw, entries_BChw)


def test_straight_through_reaches_the_encoder() -> None:
    model = build().train()
    images_BCHW = torch.rand(2, 3, 16, 16) * 2 - 1
    output = model(images_BCHW)
    output.reconstruction.square().mean().backward()
    assert model.encoder.conv_in.weight.grad.abs().max() > 0
    # The reconstruction alone does not move the codebook; the codebook loss does, and not the encoder.
    assert model.quantize.embedding.weight.grad is None or not model.quantize.embedding.weight.grad.any()
    model.zero_grad()
    output = model(images_BCHW)
    output.codebook_loss.backward()
    assert model.quantize.embedding.weight.grad.abs().max() > 0
    assert model.encoder.conv_in.weight.grad is None


def test_commitment_is_a_quarter_and_moves_the_encoder_alone() -> None:
    model = build().train()
    output = model(torch.rand(2, 3, 16, 16) * 2 - 1)
    torch.testing.assert_close(output.commitment_loss, 0.25 * output.codebook_loss)
    output.commitment_loss.backward()
    assert model.encoder.conv_in.weight.grad.abs().max() > 0
    assert model.quantize.embedding.weight.grad is None


@given(counts=st.lists(st.integers(1, 3 * USAGE_WINDOW // 2), min_size=1, max_size=4), seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_usage_for_batches_of_any_size(counts: list[int], seed: int) -> None:
    """The window holds the last 65,536 codes; upstream's fails above that many in one batch."""
    quantize = build().quantize
    generator = torch.Generator().manual_seed(seed)
    history = torch.zeros(USAGE_WINDOW, dtype=torch.int64)
    for count in counts:
        codes_Bhw = torch.randint(8, 24, (1, 1, count), generator=generator)
        usage = quantize.track(codes_Bhw)
        history = torch.cat([history, codes_Bhw.flatten()])[-USAGE_WINDOW:]
        assert torch.equal(quantize.codebook_used.long(), history)
        assert usage == len(history.unique()) / 32


def test_usage_moves_in_training_only() -> None:
    model = build()
    images_BCHW = torch.rand(1, 3, 16, 16)
    assert model.eval()(images_BCHW).usage == 0.0
    assert not model.quantize.codebook_used.any()
    assert 0 < model.train()(images_BCHW).usage <= 1
    assert model.to(torch.bfloat16).quantize.codebook_used.dtype == torch.int32  # a cast does not round codes


def test_one_image_is_decoded_alike_alone_and_in_a_batch() -> None:
    model = build().eval()
    codes_Bhw = torch.randint(32, (4, 8, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.decode(codes_Bhw)[2:3], model.decode(codes_Bhw[2:3]), rtol=0, atol=1e-5)


def test_autocast_reconstruction_is_fp32() -> None:
    model = build().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert output.reconstruction.dtype == output.codebook_loss.dtype == output.commitment_loss.dtype == torch.float32
    (output.reconstruction.mean() + output.commitment_loss).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 15, 16), (1, 3, 0, 16)])
def test_wrong_images_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="multiples of 2"):
        build().encode(torch.zeros(shape))


@pytest.mark.parametrize(
    "codes", [torch.zeros(4, dtype=torch.int64), torch.full((1, 2, 2), 32), torch.full((1, 2, 2), -1)]
)
def test_wrong_codes_are_named(codes: torch.Tensor) -> None:
    with pytest.raises(InputError, match="from 0 to 31"):
        build().decode(codes)
