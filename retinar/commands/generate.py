"""retinar generate: images from a checkpoint into a folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from retinar.engine.progress import Progress


@dataclass
class Generate:
    """Make images of each label into a folder: images/, manifest.jsonl, sheet.png. Run it again to continue.

    Example: retinar generate --model runs/gpt/model --label healthy --count 64 --seed 0 --cfg-scale 2.0 --out images
    """

    model: Path
    """The transformer: a checkpoint folder, or an upstream file."""
    out: Path
    """The folder to write; one that holds the same run, interrupted, is completed."""
    tokenizer: Path | None = None
    """The tokenizer; by default the tokenizer/ folder inside the checkpoint."""
    config: str | None = None
    """What an upstream file does not show: a size's name (GPT-XL) or a JSON file."""
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
    cfg_scale: float = 2.0
    """Guidance; 1 or less is none, at half the cost."""
    temperature: float = 1.0
    """Divides the logits; below 1 draws likelier codes."""
    top_k: int = 0
    """Draw from the k likeliest codes only; 0 is off."""
    top_p: float = 1.0
    """Draw from the likeliest codes that make up this probability; 1 is off."""
    cfg_interval: int = -1
    """Guide the first code and decode steps 0 to this one, then no more (faster); -1 guides all."""
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
    the images. By default 64 on a GPU and 16 on a CPU.
    """
    page_size: int = 16
    """Slots of a cache page, a power of two; never changes the images."""
    pages: int | None = None
    """Pages of the cache (of each process); by default as many as needed, within free memory."""
    threads: int | None = None
    """CPU threads; by default torch's choice."""
    pin: bool = False
    """Bind each of the CPU decoder's threads to a processor; for machines that do nothing else."""

    def run(self, progress: Progress) -> dict[str, object]:
        import torch

        from retinar.engine.errors import InputError
        from retinar.engine.generate import generate_folder, make_here
        from retinar.engine.request import SamplingParams
        from retinar.engine.shards import Shards, Source

        if self.count < 1:
            raise InputError(f"count must be at least 1, got {self.count}; ask for some images")
        if self.threads is not None:
            if self.threads < 1:
                raise InputError(f"threads must be at least 1, got {self.threads}; leave it out for the default")
            torch.set_num_threads(self.threads)
        devices = self._devices(torch.cuda.device_count())
        # what can be refused is refused before a checkpoint of gigabytes is read
        SamplingParams(self.cfg_scale, self.temperature, self.top_k, self.top_p, self.cfg_interval)
        source = Source(self.model, self.tokenizer, self.config, self.dtype, self.batch_invariant, self.pin)
        sampler = source.load(devices[0])
        labels = [name.strip() for text in self.label for name in text.split(",") if name.strip()] or list(
            sampler.classes
        )
        if not labels:
            raise InputError(f"{self.model} names no classes; say which class numbers to make with --label")
        summary = generate_folder(
            sampler,
            self.out,
            [(label, self.count) for label in labels],
            seed=self.seed,
            cfg_scale=self.cfg_scale,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            cfg_interval=self.cfg_interval,
            start_index=self.start_index,
            npz=self.npz,
            max_images=self.max_images,
            page_size=self.page_size,
            pages=self.pages,
            model=self.model,
            tokenizer=self.tokenizer,
            config=self.config,
            make=make_here if len(devices) == 1 else Shards(source, devices),
            progress=progress,
        )
        return summary | {"sheet": str(self.out / "sheet.png")}

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
