"""retinar generate: images from a checkpoint, a transformer's or a diffusion model's, into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from retinar.engine.progress import Progress

DIFFUSION = ("steps", "sampler", "eta")
"""Options that only a diffusion model knows."""
TRANSFORMER = ("tokenizer", "temperature", "top_k", "top_p", "cfg_interval", "page_size", "pages", "pin")
"""Options that only a transformer knows."""


@dataclass
class Generate:
    """Make images of each label into a folder: images/, manifest.jsonl, sheet.png. Run it again to continue.

    Example: retinar generate --model runs/gpt/model --label healthy --count 64 --seed 0 --cfg-scale 2.0 --out images
    """

    model: Path
    """The transformer or diffusion model: a checkpoint folder, or an upstream file."""
    out: Path
    """The folder to write; one that holds the same run, interrupted, is completed."""
    tokenizer: Path | None = None
    """The tokenizer; by default the tokenizer/ folder inside the checkpoint."""
    config: str | None = None
    """What an upstream file does not show: a size's name (GPT-XL, LSUN-256) or a JSON file."""
    label: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Class names or numbers; repeat the flag or separate by commas. By default every class that the checkpoint
    names.
    """
    count: int = 64
    """Images of each label."""
    seed: int = 0
    """The seed; image number i of a seed is always the same image."""
    start_index: int = 0
    """The number of the first image; another start with the same seed makes other images."""
    cfg_scale: float | None = None
    """Guidance; 1 is none, at half the cost. By default 2 for a transformer, 1.5 for a diffusion model (1 where it was
    trained without a null class).
    """
    temperature: float | None = None
    """Transformer: divides the logits; below 1 draws likelier codes. By default 1."""
    top_k: int | None = None
    """Transformer: draw from the k likeliest codes only; by default off (0)."""
    top_p: float | None = None
    """Transformer: draw from the likeliest codes that make up this probability; by default off (1)."""
    cfg_interval: int | None = None
    """Transformer: guide the first code and decode steps 0 to this one, then no more (faster); by default all (-1)."""
    steps: int | None = None
    """Diffusion model: steps from noise to image, evenly spread over those of the training; by default 50."""
    sampler: Literal["ddim", "ancestral"] | None = None
    """Diffusion model: ancestral (the default) or ddim (deterministic, for well-trained models and few steps)."""
    eta: float | None = None
    """Diffusion model: noise that ddim adds in each step, from 0 (the default: none) to 1."""
    npz: bool = False
    """Also write samples.npz (arr_0, uint8, images x height x width x 3)."""
    dtype: Literal["float32", "bfloat16", "int8", "int8-cache"] | None = None
    """Precision of weights and cache; by default bfloat16 on a GPU and float32 on a CPU. int8 weights, and with
    int8-cache the cache too, are a CPU's: faster than bfloat16, and other images.
    """
    device: str | None = None
    """cpu, cuda or cuda:N; by default the GPU where there is one."""
    gpus: int = 1
    """GPUs to use, from cuda:0, with a process for each; they share the images of one folder."""
    batch_invariant: bool = False
    """Bit-equal images whatever is made beside them, on any number of GPUs; slower. On a CPU it is always so."""
    max_images: int | None = None
    """Images made at the same time (by each process); changes the speed, and with --batch-invariant or on a CPU never
    the images. By default 64 on a GPU and 16 on a CPU (a diffusion model: 32, and on a CPU always 1).
    """
    page_size: int | None = None
    """Transformer: slots of a cache page, a power of two; never changes the images. By default 16."""
    pages: int | None = None
    """Transformer: pages of the cache (of each process); by default as many as needed, within free memory."""
    threads: int | None = None
    """CPU threads; by default torch's choice."""
    pin: bool = False
    """Transformer: bind each of the CPU decoder's threads to a processor; for machines that do nothing else."""

    def run(self, progress: Progress) -> dict[str, object]:
        import torch

        from retinar.bench.baselines.iddpm.checkpoint import is_iddpm
        from retinar.engine.errors import InputError

        if self.count < 1:
            raise InputError(f"count must be at least 1, got {self.count}; ask for some images")
        if self.threads is not None:
            if self.threads < 1:
                raise InputError(f"threads must be at least 1, got {self.threads}; leave it out for the default")
            torch.set_num_threads(self.threads)
        if not self.model.exists():
            raise InputError(f"Expected a checkpoint at {self.model}, found none: check the path.")
        devices = self._devices(torch.cuda.device_count())
        summary = (self._diffusion if is_iddpm(self.model, self.config) else self._transformer)(devices, progress)
        return summary | {"sheet": str(self.out / "sheet.png")}

    def _transformer(self, devices: list[str], progress: Progress) -> dict[str, object]:
        from retinar.engine.generate import generate_folder, make_here
        from retinar.engine.request import SamplingParams
        from retinar.engine.shards import Shards, Source

        self._refuse("a transformer", *DIFFUSION)
        params = self._given("cfg_scale", "temperature", "top_k", "top_p", "cfg_interval")
        # what can be refused is refused before a checkpoint of gigabytes is read
        SamplingParams(**params)
        source = Source(self.model, self.tokenizer, self.config, self.dtype, self.batch_invariant, self.pin)
        sampler = source.load(devices[0])
        return generate_folder(
            sampler,
            self.out,
            self._labels(sampler.classes),
            **params,
            **self._given("max_images", "page_size", "pages"),
            seed=self.seed,
            start_index=self.start_index,
            npz=self.npz,
            model=self.model,
            tokenizer=self.tokenizer,
            config=self.config,
            make=make_here if len(devices) == 1 else Shards(source, devices),
            progress=progress,
        )

    def _diffusion(self, devices: list[str], progress: Progress) -> dict[str, object]:
        from retinar.bench.baselines.iddpm.generate import generate_folder
        from retinar.bench.baselines.iddpm.sampler import DiffusionParams, IDDPMSampler
        from retinar.engine.errors import InputError

        self._refuse("a diffusion model", *TRANSFORMER)
        if len(devices) > 1:
            raise InputError(f"--gpus {self.gpus} is for a transformer's checkpoint; leave it out for {self.model}")
        DiffusionParams(**self._given("cfg_scale", "steps", "sampler", "eta"))
        sampler = IDDPMSampler.from_pretrained(
            self.model, devices[0], self.dtype, config=self.config, batch_invariant=self.batch_invariant
        )
        params = self._given("cfg_scale", "steps", "eta", "max_images")
        if self.sampler is not None:
            params["method"] = self.sampler
        return generate_folder(
            sampler,
            self.out,
            self._labels(sampler.classes),
            **params,
            seed=self.seed,
            start_index=self.start_index,
            npz=self.npz,
            model=self.model,
            config=self.config,
            progress=progress,
        )

    def _given(self, *names: str) -> dict[str, Any]:
        """The options that were given; functions know the defaults of the others."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _refuse(self, kind: str, *names: str) -> None:
        """InputError where an option was given that this kind of checkpoint does not know."""
        from retinar.engine.errors import InputError

        for name in names:
            value = getattr(self, name)
            if value is not None and value is not False:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} means nothing for {kind} such as {self.model}; leave it out")

    def _labels(self, classes: Sequence[str]) -> list[tuple[int | str, int]]:
        """The labels asked for, or all that there are, each with its count."""
        from retinar.engine.errors import InputError

        named = [name.strip() for text in self.label for name in text.split(",") if name.strip()]
        if not named and not classes:
            raise InputError(f"{self.model} names no classes; say which class numbers to make with --label")
        return [(label, self.count) for label in named or classes]

    def _devices(self, there: int) -> list[str]:
        """What --gpus and --device ask for, where there are so many GPUs."""
        from retinar.engine.device import find_device
        from retinar.engine.errors import InputError

        if self.gpus < 1:
            raise InputError(f"gpus must be at least 1, got {self.gpus}; leave it out for one device")
        if self.gpus == 1:
            return [str(find_device(self.device))]
        if self.device not in (None, "cuda"):
            raise InputError(f"--gpus {self.gpus} uses cuda:0 and on, but --device is {self.device}; drop one of them")
        if self.gpus > there:
            raise InputError(f"expected {self.gpus} GPUs, found {there} in this machine; lower --gpus")
        return [f"cuda:{number}" for number in range(self.gpus)]
