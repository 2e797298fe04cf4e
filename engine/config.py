"""What defines a transformer or a tokenizer: frozen configs, named sizes, and upstream's names for their fields."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retinar.engine.errors import InputError
from retinar.engine.fields import ConfigSource, checked, positive, probabilities, read, strip

MAX_GRID = 1024
"""Far beyond use (8,192 pixels at 8 a code): a damaged config must not ask for terabytes of rotary table."""


@dataclass(frozen=True)
class GPTConfig:
    """The transformer. Lengths are counts; ``*_p``, ``*_prob`` and ``*_rate`` are probabilities in [0, 1)."""

    n_layer: int = 12
    n_head: int = 12
    dim: int = 768
    n_kv_head: int | None = None
    """Key and value heads (grouped queries); None: as many as ``n_head``."""
    multiple_of: int = 256
    """The hidden width of the feed-forward is rounded up to a multiple of this."""
    vocab_size: int = 16384
    num_classes: int = 1000
    grid: int = 32
    """Codes per side of the square image (upstream's ``block_size`` is its square)."""
    cls_token_num: int = 1
    null_class: bool = True
    """One more class row for "no class". Upstream leaves it out where its ``class_dropout_prob`` is 0."""
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    token_dropout_p: float = 0.1
    attn_dropout_p: float = 0.0
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    drop_path_rate: float = 0.0
    """Stochastic depth of the last layer, growing linearly from 0 at the first. Above 0 it replaces the residual and
    feed-forward dropouts (they are not applied), as upstream's training does."""
    class_dropout_prob: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "n_layer", "n_head", "dim", "multiple_of", "vocab_size", "num_classes", "grid")
        positive(self, "rope_base", "norm_eps")
        if self.grid > MAX_GRID:
            raise InputError(f"Expected grid up to {MAX_GRID} codes a side, found {self.grid}: correct the config.")
        probabilities(self, "token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p")
        probabilities(self, "drop_path_rate", "class_dropout_prob")
        if self.cls_token_num != 1:
            raise InputError(
                f"Expected cls_token_num 1 (one class token an image), found {self.cls_token_num}: "
                "text-conditional models are not supported."
            )
        if self.dim % self.n_head or self.head_dim % 4:
            raise InputError(
                f"Expected dim to be n_head times a multiple of 4 (rotary pairs for rows and for columns), "
                f"found dim {self.dim} with n_head {self.n_head}: choose other numbers."
            )
        if self.n_head % self.kv_heads or self.kv_heads < 1:
            raise InputError(
                f"Expected n_kv_head to divide n_head {self.n_head}, found {self.n_kv_head}: choose a divisor."
            )
        if self.class_dropout_prob > 0 and not self.null_class:
            raise InputError(
                "Expected class_dropout_prob 0 without a null class, "
                f"found {self.class_dropout_prob}: set null_class to true or the probability to 0."
            )

    @property
    def block_size(self) -> int:
        """Codes in an image."""
        return self.grid * self.grid

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head

    @property
    def kv_heads(self) -> int:
        """Key and value heads as a number."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def ffn_hidden(self) -> int:
        """Hidden width of the feed-forward: two thirds of 4 dim, rounded up to ``multiple_of``."""
        return math.ceil(int(2 * 4 * self.dim / 3) / self.multiple_of) * self.multiple_of

    @property
    def class_rows(self) -> int:
        """Rows of the class table; with a null class it is the last."""
        return self.num_classes + int(self.null_class)

    @property
    def parameter_count(self) -> int:
        """Trained numbers, from the shapes alone."""
        qkv = self.dim * (self.dim + 2 * self.kv_heads * self.head_dim)
        layer = qkv + self.dim * self.dim + 3 * self.dim * self.ffn_hidden + 2 * self.dim
        return self.n_layer * layer + self.dim * (self.class_rows + 2 * self.vocab_size + 1)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TokenizerConfig:
    """The VQ tokenizer; widths are in channels, ``image_size`` in pixels."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 4)
    """Width of each level over ``ch``; every level but the last halves the image."""
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    image_size: int = 256
    num_res_blocks: int = 2
    """Residual blocks a level of the encoder; the decoder has one more."""
    dropout_p: float = 0.0
    attention: bool = True
    """Attention at the deepest level and in the middle, as upstream; False for the tiniest tokenizers."""
    norm_groups: int = 32
    """Groups of every GroupNorm, upstream's 32. Narrow networks need fewer: with as many groups as channels each
    channel loses its mean over the image, and with it the image's colour."""
    commit_loss_beta: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(int(m) for m in self.ch_mult))
        positive(self, "ch", "z_channels", "codebook_size", "codebook_embed_dim", "image_size", "num_res_blocks")
        positive(self, "norm_groups")
        probabilities(self, "dropout_p")
        if not self.ch_mult or min(self.ch_mult) < 1:
            raise InputError(
                f"Expected ch_mult as positive whole numbers, found {list(self.ch_mult)}: give one for each level."
            )
        if self.image_size % self.downsample:
            raise InputError(
                f"Expected image_size as a multiple of {self.downsample} ({len(self.ch_mult)} levels), "
                f"found {self.image_size}: choose another size or another ch_mult."
            )

    @property
    def downsample(self) -> int:
        """Pixels per code along a side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def grid(self) -> int:
        """Codes per side at ``image_size``."""
        return self.image_size // self.downsample

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {**dataclasses.asdict(self), "ch_mult": list(self.ch_mult)}


GPT_SIZES: dict[str, dict[str, Any]] = {
    # Ours, for CPUs: about 1.1 M and 5.6 M parameters with 1,024 codes, 24.4 M with 4,096 codes (two classes).
    "GPT-tiny": {"n_layer": 4, "n_head": 4, "dim": 128, "multiple_of": 64},
    "GPT-mini": {"n_layer": 6, "n_head": 4, "dim": 256},
    "GPT-small": {"n_layer": 12, "n_head": 6, "dim": 384},
    # LlamaGen's; GPT-XL is the paper's.
    "GPT-B": {"n_layer": 12, "n_head": 12, "dim": 768},
    "GPT-L": {"n_layer": 24, "n_head": 16, "dim": 1024},
    "GPT-XL": {"n_layer": 36, "n_head": 20, "dim": 1280},
    "GPT-XXL": {"n_layer": 48, "n_head": 24, "dim": 1536},
    "GPT-XXXL": {"n_layer": 48, "n_head": 40, "dim": 2560},
    "GPT-1B": {"n_layer": 22, "n_head": 32, "dim": 2048},
    "GPT-3B": {"n_layer": 24, "n_head": 32, "dim": 3200},
    "GPT-7B": {"n_layer": 32, "n_head": 32, "dim": 4096},
}

TOKENIZER_SIZES: dict[str, dict[str, Any]] = {
    "VQ-8": {"ch_mult": (1, 2, 2, 4)},
    "VQ-16": {"ch_mult": (1, 1, 2, 2, 4)},
    # Ours, for CPUs and small data.
    "VQ-8-narrow": {"ch": 32, "ch_mult": (1, 2, 2, 4), "z_channels": 128, "codebook_size": 4096, "norm_groups": 8},
    "VQ-16-narrow": {"ch": 32, "ch_mult": (1, 1, 2, 2, 4), "z_channels": 128, "codebook_size": 4096, "norm_groups": 8},
    "VQ-8-light": {
        "ch": 32,
        "ch_mult": (1, 1, 2, 4),
        "z_channels": 64,
        "codebook_size": 1024,
        "num_res_blocks": 1,
        "attention": False,
        "norm_groups": 4,
    },
    "VQ-8-tiny": {
        "ch": 16,
        "ch_mult": (1, 1, 2, 4),
        "z_channels": 32,
        "codebook_size": 1024,
        "num_res_blocks": 1,
        "attention": False,
        "norm_groups": 4,
    },
}

# Upstream's fields that say nothing about the weights or the arithmetic, and what they must be where they would.
_GPT_INERT = {"max_batch_size", "max_seq_len", "caption_dim"}
_GPT_FIXED = {"model_type": "c2i", "gpt_type": "c2i", "ffn_dim_multiplier": None}
_VQ_INERT = {"codebook_show_usage", "disc_ndf", "disc_layers", "disc_dim", "disc_num_layers"}
_VQ_FIXED = {"codebook_l2_norm": True, "entropy_loss_ratio": 0.0}


def gpt_config(source: ConfigSource | GPTConfig, **overrides: Any) -> GPTConfig:
    """A transformer's config from a size's name, a dict, a JSON file, a checkpoint folder of ours, or another config.

    Upstream's field names are understood (``block_size``, ``image_size`` with ``downsample_size``, ``gpt_model``, ...).
    ``overrides`` win. Raises InputError for unknown names (with the nearest known ones) and impossible values.
    """
    if isinstance(source, GPTConfig):
        source = source.to_dict()
    return build_gpt_config({**gpt_fields(source), **gpt_fields(overrides)})


def tokenizer_config(source: ConfigSource | TokenizerConfig, **overrides: Any) -> TokenizerConfig:
    """A tokenizer's config; sources, overrides and errors as in :func:`gpt_config`."""
    if isinstance(source, TokenizerConfig):
        source = source.to_dict()
    return build_tokenizer_config({**tokenizer_fields(source), **tokenizer_fields(overrides)})


def gpt_fields(source: ConfigSource) -> dict[str, Any]:
    """The fields of GPTConfig that ``source`` states, in our names and nothing filled in."""
    fields = read(source, GPT_SIZES, "transformer size")
    fields = strip(fields, _GPT_INERT, _GPT_FIXED)
    pixels, factor = fields.pop("image_size", None), fields.pop("downsample_size", None)
    if pixels is not None and factor is not None:
        if not all(isinstance(number, int) and number > 0 for number in (pixels, factor)):
            raise InputError(
                f"Expected image_size and downsample_size as whole numbers above 0, found {pixels!r} and {factor!r}: "
                "correct the config."
            )
        fields.setdefault("grid", pixels // factor)
    if "block_size" in fields:
        block_size = fields.pop("block_size")
        grid = math.isqrt(block_size) if isinstance(block_size, int) and block_size > 0 else 0
        if grid < 1 or grid * grid != block_size:
            raise InputError(
                f"Expected block_size as the square of the codes per side, found {block_size!r}: give 256, 576, 1024, …"
            )
        if fields.setdefault("grid", grid) != grid:
            raise InputError(
                f"Expected block_size to be the square of grid, found {block_size} and {fields['grid']}: give one."
            )
    if "dropout_p" in fields:  # upstream's flag for both
        dropout_p = fields.pop("dropout_p")
        fields.setdefault("resid_dropout_p", dropout_p)
        fields.setdefault("ffn_dropout_p", dropout_p)
    return fields


def tokenizer_fields(source: ConfigSource) -> dict[str, Any]:
    """The fields of TokenizerConfig that ``source`` states, in our names and nothing filled in."""
    fields = read(source, TOKENIZER_SIZES, "tokenizer size")
    fields = strip(fields, _VQ_INERT, _VQ_FIXED)
    stated = [fields.pop(key) for key in ("encoder_ch_mult", "decoder_ch_mult") if key in fields]
    for mult in stated:
        if not all(isinstance(given, (list, tuple)) for given in (mult, fields.get("ch_mult", mult))):
            raise InputError(f"Expected ch_mult as a list of whole numbers, found {mult!r}: give one for each level.")
        if tuple(fields.setdefault("ch_mult", mult)) != tuple(mult):
            raise InputError(
                f"Expected one ch_mult for encoder and decoder, found {fields['ch_mult']} and {mult}: make them equal."
            )
    return fields


def build_gpt_config(fields: Mapping[str, Any]) -> GPTConfig:
    """GPTConfig from our own field names; unknown ones raise InputError with near matches."""
    return GPTConfig(**checked(fields, GPTConfig, "transformer field"))


def build_tokenizer_config(fields: Mapping[str, Any]) -> TokenizerConfig:
    """TokenizerConfig from our own field names; unknown ones raise InputError with near matches."""
    return TokenizerConfig(**checked(fields, TokenizerConfig, "tokenizer field"))
