"""FLOPs of a training step: what the mathematics asks for, a multiply-add counting two.

The ops' come from their specs, forward and backward; a matrix product [m, k] x [k, n] is 2 m n k forward and twice that
backward. Work that a setting adds is not counted: activation checkpointing computes blocks again, which costs time and
so lowers what is reached of a device, as it should. (Attention's scores, which no implementation keeps, are counted
again in its backward: its spec says so.) Neither are dropouts, sums, look-ups, clipping, AdamW and averages: a few
operations for each number that is moved.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from retinar.engine.config import GPTConfig
from retinar.engine.tokenizer import VQTokenizer
from retinar.kernels.spec import ALL_SPECS
from retinar.train.config import TokenizerTrainConfig
from retinar.train.losses import adversarial_weight
from retinar.train.patchgan import PatchGAN

_SPECS = {spec.name: spec for spec in ALL_SPECS}
# VGG16's convolutions, 3x3: (width in, width out, halvings of the side before it).
_VGG16 = (
    *((3, 64, 0), (64, 64, 0)),
    *((64, 128, 1), (128, 128, 1)),
    *((128, 256, 2), (256, 256, 2), (256, 256, 2)),
    *((256, 512, 3), (512, 512, 3), (512, 512, 3)),
    *((512, 512, 4), (512, 512, 4), (512, 512, 4)),
)


def op_flops(name: str, **case: int) -> int:
    """Forward and backward of an op, from its spec."""
    spec = _SPECS[name]
    assert spec.backward_flops is not None, name
    return spec.flops(case) + spec.backward_flops(case)


def gpt_step_flops(config: GPTConfig, images: int) -> dict[str, int]:
    """By part, of a step of the transformer on so many whole images; the step's FLOPs are their sum.

    Causal attention counts the lower triangle alone, which other counters (torch's FlopCounterMode, 6 N D rules with
    full attention) double.
    """
    dim, heads, groups = config.dim, config.n_head, config.kv_heads
    tokens, layers = images * config.block_size, config.n_layer
    weights = dim * (heads + 2 * groups) * config.head_dim + dim * dim + 3 * dim * config.ffn_hidden
    attention = {"batch": images, "heads": heads, "groups": groups, "positions": config.block_size}
    norms = {name: op_flops(name, rows=tokens, width=dim) for name in ("rms_norm", "add_rms_norm")}
    return {
        "matrix products": 3 * 2 * tokens * layers * weights,
        "attention": layers * op_flops("rope_attention_packed", **attention, dim=config.head_dim),
        "loss": op_flops("linear_cross_entropy", tokens=tokens, width=dim, vocabulary=config.vocab_size),
        "norms": layers * sum(norms.values()) + norms["rms_norm"],
        "gates": layers * op_flops("swiglu_packed", rows=tokens, width=config.ffn_hidden),
    }


class TokenizerFlops:
    """Of step ``step`` (counted from 0) of a tokenizer's training: convolutions, attention and the code search.

    Counted once for each stage of the run on tensors without memory: perceptual loss and discriminator join later.
    """

    def __init__(self, config: TokenizerTrainConfig) -> None:
        self.config = config
        self._of_stage = lru_cache(self._count)

    def __call__(self, step: int) -> int:
        config = self.config
        perceptual = config.perceptual == "vgg" and config.perceptual_weight > 0 and step >= config.perceptual_from
        return self._of_stage(perceptual, adversarial_weight(config, step) > 0)

    def _count(self, perceptual: bool, adversarial: bool) -> int:
        config = self.config
        side, images = config.crop_size or config.model.image_size, config.batch_size
        total = _model_and_adversary(config, images, side, adversarial)
        search = {"vectors": images * (side // config.model.downsample) ** 2, "codes": config.model.codebook_size}
        total += op_flops("vq_lookup", **search, channels=config.model.codebook_embed_dim)
        if perceptual:
            # Photographs and reconstructions forward; the latter's gradient with respect to pixels alone.
            total += 3 * images * vgg16_flops(min(side, max(16, round(side * config.perceptual_side))))
        return total


def _model_and_adversary(config: TokenizerTrainConfig, images: int, side: int, adversarial: bool) -> int:
    with torch.device("meta"):
        model = VQTokenizer(config.model).eval()  # training mode would read which codes are in use
        discriminator = PatchGAN(config.disc_channels, config.disc_layers)
        images_BCHW = torch.empty(images, 3, side, side)
    if config.scope == "decoder":
        for part in (model.encoder, model.quant_conv, model.quantize):
            part.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        output = model(images_BCHW)
        loss = output.reconstruction.sum() + output.codebook_loss + output.commitment_loss
        if adversarial:
            discriminator.requires_grad_(False)
            loss = loss + discriminator(output.reconstruction).sum()
        loss.backward()
        if adversarial:
            discriminator.requires_grad_(True)
            for seen_BCHW in (images_BCHW, output.reconstruction.detach()):
                discriminator(seen_BCHW).sum().backward()
    return counter.get_total_flops()


def vgg16_flops(side: int) -> int:
    """VGG16's convolutions on one square image, forward."""
    return sum(2 * 9 * before * after * (side >> halvings) ** 2 for before, after, halvings in _VGG16)
