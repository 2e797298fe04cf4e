"""What a training run is: frozen dataclasses and their JSON form (``--set key=value`` is in ``overrides.py``).

A recipe (``recipes.py``) is a function that returns one of these, complete; a run stores it as JSON. Values are checked
when a config is made (``__post_init__``), so a config that exists can be trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_type_hints

from retinar.engine.config import GPTConfig, TokenizerConfig
from retinar.engine.errors import InputError
from retinar.train.overrides import apply_overrides, flatten

__all__ = [
    "MUTABLE_KEYS",
    "GPTTrainConfig",
    "OptimConfig",
    "Parallel",
    "Precision",
    "TokenizerTrainConfig",
    "TrainConfig",
    "apply_overrides",
    "flatten",
    "from_dict",
    "to_dict",
]

Schedule = Literal["constant", "cosine"]
Precision = Literal["fp32", "bf16"]
Parallel = Literal["ddp", "fsdp", "sdp", "hsdp"]

# What may differ between a run and its continuation: how long it runs, what it reports, where it runs, and how it
# trades time for memory. None of these changes the mathematics of a step but for rounding (a cosine schedule is
# stretched by a new length: that is what was asked for).
MUTABLE_KEYS = frozenset(
    {"steps", "epochs", "log_every", "eval_every", "eval_images", "checkpoint_every", "keep_last", "tensorboard"}
    | {
        "device",
        "activation_checkpointing",
        "accumulation",
        "parallel",
        "replicas",
        "guard",
        "spike",
        "keep_best",
        "wandb",
        "meters",
    }
    | {"perceptual_weights"}  # a path: what the file holds is among the run's inputs
)


def _require(condition: bool, expected: str, found: object) -> None:
    if not condition:
        raise InputError(f"Expected {expected}, found {found!r}: set another value.")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate.

    weight_decay acts on tensors of two or more dimensions; grad_clip is the largest global L2 norm of the gradient
    (None: no clipping). The rate rises linearly over warmup_steps to ``lr``, then stays (constant) or falls along
    half a cosine to ``lr * final_lr_ratio`` at the last step.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    grad_clip: float | None = 1.0
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    final_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr above 0", self.lr)
        _require(all(0 <= beta < 1 for beta in self.betas), "optim.betas in [0, 1)", self.betas)
        _require(self.eps > 0, "optim.eps above 0", self.eps)
        _require(self.weight_decay >= 0, "optim.weight_decay of at least 0", self.weight_decay)
        _require(self.grad_clip is None or self.grad_clip > 0, "optim.grad_clip above 0 or none", self.grad_clip)
        _require(self.warmup_steps >= 0, "optim.warmup_steps of at least 0", self.warmup_steps)
        _require(0 <= self.final_lr_ratio <= 1, "optim.final_lr_ratio in [0, 1]", self.final_lr_ratio)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What the training of a tokenizer and of a transformer have in common.

    ``batch_size`` counts all images of one optimizer step; the step runs in ``accumulation`` equal parts, one after
    another, with the same result. The length is ``steps`` where given, else ``epochs`` passes over the data.

    Over the processes of ``torchrun`` every part is split evenly. parallel: "ddp" keeps everything on every process;
    "fsdp" shards weights, gradients and optimizer state and gathers weights block by block; "sdp" (shard-grad-op) keeps
    gathered weights between forward and backward; "hsdp" shards inside each of ``replicas`` groups (None: one a
    machine) and replicates across them. Under the sharded modes precision "bf16" means bf16 weights and activations
    over fp32 masters, gradients summed in ``reduce_precision``; under "ddp" it means autocast, gradients in fp32.

    guard: what a loss or gradient that is not finite does: "stop" ends the run, "skip" leaves that batch out. spike: a
    gradient norm above so many times the median of the last 100 counts as one too (None: not watched). keep_best also
    keeps the checkpoint of the lowest validation loss. wandb: the project to report to, where wandb is installed.
    meters: report speed, MFU, memory and time spent waiting for data, and draw loss.png at the end.
    """

    recipe: str
    optim: OptimConfig = OptimConfig()
    batch_size: int = 32
    accumulation: int = 1
    epochs: int | None = 300
    steps: int | None = None
    precision: Precision = "bf16"
    ema_decay: float | None = None
    compile: bool = False
    seed: int = 0
    device: str = "auto"
    log_every: int = 100
    eval_every: int = 1000
    eval_images: int = 1024
    checkpoint_every: int = 5000
    keep_last: int = 2
    keep_best: bool = True
    tensorboard: bool = True
    wandb: str | None = None
    meters: bool = True
    parallel: Parallel = "ddp"
    replicas: int | None = None
    reduce_precision: Precision = "fp32"
    guard: Literal["stop", "skip"] = "stop"
    spike: float | None = None

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "batch_size of at least 1", self.batch_size)
        _require(
            self.accumulation >= 1 and self.batch_size % self.accumulation == 0,
            f"accumulation to divide batch_size {self.batch_size}",
            self.accumulation,
        )
        _require(self.epochs is not None or self.steps is not None, "one of steps and epochs", None)
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} of at least 1 or none", value)
        _require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay in (0, 1) or none", self.ema_decay)
        _require(0 <= self.seed < 2**63, "seed from 0 to 2^63 - 1", self.seed)
        _require(self.replicas is None or self.replicas >= 1, "replicas of at least 1 or none", self.replicas)
        _require(self.replicas is None or self.parallel == "hsdp", "replicas with parallel=hsdp only", self.replicas)
        _require(self.spike is None or self.spike > 1, "spike above 1 or none", self.spike)
        for name in ("log_every", "eval_every", "eval_images", "checkpoint_every", "keep_last"):
            _require(getattr(self, name) >= 1, f"{name} of at least 1", getattr(self, name))

    def total_steps(self, images: int) -> int:
        """Optimizer steps of the whole run over a data set of so many images."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, self.epochs * images // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class GPTTrainConfig(TrainConfig):
    """Training of the transformer on codes.

    fit_to_codes: vocabulary, grid and number of classes are those of the codes; otherwise a difference is an error.
    views "random" draws one view (image, mirror, crop) of every image anew each epoch; "first" always takes view 0.
    attention_backend "auto" takes the fastest implementation that can do what the config asks for.
    activation_checkpointing "full" keeps each block's input alone for the backward pass and computes the rest again;
    "selective" also keeps the results of matrix products and attention, and computes norms, gates and dropouts again.
    """

    model: GPTConfig
    fit_to_codes: bool = False
    views: Literal["random", "first"] = "random"
    attention_backend: str = "auto"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig(TrainConfig):
    """Training of the tokenizer: reconstruction, perceptual, codebook, commitment and adversarial losses, weighted.

    start "checkpoint" needs weights to begin from (``--init``). scope "decoder" leaves encoder and codebook as they
    are, so that codes extracted earlier stay valid. crop_size: side of the random square crop, in pixels (None: whole
    images). The discriminator (PatchGAN) joins at step ``disc_start``; disc_weight 0 leaves it out.

    Ours, off in upstream's recipe: whole_from is the share of the steps after which whole images take the place of
    crops (as many pixels a step): group norms see other statistics in a crop than in the image. perceptual_side takes
    the perceptual loss on one random square of that share of a crop's side, and perceptual_from leaves it out of the
    steps before, since VGG16 costs more than a narrow tokenizer. revive_after puts codes that no position took for so
    many steps onto latents of the present batch. quantize_from: the steps before it train a plain autoencoder on the
    normalised latents; then the codebook is put onto latents of the present batch. A fresh encoder's latents all point
    one way, and quantising them at once can leave it there: one colour out for any image in.
    """

    model: TokenizerConfig
    start: Literal["scratch", "checkpoint"] = "scratch"
    scope: Literal["whole", "decoder"] = "whole"
    optim: OptimConfig = OptimConfig(weight_decay=0.0)
    disc_optim: OptimConfig = OptimConfig(weight_decay=0.0)
    crop_size: int | None = None
    whole_from: float = 1.0
    mirror: bool = True
    reconstruction_loss: Literal["l2", "l1"] = "l2"
    reconstruction_weight: float = 1.0
    perceptual: Literal["vgg", "none"] = "vgg"
    perceptual_weight: float = 1.0
    perceptual_weights: str | None = None
    perceptual_side: float = 1.0
    perceptual_from: int = 0
    codebook_weight: float = 1.0  # the commitment loss enters with model.commit_loss_beta
    revive_after: int | None = None
    quantize_from: int = 0
    disc_start: int = 20_000
    disc_weight: float = 0.5
    disc_channels: int = 64
    disc_layers: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("crop_size", 1), ("revive_after", 1)):
            value = getattr(self, name)
            _require(value is None or value >= least, f"{name} of at least {least} or none", value)
        _require(0 <= self.whole_from <= 1, "whole_from in [0, 1]", self.whole_from)
        _require(0 < self.perceptual_side <= 1, "perceptual_side in (0, 1]", self.perceptual_side)
        _require(self.perceptual_from >= 0, "perceptual_from of at least 0", self.perceptual_from)
        _require(self.quantize_from >= 0, "quantize_from of at least 0", self.quantize_from)
        _require(self.disc_start >= 0, "disc_start of at least 0", self.disc_start)
        _require(self.disc_channels >= 1, "disc_channels of at least 1", self.disc_channels)
        _require(self.disc_layers >= 1, "disc_layers of at least 1", self.disc_layers)
        if self.disc_weight > 0:
            # Its last two convolutions take a pixel each off a side that disc_layers halvings have left.
            side, least = self.crop_size or self.model.image_size, 3 * 2**self.disc_layers
            _require(side >= least, f"crops of at least {least} pixels for disc_layers {self.disc_layers}", side)
        for field in dataclasses.fields(self):
            if field.name.endswith("_weight"):
                value = getattr(self, field.name)
                _require(value >= 0, f"{field.name} of at least 0", value)


Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON values (nested dicts, tuples as lists)."""
    return _plain(dataclasses.asdict(config))


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of :func:`to_dict`; InputError on an unknown or missing key or a value of the wrong kind."""
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise InputError(f"Expected the keys of {kind.__name__}, found {', '.join(unknown)}: another version's config?")
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            arguments[key] = from_dict(hint, value)  # type: ignore[arg-type]
        else:
            arguments[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**arguments)
    except TypeError as error:
        raise InputError(f"Expected a complete {kind.__name__}, found {error}") from None


def defaults(config: Any) -> dict[str, Any]:
    """The defaults of a config's fields, where they have any, as JSON values."""
    fields = [field for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING]
    return {field.name: _plain(field.default) for field in fields if not dataclasses.is_dataclass(field.default)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(inner) for inner in value]
    return value
