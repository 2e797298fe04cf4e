"""What defines an iDDPM: network and process. Field names are the public flags' where they mean the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from retinar.bench.baselines.iddpm.schedule import SCHEDULES, named_betas
from retinar.engine.errors import InputError
from retinar.engine.fields import ConfigSource, checked, positive, probabilities, read

Variance = Literal["learned_range", "fixed_small", "fixed_large"]
Objective = Literal["hybrid", "vlb"]


@dataclass(frozen=True)
class IDDPMConfig:
    """The U-Net and the diffusion process it is trained for; sides are in pixels."""

    image_size: int = 256
    num_channels: int = 128
    """Width of the first level; a multiple of ``norm_groups``."""
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    """Width of each level over ``num_channels``; every level but the last halves the image."""
    num_res_blocks: int = 2
    """Residual blocks a level on the way down; one more on the way up."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Sides of the feature maps that have attention; the middle always has."""
    num_heads: int = 1
    num_heads_upsample: int | None = None
    """Heads on the way up; None: as many as ``num_heads``."""
    use_scale_shift_norm: bool = True
    """Time and class scale and shift the second norm of a residual block; False: they are added before it."""
    norm_groups: int = 32
    dropout_p: float = 0.0
    num_classes: int | None = 2
    """None: no classes at all."""
    null_class: bool = True
    """One more class row, the last, for "no class" (classifier-free guidance). The public checkpoints have none."""
    class_dropout_prob: float = 0.1

    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    variance: str = "learned_range"
    """With "learned_range" the network says by three more channels where between beta-tilde and beta it lies;
    "fixed_small" (beta-tilde) and "fixed_large" (beta) are plain DDPM's."""
    objective: str = "hybrid"
    """What is minimised: "hybrid", L_simple with the bound where the variance is learned, or "vlb", the bound alone."""
    rescale_timesteps: bool = False
    """Tell the network t * 1000 / diffusion_steps, a float, instead of t."""
    rescale_learned_sigmas: bool = True
    """Weigh the hybrid's bound by diffusion_steps / 1000 (L_hybrid = L_simple + L_vlb / 1000); False: one term by 1."""

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attention_resolutions"):
            object.__setattr__(self, name, tuple(int(value) for value in getattr(self, name)))
        positive(self, "image_size", "num_channels", "num_res_blocks", "num_heads", "norm_groups", "diffusion_steps")
        positive(self, *(name for name in ("num_heads_upsample", "num_classes") if getattr(self, name) is not None))
        probabilities(self, "dropout_p", "class_dropout_prob")
        self._check_widths()
        self._check_words()

    def _check_widths(self) -> None:
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise InputError(
                f"Expected channel_mult as positive whole numbers, found {list(self.channel_mult)}: "
                "give one for each level."
            )
        down = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % down:
            raise InputError(
                f"Expected image_size as a multiple of {down} ({len(self.channel_mult)} levels), "
                f"found {self.image_size}: choose another size or another channel_mult."
            )
        sides = [self.image_size // 2**level for level in range(len(self.channel_mult))]
        if not set(self.attention_resolutions) <= set(sides):
            raise InputError(
                f"Expected attention_resolutions among {sides}, found {list(self.attention_resolutions)}: "
                "choose sides that the levels have."
            )
        if self.num_channels % self.norm_groups:
            raise InputError(
                f"Expected num_channels as a multiple of norm_groups {self.norm_groups}, found {self.num_channels}: "
                "choose other numbers."
            )
        for heads in (self.num_heads, self.heads_upsample):
            if self.num_channels % heads:
                raise InputError(
                    f"Expected heads to divide num_channels {self.num_channels}, found {heads}: choose a divisor."
                )

    def _check_words(self) -> None:
        words = {"noise_schedule": SCHEDULES, "variance": get_args(Variance), "objective": get_args(Objective)}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise InputError(
                    f"Expected {name} {' or '.join(known)}, found {getattr(self, name)!r}: choose one of them."
                )
        named_betas(self.noise_schedule, self.diffusion_steps)
        null = self.num_classes is not None and self.null_class
        if self.class_dropout_prob > 0 and self.num_classes is not None and not null:
            raise InputError(
                f"Expected class_dropout_prob 0 without a null class, found {self.class_dropout_prob}: "
                "set null_class to true or the probability to 0."
            )

    @property
    def heads_upsample(self) -> int:
        """Heads on the way up as a number."""
        return self.num_heads if self.num_heads_upsample is None else self.num_heads_upsample

    @property
    def class_rows(self) -> int:
        """Rows of the class table, 0 without classes; with a null class it is the last."""
        return 0 if self.num_classes is None else self.num_classes + int(self.null_class)

    @property
    def null_label(self) -> int | None:
        """The label of "no class", None where there is none."""
        return self.num_classes if self.num_classes is not None and self.null_class else None

    @property
    def out_channels(self) -> int:
        """Channels of the network's output: the noise, and where it is learned the variance."""
        return 6 if self.variance == "learned_range" else 3

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        lists = {name: list(getattr(self, name)) for name in ("channel_mult", "attention_resolutions")}
        return {**dataclasses.asdict(self), **lists}


_NO_CLASS: dict[str, Any] = {"num_classes": None, "null_class": False, "class_dropout_prob": 0.0}
_LSUN: dict[str, Any] = {"use_scale_shift_norm": False, "rescale_learned_sigmas": False}
_COSINE: dict[str, Any] = {
    "num_res_blocks": 3,
    "num_heads": 4,
    "diffusion_steps": 4000,
    "noise_schedule": "cosine",
    "rescale_timesteps": True,
}
_IMAGENET: dict[str, Any] = {
    **_COSINE,
    "image_size": 64,
    "channel_mult": (1, 2, 3, 4),
    "attention_resolutions": (16, 8),
}
_CPU: dict[str, Any] = {
    "image_size": 128,
    "num_channels": 16,
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
    "num_heads": 2,
    "norm_groups": 8,
}

IDDPM_SIZES: dict[str, dict[str, Any]] = {
    # For tests and CPUs.
    "iDDPM-tiny": {
        "image_size": 64,
        "num_channels": 32,
        "channel_mult": (1, 2, 2),
        "num_res_blocks": 1,
        "num_heads": 2,
        "norm_groups": 8,
        "noise_schedule": "cosine",
    },
    "iDDPM-cpu": {**_CPU, "channel_mult": (1, 1, 2, 4, 4, 4)},
    "iDDPM-cpu-wide": {
        **_CPU,
        "num_channels": 24,
        "channel_mult": (1, 1, 2, 4, 6, 8),
        "num_heads": 4,
        "noise_schedule": "cosine",
    },
    "iDDPM-256-cpu": {**_CPU, "image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4, 4)},
    # Two classes of photographs: the LSUN recipe at its own size, the ImageNet recipe with a level more.
    "iDDPM-256": {**_LSUN},
    "iDDPM-128": {**_COSINE, "image_size": 128, "channel_mult": (1, 1, 2, 3, 4), "attention_resolutions": (16, 8)},
    # The public checkpoints' own.
    "LSUN-256": {**_LSUN, **_NO_CLASS},
    "ImageNet-64": {**_IMAGENET, **_NO_CLASS},
    "ImageNet-64-class": {
        **_IMAGENET,
        **_NO_CLASS,
        "num_channels": 192,
        "num_classes": 1000,
        "rescale_timesteps": False,
        "rescale_learned_sigmas": False,
    },
    "CIFAR-10": {
        **_COSINE,
        **_NO_CLASS,
        "image_size": 32,
        "channel_mult": (1, 2, 2, 2),
        "attention_resolutions": (16, 8),
        "dropout_p": 0.3,
    },
}

_WORDS = ("noise_schedule", "variance", "objective")


def iddpm_config(source: ConfigSource | IDDPMConfig, **overrides: Any) -> IDDPMConfig:
    """A config from a size's name, a dict, a JSON file, a folder with a config.json, or another config.

    ``overrides`` win. Raises InputError for unknown names (with the nearest known ones) and impossible values.
    """
    stated = source.to_dict() if isinstance(source, IDDPMConfig) else read(source, IDDPM_SIZES, "diffusion model size")
    fields: Mapping[str, Any] = {**stated, **overrides}
    words = {name: fields[name] for name in _WORDS if name in fields}
    rest = {name: value for name, value in fields.items() if name not in words}
    return IDDPMConfig(**checked(rest, IDDPMConfig, "diffusion model field"), **words)
