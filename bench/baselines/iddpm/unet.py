"""The class-conditional U-Net of iDDPM. Its state dict has improved-diffusion's keys and shapes.

Shapes: B images, C channels, H and W pixels, P = H W positions, E the width of the embedding of time and class.
Source: Nichol & Dhariwal 2021, section 2 and appendix A.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retinar.bench.baselines.iddpm.config import IDDPMConfig
from retinar.engine.errors import InputError

MAX_PERIOD = 10000.0
"""The longest wave of the time embedding, over 2 pi, in steps."""


def time_embedding(times_B: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of the times (whole or not) at ``width`` // 2 frequencies from 1 down: fp32 [B, width]."""
    half = width // 2
    places = torch.arange(half, dtype=torch.float32, device=times_B.device)
    angles_BF = times_B.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * places / half)
    return F.pad(torch.cat([angles_BF.cos(), angles_BF.sin()], dim=1), (0, width % 2))


class Norm(nn.GroupNorm):
    """GroupNorm in fp32, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        bias, weight = self.bias.float(), self.weight.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def _zeroed(module: nn.Conv1d | nn.Conv2d) -> nn.Module:
    """A block's last convolution starts at zero, so that the block starts as its shortcut."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """Two convolutions with a shortcut; the embedding scales and shifts the second norm, or is added before it."""

    def __init__(self, config: IDDPMConfig, channels: int, out_channels: int) -> None:
        super().__init__()
        self.scale_shift = config.use_scale_shift_norm
        embedded = out_channels * (2 if self.scale_shift else 1)
        self.in_layers = nn.Sequential(
            Norm(config.norm_groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * config.num_channels, embedded))
        self.out_layers = nn.Sequential(
            Norm(config.norm_groups, out_channels),
            nn.SiLU(),
            nn.Dropout(config.dropout_p),
            _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        h_BCHW = self.in_layers(x_BCHW)
        emb_BC11 = self.emb_layers(emb_BE).to(h_BCHW.dtype)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb_BC11.chunk(2, dim=1)
            h_BCHW = self.out_layers[1:](self.out_layers[0](h_BCHW) * (1 + scale) + shift)
        else:
            h_BCHW = self.out_layers(h_BCHW + emb_BC11)
        return self.skip_connection(x_BCHW) + h_BCHW


class AttentionBlock(nn.Module):
    """Every position attends to all. Each head's rows of ``qkv`` lie together: its queries, its keys, its values."""

    def __init__(self, config: IDDPMConfig, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(config.norm_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, channels = x_BCHW.shape[:2]
        x_BCP = x_BCHW.flatten(2)
        parts = self.qkv(self.norm(x_BCP)).unflatten(1, (self.heads, 3, channels // self.heads)).mT
        mixed = F.scaled_dot_product_attention(*parts.unbind(2))
        return x_BCHW + self.proj_out(mixed.mT.reshape(batch, channels, -1)).reshape(x_BCHW.shape)


class Downsample(nn.Module):
    """Half the side, by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.op(x_BCHW)


class Upsample(nn.Module):
    """Twice the side: every pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Stage(nn.Sequential):
    """Modules in a row; residual blocks also take the embedding."""

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:  # type: ignore[override]
        for module in self:
            x_BCHW = module(x_BCHW, emb_BE) if isinstance(module, ResBlock) else module(x_BCHW)
        return x_BCHW


class UNet(nn.Module):
    """Predicts from a noisy image the noise in it, and where the config says so its variance channels.

    ``activation_checkpointing``: keep each stage's input alone for the backward pass and compute the rest again.
    """

    def __init__(self, config: IDDPMConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        width = config.num_channels
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        if config.class_rows:
            self.label_emb = nn.Embedding(config.class_rows, 4 * width)
        sides = [config.image_size // 2**level for level in range(len(config.channel_mult))]
        channels, skips = width, [width]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(3, width, 3, padding=1))])
        for level, (side, mult) in enumerate(zip(sides, config.channel_mult, strict=True)):
            for _ in range(config.num_res_blocks):
                attention = self._attention(side, mult * width, config.num_heads)
                self.input_blocks.append(Stage(ResBlock(config, channels, mult * width), *attention))
                channels = mult * width
                skips.append(channels)
            if level < len(sides) - 1:
                self.input_blocks.append(Stage(Downsample(channels)))
                skips.append(channels)
        self.middle_block = Stage(
            ResBlock(config, channels, channels),
            AttentionBlock(config, channels, config.num_heads),
            ResBlock(config, channels, channels),
        )
        self.output_blocks = nn.ModuleList()
        for level, (side, mult) in reversed(list(enumerate(zip(sides, config.channel_mult, strict=True)))):
            for block in range(config.num_res_blocks + 1):
                modules: list[nn.Module] = [ResBlock(config, channels + skips.pop(), mult * width)]
                channels = mult * width
                modules += self._attention(side, channels, config.heads_upsample)
                if level and block == config.num_res_blocks:
                    modules.append(Upsample(channels))
                self.output_blocks.append(Stage(*modules))
        last = nn.Conv2d(channels, config.out_channels, 3, padding=1)
        self.out = nn.Sequential(Norm(config.norm_groups, channels), nn.SiLU(), _zeroed(last))

    @property
    def stages(self) -> list[Stage]:
        """What to compile or to shard by itself, in the order of the forward pass."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def _attention(self, side: int, channels: int, heads: int) -> list[nn.Module]:
        return [AttentionBlock(self.config, channels, heads)] if side in self.config.attention_resolutions else []

    def forward(self, x_BCHW: Tensor, times_B: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """fp32 [B, 3 or 6, H, W]: the noise, then the variance channels.

        x_BCHW: [B, 3, H, W], noisy images of scale [-1, 1], H and W ``image_size`` (or what the levels can halve);
        times_B: what :class:`~retinar.bench.baselines.iddpm.diffusion.Diffusion` tells, whole or fractional;
        labels_B: int64, given exactly where the model has classes. InputError otherwise.
        """
        if (labels_B is None) != (self.config.num_classes is None):
            has = "no classes" if self.config.num_classes is None else f"{self.config.num_classes} classes"
            raise InputError(
                f"Expected labels exactly where the model has classes, found {'none' if labels_B is None else 'some'} "
                f"and {has}: {'pass' if labels_B is None else 'leave out'} labels_B."
            )
        down = 2 ** (len(self.config.channel_mult) - 1)
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != 3 or x_BCHW.shape[2] % down or x_BCHW.shape[3] % down:
            raise InputError(
                f"Expected images [B, 3, H, W] with sides that {down} divides, found {list(x_BCHW.shape)}: resize them."
            )
        dtype = next(self.parameters()).dtype
        emb_BE = self.time_embed(time_embedding(times_B, self.config.num_channels).to(dtype))
        if labels_B is not None:
            emb_BE = emb_BE + self.label_emb(labels_B)
        h_BCHW, skips = x_BCHW.to(dtype), []
        for stage in self.input_blocks:
            h_BCHW = self._run(stage, h_BCHW, emb_BE)
            skips.append(h_BCHW)
        h_BCHW = self._run(self.middle_block, h_BCHW, emb_BE)
        for stage in self.output_blocks:
            h_BCHW = self._run(stage, torch.cat([h_BCHW, skips.pop()], dim=1), emb_BE)
        return self.out(h_BCHW).float()

    def _run(self, stage: nn.Module, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, x_BCHW, emb_BE, use_reentrant=False)
        return stage(x_BCHW, emb_BE)


def load_weights(model: UNet, weights: Mapping[str, Tensor]) -> None:
    """Copy in a state dict with improved-diffusion's keys. InputError where names or shapes are another network's."""
    own = model.state_dict()
    for name in sorted(own.keys() ^ weights.keys()):
        found = "one more" if name in weights else "none"
        raise InputError(
            f"Expected the weights of this network, found {found} named {name}: give the config they were trained with."
        )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            advice = "give the config they were trained with"
            if name == "label_emb.weight":
                advice += " (num_classes; null_class false where no row stands for no class)"
            raise InputError(f"Expected {name} of shape {list(own[name].shape)}, found {list(tensor.shape)}: {advice}.")
    model.load_state_dict(weights)


@torch.no_grad()
def start_from(model: UNet, source: UNet) -> None:
    """Copy ``source``'s weights; a table of other classes stays as initialised, any other difference is an error."""
    weights, own = source.state_dict(), model.state_dict()
    table = "label_emb.weight"
    if table in own and (table not in weights or weights[table].shape != own[table].shape):
        print(f"starting with new class embeddings ({len(own[table])} rows).", file=sys.stderr)
        weights[table] = own[table].clone()
    elif table not in own:
        weights.pop(table, None)
    load_weights(model, weights)
