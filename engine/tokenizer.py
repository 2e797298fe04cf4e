"""The VQ tokenizer: photographs <-> codes. LlamaGen's network, with its width as a parameter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retinar.engine.config import TokenizerConfig
from retinar.engine.errors import InputError
from retinar.engine.vq_blocks import Decoder, Encoder
from retinar.kernels import ops

USAGE_WINDOW = 65536
"""Codes remembered for the usage figure; upstream's buffer has this length."""


class TokenizerOutput(NamedTuple):
    """One training forward pass."""

    reconstruction: Tensor
    """[B, 3, H, W], fp32, not clamped."""
    codes_Bhw: Tensor
    codebook_loss: Tensor
    """Mean squared distance of the chosen codes to the (detached) normalised latents."""
    commitment_loss: Tensor
    """The same, gradient to the latents, already times ``commit_loss_beta``."""
    usage: float
    """Share of the codebook seen among the last 65,536 codes of training; 0.0 in evaluation mode."""


class VectorQuantizer(nn.Module):
    """The codebook. Latents and codes are l2-normalised before the nearest-neighbour search."""

    codebook_used: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        self.beta = config.commit_loss_beta
        # Whole numbers: a cast of the model to bf16 must not round codes. Files hold upstream's fp32.
        self.register_buffer("codebook_used", torch.zeros(USAGE_WINDOW, dtype=torch.int32))
        with torch.no_grad():  # upstream's init: uniform directions of a cube, on the sphere
            self.embedding.weight.uniform_(-1.0, 1.0).copy_(F.normalize(self.embedding.weight, dim=-1))

    def forward(self, z_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """(quantized [B, C, h, w] fp32 with the straight-through gradient, codes [B, h, w])."""
        B, _, h, w = z_BChw.shape
        codes_N, quantized_NC = ops.vq_lookup(_rows(z_BChw), self.embedding.weight)
        return _planes(quantized_NC, B, h, w), codes_N.view(B, h, w)

    def losses(self, z_BChw: Tensor, codes_Bhw: Tensor) -> tuple[Tensor, Tensor]:
        """(codebook loss, commitment loss times beta), fp32 scalars."""
        z_NC = F.normalize(_rows(z_BChw), dim=-1)
        chosen_NC = F.normalize(self.embedding(codes_Bhw.flatten()).float(), dim=-1)
        return F.mse_loss(chosen_NC, z_NC.detach()), self.beta * F.mse_loss(chosen_NC.detach(), z_NC)

    def lookup(self, codes_Bhw: Tensor) -> Tensor:
        """The normalised codes [B, C, h, w] in fp32."""
        B, h, w = codes_Bhw.shape
        return _planes(F.normalize(self.embedding(codes_Bhw.flatten()).float(), dim=-1), B, h, w)

    @torch.no_grad()
    def track(self, codes_Bhw: Tensor) -> float:
        """Push a batch into the window of recent codes (of any size: a large batch replaces it) -> share in use."""
        recent = codes_Bhw.flatten()[-USAGE_WINDOW:].to(self.codebook_used.dtype)
        self.codebook_used.copy_(torch.cat([self.codebook_used[len(recent) :], recent]))
        seen_K = torch.zeros(self.embedding.num_embeddings, dtype=torch.bool, device=recent.device)
        seen_K[self.codebook_used.long()] = True
        return seen_K.float().mean().item()


class VQTokenizer(nn.Module):
    """Images in [-1, 1] <-> codes. ``state_dict()`` has upstream's keys."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    def latents(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1], H and W multiples of ``config.downsample`` -> [B, codebook_embed_dim, h, w]."""
        factor = self.config.downsample
        shape = images_BCHW.shape
        if len(shape) != 4 or shape[1] != 3 or shape[2] % factor or shape[3] % factor or not shape[2] * shape[3]:
            raise InputError(
                f"Expected images [B, 3, H, W] with H and W multiples of {factor}, found {list(shape)}: resize them."
            )
        return self.quant_conv(self.encoder(images_BCHW))

    def decode_latents(self, quantized_BChw: Tensor) -> Tensor:
        """Normalised codes [B, codebook_embed_dim, h, w] -> images [B, 3, H, W] in fp32, not clamped."""
        quantized_BChw = quantized_BChw.to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(quantized_BChw)).float()

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> codes [B, h, w] int64."""
        return self.quantize(self.latents(images_BCHW))[1]

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Codes [B, h, w] int64 -> images [B, 3, H, W] in fp32, about [-1, 1], not clamped."""
        check_codes(codes_Bhw, self.config.codebook_size)
        return self.decode_latents(self.quantize.lookup(codes_Bhw))

    def forward(self, images_BCHW: Tensor, *, quantized: bool = True, track: bool = True) -> TokenizerOutput:
        """Encode, quantise, decode, with the losses; in training mode, and with ``track``, the usage window moves on.

        With ``quantized=False`` the decoder sees the normalised latents themselves and both codebook losses are zero:
        a warm-up for training from scratch (the codes that are returned are still the nearest ones).
        """
        z_BChw = self.latents(images_BCHW)
        quantized_BChw, codes_Bhw = self.quantize(z_BChw)
        if not quantized:
            nothing = 0.0 * self.quantize.embedding.weight.sum()
            return TokenizerOutput(
                self.decode_latents(F.normalize(z_BChw.float(), dim=1)), codes_Bhw, nothing, nothing, usage=0.0
            )
        codebook_loss, commitment_loss = self.quantize.losses(z_BChw, codes_Bhw)
        usage = self.quantize.track(codes_Bhw) if self.training and track else 0.0
        return TokenizerOutput(self.decode_latents(quantized_BChw), codes_Bhw, codebook_loss, commitment_loss, usage)


def check_codes(codes_Bhw: Tensor, size: int) -> None:
    """InputError unless ``codes_Bhw`` is [B, h, w] with codes of a codebook of ``size``."""
    if codes_Bhw.ndim != 3 or (codes_Bhw.numel() and not 0 <= int(codes_Bhw.min()) <= int(codes_Bhw.max()) < size):
        raise InputError(
            f"Expected codes [B, h, w] from 0 to {size - 1}, found shape {list(codes_Bhw.shape)} "
            "or codes outside: give this tokenizer's own codes."
        )


def _rows(z_BChw: Tensor) -> Tensor:
    """One fp32 row a position; a view where memory is channels_last."""
    return z_BChw.permute(0, 2, 3, 1).flatten(0, 2).float()


def _planes(rows_NC: Tensor, B: int, h: int, w: int) -> Tensor:
    # Contiguous: the decoder would inherit channels_last, where torch's group norm goes backward ten times slower on a
    # CPU.
    return rows_NC.view(B, h, w, rows_NC.shape[-1]).permute(0, 3, 1, 2).contiguous()
