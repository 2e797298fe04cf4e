"""The convolutional encoder and decoder of the VQ tokenizer, module names as in LlamaGen's files.

Levels run from full resolution to the deepest in the encoder, and back in the decoder; every level but the deepest is
followed by a halving (or, in the decoder, a doubling). Everything works in contiguous and in channels_last memory.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn
from torch.nn import functional as F

from retinar.engine.config import TokenizerConfig


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm with ``groups`` groups; widths that it does not divide take the largest common divisor."""
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=1e-6)


def conv3x3(width_in: int, width_out: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1)


class ResBlock(nn.Module):
    """Two norm-swish-conv rounds beside a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, width_in: int, width_out: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(width_in, config.norm_groups), conv3x3(width_in, width_out)
        self.norm2, self.conv2 = group_norm(width_out, config.norm_groups), conv3x3(width_out, width_out)
        self.dropout = nn.Dropout(config.dropout_p)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)
        self.widens = width_in != width_out

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(self.dropout(F.silu(self.norm2(h_BCHW))))
        return (self.nin_shortcut(x_BCHW) if self.widens else x_BCHW) + h_BCHW


class AttnBlock(nn.Module):
    """Single-head attention over all positions, head dim = channels."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(width, groups)
        self.q, self.k, self.v = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.norm(x_BCHW)
        q_B1TC, k_B1TC, v_B1TC = (
            conv(h_BCHW).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v)
        )
        o_B1TC = F.scaled_dot_product_attention(q_B1TC, k_B1TC, v_B1TC)
        o_BCHW = o_B1TC.squeeze(1).transpose(1, 2).reshape(h_BCHW.shape)
        return x_BCHW + self.proj_out(o_BCHW)


class Downsample(nn.Module):
    """Halves height and width: a strided convolution, padded on the right and at the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv3x3(width, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention at the deepest level, then the resampling."""

    def __init__(self, widths: list[int], attention: bool, config: TokenizerConfig) -> None:
        """``widths``: the input's, then the output's of every residual block."""
        super().__init__()
        self.res = nn.ModuleList(
            ResBlock(width_in, width_out, config) for width_in, width_out in itertools.pairwise(widths)
        )
        self.attn = nn.ModuleList(AttnBlock(width, config.norm_groups) for width in widths[1:] if attention)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[i](x_BCHW)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x_BCHW = getattr(self, name)(x_BCHW)
        return x_BCHW


def middle(width: int, config: TokenizerConfig) -> nn.ModuleList:
    """Residual block, attention, residual block; without attention the place in the middle stays, empty."""
    return nn.ModuleList(
        [
            ResBlock(width, width, config),
            AttnBlock(width, config.norm_groups) if config.attention else nn.Identity(),
            ResBlock(width, width, config),
        ]
    )


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, z_channels, H / downsample, W / downsample]."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.conv_in = conv3x3(3, config.ch)
        self.conv_blocks = nn.ModuleList()
        width, deepest = config.ch, len(config.ch_mult) - 1
        for i, mult in enumerate(config.ch_mult):
            widths = [width] + [config.ch * mult] * config.num_res_blocks
            level = Level(widths, config.attention and i == deepest, config)
            width = widths[-1]
            if i != deepest:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = middle(width, config)
        self.norm_out = group_norm(width, config.norm_groups)
        self.conv_out = conv3x3(width, config.z_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return _run(self, x_BCHW, [*self.conv_blocks, *self.mid])


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, 3, h * downsample, w * downsample]; one more residual block a level than before."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        width, deepest = config.ch * config.ch_mult[-1], len(config.ch_mult) - 1
        self.conv_in = conv3x3(config.z_channels, width)
        self.mid = middle(width, config)
        self.conv_blocks = nn.ModuleList()
        for i in range(deepest, -1, -1):
            widths = [width] + [config.ch * config.ch_mult[i]] * (config.num_res_blocks + 1)
            level = Level(widths, config.attention and i == deepest, config)
            width = widths[-1]
            if i != 0:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(width, config.norm_groups)
        self.conv_out = conv3x3(width, 3)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        return _run(self, z_BCHW, [*self.mid, *self.conv_blocks])


def _run(part: Encoder | Decoder, x_BCHW: Tensor, blocks: list[nn.Module]) -> Tensor:
    x_BCHW = part.conv_in(x_BCHW)
    for block in blocks:
        x_BCHW = block(x_BCHW)
    return part.conv_out(F.silu(part.norm_out(x_BCHW)))
