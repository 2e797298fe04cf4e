"""The bfloat16 decoder: close to fp32, every architecture, a copy of its own, one image at a time, where asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retinar.engine import checkpoint, images, provenance, vq_decoder
from retinar.engine.config import TokenizerConfig, tokenizer_config
from retinar.engine.errors import InputError
from retinar.engine.model import GPT
from retinar.engine.request import SamplingParams
from retinar.engine.sampler import Sampler
from retinar.engine.tokenizer import VQTokenizer
from retinar.engine.vq_decoder import BFloat16Decoder, _doubling, bfloat16_pays, fast_decoder

CPU = torch.device("cpu")
PSNR = 45.0  # dB against fp32, of a range of 2

only_with_bfloat16 = pytest.mark.skipif(not bfloat16_pays(), reason="this CPU has no bfloat16 products")


def build(seed: int = 0, **fields: object) -> VQTokenizer:
    torch.manual_seed(seed)
    return VQTokenizer(tokenizer_config("VQ-8", **fields)).eval()


def codes_of(tokenizer: VQTokenizer, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(tokenizer.config.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


def psnr(made: Tensor, truth: Tensor) -> float:
    return float(10 * torch.log10(4 / (made.double() - truth.double()).square().mean()))


@pytest.mark.parametrize("width", [1, 16, 24])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8)])
def test_doubling_is_one_transposed_convolution(width: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(width, width, 3, padding=1).requires_grad_(False)
    x_BCHW = torch.randn(2, width, *shape)
    expected = conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(_doubling(conv)(x_BCHW), expected, rtol=1e-5, atol=1e-5)


# Without bfloat16 instructions the same code is slow, and has the same precision.
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_precision_at_half_width(seed: int) -> None:
    """Random weights: they amplify rounding more than trained ones do."""
    tokenizer = build(seed, ch=64, image_size=64)
    codes_Bhw = codes_of(tokenizer, 1, 8, 8)
    made = BFloat16Decoder(tokenizer).decode(codes_Bhw)
    truth = tokenizer.decode(codes_Bhw)
    assert made.dtype == torch.float32 and made.shape == truth.shape == (1, 3, 64, 64)
    assert psnr(made, truth) > PSNR
    assert truth.std() > 0.2  # an image, not a constant that anything comes close to


@pytest.mark.slow
@only_with_bfloat16
@pytest.mark.parametrize("seed", [0, 1])
def test_precision_at_full_size(seed: int) -> None:
    tokenizer = build(seed)
    codes_Bhw = codes_of(tokenizer, 1, 32, 32)
    assert psnr(BFloat16Decoder(tokenizer).decode(codes_Bhw), tokenizer.decode(codes_Bhw)) > PSNR


@pytest.mark.parametrize(
    "fields",
    [
        {"ch_mult": (1,)},  # no doubling
        {"ch_mult": (1, 2), "attention": False},
        {"ch_mult": (1, 1, 2, 2, 4)},
        {"ch": 17, "ch_mult": (2, 4), "norm_groups": 2, "num_res_blocks": 1},
        {"ch": 16, "ch_mult": (1, 1, 2, 4), "attention": False, "num_res_blocks": 1},
    ],
    ids=["one level", "no attention", "VQ-16", "odd width", "VQ-8-tiny"],
)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5)])
def test_every_architecture(fields: dict[str, object], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same blocks in the same order: with fp32 in bfloat16's place nothing is left but the order of sums."""
    monkeypatch.setattr(vq_decoder, "HALF", torch.float32)
    config = {"ch": 32, "z_channels": 32, "codebook_size": 64, "image_size": 64, "norm_groups": 4} | fields
    torch.manual_seed(0)
    tokenizer = VQTokenizer(TokenizerConfig(**config)).eval()  # type: ignore[arg-type]
    codes_Bhw = codes_of(tokenizer, 2, *shape)
    made = BFloat16Decoder(tokenizer).decode(codes_Bhw)
    torch.testing.assert_close(made, tokenizer.decode(codes_Bhw), rtol=1e-4, atol=1e-4)


def test_it_is_a_copy_and_leaves_the_tokenizer_alone() -> None:
    tokenizer = build(ch=32, image_size=32).train()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    layouts = {name: value.stride() for name, value in tokenizer.state_dict().items()}
    decoder = BFloat16Decoder(tokenizer)
    codes_Bhw = codes_of(tokenizer, 1, 4, 4)
    made = decoder.decode(codes_Bhw)
    assert not made.requires_grad and not torch.is_inference(made)

    after = tokenizer.state_dict()
    assert list(after) == list(before) and tokenizer.training
    for name, value in after.items():
        assert value.dtype == before[name].dtype and value.stride() == layouts[name]
        assert torch.equal(value, before[name])
    assert all(parameter.requires_grad for parameter in tokenizer.parameters())

    with torch.no_grad():  # trained on: the copy stays what it was
        for parameter in tokenizer.parameters():
            parameter.add_(0.5)
    assert torch.equal(decoder.decode(codes_Bhw), made)
    tokenizer.to("meta")
    assert torch.equal(decoder.decode(codes_Bhw), made)


def test_wrong_codes_are_named() -> None:
    decoder = BFloat16Decoder(build(ch=32, image_size=32, codebook_size=32))
    for codes in (torch.zeros(4, dtype=torch.int64), torch.full((1, 2, 2), 32), torch.full((1, 2, 2), -1)):
        with pytest.raises(InputError, match="from 0 to 31"):
            decoder.decode(codes)


@pytest.mark.parametrize("pays", [True, False])
def test_it_is_used_where_asked_for_and_faster(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vq_decoder, "bfloat16_pays", lambda: pays)
    tokenizer = build(ch=32, image_size=32)
    assert fast_decoder(tokenizer, CPU, torch.float32) is None
    assert (fast_decoder(tokenizer, CPU, torch.bfloat16) is not None) == pays
    assert fast_decoder(tokenizer, torch.device("cuda"), torch.bfloat16) is None


def test_without_onednn_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not bfloat16_pays()


# --- in the sampler --------------------------------------------------------------------------------------------------


@pytest.fixture
def half_sampler(tiny_gpt: GPT, tiny_tokenizer: VQTokenizer, monkeypatch: pytest.MonkeyPatch) -> Sampler:
    monkeypatch.setattr(vq_decoder, "bfloat16_pays", lambda: True)
    return Sampler(tiny_gpt, tiny_tokenizer, device="cpu", dtype=torch.bfloat16)


def test_fp32_samplers_decode_as_the_tokenizer(tiny_sampler: Sampler, tiny_tokenizer: VQTokenizer) -> None:
    codes_T = torch.arange(36)
    assert "decoder" not in tiny_sampler.origin.implementation
    pixels = images.to_bytes(tiny_tokenizer.decode(codes_T.view(1, 6, 6)))[0]
    assert np.array_equal(tiny_sampler.decode(codes_T), pixels)


def test_bfloat16_samplers_decode_in_bfloat16_and_say_so(
    half_sampler: Sampler, tiny_tokenizer: VQTokenizer, tmp_path: Path
) -> None:
    assert half_sampler.origin.implementation["decoder"] == "bfloat16"
    [sampled] = half_sampler.sample(half_sampler.requests([1], SamplingParams()))
    codes_Bhw = sampled.codes_T.view(1, 6, 6)
    assert np.array_equal(sampled.pixels_HWC, images.to_bytes(BFloat16Decoder(tiny_tokenizer).decode(codes_Bhw))[0])
    assert json.loads(sampled.fields["implementation"])["decoder"] == "bfloat16"
    images.save_png(images.to_pil(sampled.pixels_HWC, sampled.fields), tmp_path / "a.png")
    assert provenance.read(tmp_path / "a.png").implementation["decoder"] == "bfloat16"


def test_an_image_does_not_depend_on_its_neighbours(half_sampler: Sampler) -> None:
    requests = half_sampler.requests([0, 1] * 3, SamplingParams(), seed=3)
    together = {sampled.request.index: sampled for sampled in half_sampler.sample(requests, max_images=6)}
    for request in requests:
        [alone] = half_sampler.sample([request])
        assert torch.equal(alone.codes_T, together[request.index].codes_T)
        assert np.array_equal(alone.pixels_HWC, together[request.index].pixels_HWC)


def test_unloaded_samplers_hold_no_copy(half_sampler: Sampler) -> None:
    half_sampler.tokenizer = build(ch=32, image_size=32)  # the fixture's is shared
    half_sampler.unload()
    assert half_sampler.fast_decoder is None


def test_checkpoints_keep_fp32_in_upstreams_layout(tiny_tokenizer: VQTokenizer, tmp_path: Path) -> None:
    BFloat16Decoder(tiny_tokenizer)
    checkpoint.save_tokenizer(tmp_path / "t", tiny_tokenizer)
    again = checkpoint.load_tokenizer(tmp_path / "t")
    for (name, one), (other_name, other) in zip(
        tiny_tokenizer.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other_name and one.dtype == other.dtype and other.is_contiguous() and torch.equal(one, other)
