"""The tokenizer's decoder in bfloat16 on a CPU, and when it is used.

Most of the time are 3x3 convolutions, which oneDNN runs near the cores' bf16 peak. What is changed around them:

- weights are bfloat16 and channels_last ahead of time;
- doubling and the 3x3 convolution behind it are one transposed 4x4 convolution of stride 2: the same sums with 4
  products an output instead of 9 (`_doubling`);
- attention is two products around a softmax; torch's fused attention is slow for heads of 512;
- the residual stream is fp32 but at full resolution, where that costs most; the statistics of norms, the softmax, the
  first 1x1 and the last 3x3 convolution are fp32.

``python -m retinar.bench.images`` measures it beside fp32: seconds an image, and PSNR. Left out: torch.compile, which
compiles for longer than most runs decode, and weights packed for oneDNN, through functions that torch does not promise.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retinar.engine.tokenizer import VQTokenizer, check_codes
from retinar.engine.vq_blocks import AttnBlock, ResBlock, Upsample

HALF = torch.bfloat16


class ImageDecoder(Protocol):
    """What turns codes into images: a `VQTokenizer` or a `BFloat16Decoder`."""

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Codes [B, h, w] int64 -> images [B, 3, H, W] in fp32, about [-1, 1], not clamped."""


def fast_decoder(tokenizer: VQTokenizer, device: torch.device, dtype: torch.dtype) -> BFloat16Decoder | None:
    """A bfloat16 decoder where ``dtype`` asks for one and this CPU gains from it; None: decode with the tokenizer.

    Without bfloat16 instructions the same convolutions take longer than in fp32.
    """
    wanted = device.type == "cpu" and dtype == HALF
    return BFloat16Decoder(tokenizer) if wanted and bfloat16_pays() else None


def bfloat16_pays() -> bool:
    """Whether this CPU has instructions for bfloat16 products and torch's oneDNN may use them."""
    mkldnn = torch.backends.mkldnn
    if not mkldnn.is_available() or not mkldnn.enabled or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class BFloat16Decoder:
    """A copy of ``tokenizer``'s codebook and decoder, prepared once; it does not follow the tokenizer's later changes.

    PSNR against fp32 is above 45 dB even with random weights, which amplify rounding. Bits depend on the number of
    threads through torch's norms (in fp32 too, by less), and on other images only if decoded together.
    """

    def __init__(self, tokenizer: VQTokenizer) -> None:
        self.config = tokenizer.config
        # Any: torch types a module's parts as "Tensor | Module"
        parts: tuple[Any, ...] = tuple(
            copy.deepcopy(part).float().eval().requires_grad_(False)
            for part in (tokenizer.quantize, tokenizer.post_quant_conv, tokenizer.decoder)
        )
        self._codebook, self._expand, decoder = parts
        for block in list(decoder.modules()):
            if isinstance(block, Upsample):
                block.conv = _doubling(block.conv)  # type: ignore[assignment]
        for block in decoder.modules():
            if isinstance(block, nn.Conv2d | nn.ConvTranspose2d):
                block.to(torch.float32 if block is decoder.conv_out else HALF)
                block.weight.data = block.weight.contiguous(memory_format=torch.channels_last)
        self._decoder = decoder

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """As `VQTokenizer.decode`."""
        check_codes(codes_Bhw, self.config.codebook_size)
        z_BChw = self._expand(self._codebook.lookup(codes_Bhw)).contiguous(memory_format=torch.channels_last)
        decoder = self._decoder
        x_BCHW = decoder.conv_in(z_BChw.to(HALF)).float()
        for block in decoder.mid:
            x_BCHW = _apply(block, x_BCHW)
        for i, level in enumerate(decoder.conv_blocks, start=1):
            x_BCHW = _level(level, x_BCHW)
            if i < len(decoder.conv_blocks) - 1:
                x_BCHW = x_BCHW.float()
        return decoder.conv_out(_norm(decoder.norm_out, x_BCHW.float()))


# Blocks of a level run in place: the stream is never read again. Its dtype is that of what comes in.


def _level(level: Any, x_BCHW: Tensor) -> Tensor:
    for i, block in enumerate(level.res):
        x_BCHW = _apply(block, x_BCHW)
        if len(level.attn):
            x_BCHW = _apply(level.attn[i], x_BCHW)
    return level.upsample.conv(x_BCHW.to(HALF)) if hasattr(level, "upsample") else x_BCHW


def _apply(block: Any, x_BCHW: Tensor) -> Tensor:
    if isinstance(block, ResBlock):
        h_BCHW = block.conv1(_norm(block.norm1, x_BCHW).to(HALF))
        h_BCHW = block.conv2(_norm(block.norm2, h_BCHW))
        if block.widens:
            x_BCHW = block.nin_shortcut(x_BCHW.to(HALF)).to(x_BCHW.dtype)
        return x_BCHW.add_(h_BCHW)
    return _attention(block, x_BCHW) if isinstance(block, AttnBlock) else x_BCHW


def _norm(norm: nn.GroupNorm, x_BCHW: Tensor) -> Tensor:
    """Norm and swish in the dtype of ``x_BCHW``, with fp32 statistics and weights."""
    return F.silu(norm(x_BCHW), inplace=True)


def _attention(block: AttnBlock, x_BCHW: Tensor) -> Tensor:
    h_BCHW = block.norm(x_BCHW).to(HALF)
    B, C, H, W = h_BCHW.shape
    q_BTC, k_BTC, v_BTC = (
        conv(h_BCHW).permute(0, 2, 3, 1).reshape(B, H * W, C) for conv in (block.q, block.k, block.v)
    )
    weights_BTT = torch.softmax((q_BTC @ k_BTC.mT).float().mul_(C**-0.5), dim=-1).to(HALF)
    o_BCHW = (weights_BTT @ v_BTC).view(B, H, W, C).permute(0, 3, 1, 2)
    return x_BCHW.add_(block.proj_out(o_BCHW))


def _doubling(conv: nn.Conv2d) -> nn.ConvTranspose2d:
    """Nearest-neighbour doubling and ``conv`` (3x3, padding 1) as one transposed convolution.

    An input pixel fills 2x2 pixels, each of which reaches 3x3 outputs: together 4x4, with the weights that meet summed.
    """
    width_out, width_in = conv.weight.shape[:2]
    doubling = nn.ConvTranspose2d(width_in, width_out, 4, stride=2, padding=1).requires_grad_(False)
    reach_OI33 = conv.weight.flip(2, 3)
    sums_OI44 = torch.stack([F.pad(reach_OI33, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)]).sum(0)
    doubling.load_state_dict({"weight": sums_OI44.transpose(0, 1), "bias": conv.bias})
    return doubling
