"""The sampler of iDDPM: labels and parameters in, images with their provenance out, as the transformer's.

An image's noise is its own: it comes from a generator named by (seed, index). One image after another is made on a CPU,
so that it depends on the checkpoint, dtype, label, parameters, seed, index and implementation, and on nothing else
(convolutions round otherwise in another batch). On a GPU several are made together unless ``batch_invariant`` is asked
for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image

from retinar.bench.baselines.iddpm.checkpoint import load_iddpm
from retinar.bench.baselines.iddpm.config import IDDPMConfig
from retinar.bench.baselines.iddpm.diffusion import Diffusion
from retinar.bench.baselines.iddpm.guidance import denoiser
from retinar.bench.baselines.iddpm.noise import normal, seeded
from retinar.bench.baselines.iddpm.sampling import trajectory
from retinar.bench.baselines.iddpm.unet import UNet
from retinar.engine import checkpoint, images, provenance
from retinar.engine.device import find_device
from retinar.engine.errors import InputError
from retinar.engine.fields import ConfigSource
from retinar.engine.philox import stream
from retinar.engine.progress import Progress, silent
from retinar.engine.request import LARGEST, Asked, resolve_label

Method = Literal["ddim", "ancestral"]
RUNNER = "iddpm"
"""What the provenance of an image calls the implementation that made it."""
ONLY = ("all",)
"""The label of a model without classes."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class DiffusionParams:
    """How images are drawn.

    ``steps``: of the trained process's, evenly spread. ``sampler``: the ancestral one with the learned variance (the
    paper's; new noise forgives the errors of a network that was trained for a short time), or DDIM with ``eta`` from 0
    (deterministic but for the first noise) to 1. ``cfg_scale``: guidance; 1 is none and half the cost.
    Raises InputError for anything outside these ranges.
    """

    steps: int = 50
    sampler: Method = "ancestral"
    eta: float = 0.0
    cfg_scale: float = 1.0

    def __post_init__(self) -> None:
        whole = isinstance(self.steps, int) and not isinstance(self.steps, bool)
        if not whole or self.steps < 1:
            raise InputError(f"steps must be a whole number from 1 up, got {self.steps!r}; try 50")
        if self.sampler not in get_args(Method):
            raise InputError(f"sampler must be {' or '.join(get_args(Method))}, got {self.sampler!r}; choose one")
        for name, most in (("eta", 1.0), ("cfg_scale", LARGEST)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise InputError(f"{name.replace('_', '-')} must be a number from 0 to {most:g}, got {value!r}; try 1")
            object.__setattr__(self, name, float(value))
        if self.sampler == "ancestral" and self.eta != 0:
            raise InputError(
                f"eta is DDIM's, got {self.eta:g} with the ancestral sampler; use --sampler ddim, or leave it out"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class DiffusionRequest(Asked):
    """One image to make by diffusion."""

    params: DiffusionParams


class Drawn(NamedTuple):
    """A finished image: pixels uint8 [H, W, 3] and its text fields."""

    request: DiffusionRequest
    pixels_HWC: np.ndarray
    fields: dict[str, str]


class IDDPMSampler:
    """A network and its origin, ready to sample.

    ``dtype``: that of the weights, by default float32 on a CPU and bfloat16 on a GPU; the process is fp32 always.
    ``digest`` identifies the file for the provenance. ``batch_invariant``: one image at a time, on a CPU always so.
    """

    def __init__(
        self,
        model: UNet,
        *,
        classes: Sequence[str] = (),
        digest: str = provenance.UNSAVED,
        device: torch.device | str | None = None,
        dtype: str | None = None,
        batch_invariant: bool = False,
    ) -> None:
        self.device = find_device(device)
        name = dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        if name not in DTYPES:
            raise InputError(f"dtype must be {' or '.join(DTYPES)} for a diffusion model, got {name}; choose one")
        self.config: IDDPMConfig = model.config
        self.classes = ONLY if self.config.num_classes is None else tuple(classes)
        self.batch_invariant = batch_invariant or self.device.type == "cpu"
        self.model = model.to(self.device, DTYPES[name]).eval()
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        made_by = provenance.implementation(RUNNER, "torch", None, self.device)
        if self.device.type == "cuda":
            made_by |= {"batch_invariant": self.batch_invariant}
        self.origin = provenance.Origin(
            checkpoint=digest, tokenizer=None, dtype=name, implementation=made_by, classes=self.classes, vocab_size=0
        )

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        device: torch.device | str | None = None,
        dtype: str | None = None,
        *,
        config: ConfigSource | None = None,
        batch_invariant: bool = False,
    ) -> IDDPMSampler:
        """Load a folder of ours, or a file of improved-diffusion's with its ``config``; errors as `load_iddpm`."""
        path = Path(path)
        return cls(
            load_iddpm(path, config),
            classes=checkpoint.read_config(path).get("classes", ()) if checkpoint.is_folder(path) else (),
            digest=checkpoint.digest(path),
            device=device,
            dtype=dtype,
            batch_invariant=batch_invariant,
        )

    @property
    def at_once(self) -> int:
        """Images made at the same time unless said otherwise."""
        return 1 if self.batch_invariant else 32

    def requests(
        self, labels: Iterable[int | str], params: DiffusionParams, seed: int = 0, start_index: int = 0
    ) -> list[DiffusionRequest]:
        """One request a label, with consecutive indices. InputError for an unknown label, naming the known ones, and
        for parameters that this model does not allow."""
        if params.cfg_scale != 1 and self.config.null_label is None:
            raise InputError(
                f"this checkpoint has no null class, and cfg-scale {params.cfg_scale:g} needs one; use --cfg-scale 1"
            )
        if params.steps > self.config.diffusion_steps:
            raise InputError(
                f"steps must be at most the {self.config.diffusion_steps} that this checkpoint was trained for, got "
                f"{params.steps}; take fewer"
            )
        numbers = [resolve_label(label, self.classes, self.config.num_classes or 1) for label in labels]
        return [
            DiffusionRequest(stream(seed, start_index + place), number, params) for place, number in enumerate(numbers)
        ]

    def generate(
        self,
        labels: Sequence[int | str],
        *,
        seed: int = 0,
        start_index: int = 0,
        max_images: int | None = None,
        progress: Progress = silent,
        **params: Any,
    ) -> list[Image.Image]:
        """One PIL image a label, in that order, with its provenance in ``.info``. ``params``: `DiffusionParams`'."""
        if isinstance(labels, str) or not len(labels):
            raise InputError(f"expected a list with at least one label, got {labels!r}; name a class for each image")
        requests = self.requests(labels, DiffusionParams(**params), seed, start_index)
        drawn = self.sample(requests, max_images=max_images, progress=progress)
        return [images.to_pil(each.pixels_HWC, each.fields) for each in drawn]

    def sample(
        self, requests: Sequence[DiffusionRequest], *, max_images: int | None = None, progress: Progress = silent
    ) -> Generator[Drawn, None, None]:
        """Each image as it is done, in the order of ``requests``.

        At most ``max_images`` are made together (by default `at_once`); with ``batch_invariant`` always one, so that
        it never changes an image.
        """
        size = 1 if self.batch_invariant else self.at_once if max_images is None else max_images
        if size < 1:
            raise InputError(f"max-images must be at least 1, got {max_images}; leave it out for the default")
        done = 0
        with progress("denoising", sum(request.params.steps for request in requests)) as bar:
            for params, alike in groupby(requests, key=lambda request: request.params):
                process, group = Diffusion(self.config, params.steps, device=self.device), list(alike)
                for first in range(0, len(group), size):
                    batch = group[first : first + size]
                    pixels_BHWC = self._draw(process, params, batch, lambda: bar.advance(len(batch)))  # noqa: B023
                    done += len(batch)
                    bar.advance(0, f"{done} of {len(requests)} images")
                    for request, pixels_HWC in zip(batch, pixels_BHWC, strict=True):
                        fields = provenance.describe(self.origin, request, None, pixels_HWC)
                        yield Drawn(request, pixels_HWC, fields)

    @torch.no_grad()
    def _draw(
        self,
        process: Diffusion,
        params: DiffusionParams,
        batch: Sequence[DiffusionRequest],
        stepped: Callable[[], None],
    ) -> np.ndarray:
        """uint8 [B, H, W, 3] on the host, in one batch; ``stepped`` is called after each step."""
        labels_B = None
        if self.config.num_classes is not None:
            labels_B = torch.tensor([request.label for request in batch], device=self.device)
        model = denoiser(self.model, labels_B, params.cfg_scale)
        # Drawn on the CPU, so that every device begins with the same noise.
        sources = [seeded("image", request.stream.seed, request.index) for request in batch]
        side = self.config.image_size
        x_BCHW = normal((len(batch), 3, side, side), sources, self.device)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        eta = None if params.sampler == "ancestral" else params.eta
        # fp32 is fp32, and the algorithm depends on shapes alone.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for step in trajectory(process, model, x_BCHW, sources, eta=eta):
                x_BCHW = step.x
                stepped()
            return images.to_bytes(x_BCHW)
