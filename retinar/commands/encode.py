"""``retinar encode``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from retinar.engine.progress import Progress


@dataclass
class Encode:
    """Turn prepared photographs and their mirrors into codes, a folder for each split. Run it again to continue.

    Example: retinar encode prepared --tokenizer runs/vq/model --out codes
    """

    data: Annotated[Path, tyro.conf.Positional]
    """The folder that `retinar prepare` wrote."""

    tokenizer: Path
    """The tokenizer: our folder, or an upstream file."""

    out: Path
    """Where to write OUT/{split}/codes.npy, labels.npy, meta.json (or upstream's folders)."""

    splits: tuple[str, ...] | None = None
    """Splits to encode; by default train and, if there, valid."""

    views: Literal["mirror", "ten-crop"] = "mirror"
    """mirror: the image and its mirror. ten-crop: the four corners and the centre of the image at --crop-range times
    its size, and of its mirror; for photographs prepared at that size (smaller ones are enlarged).
    """

    crop_range: float = 1.1
    """With ten-crop: the size that crops are cut from, over the size of the codes."""

    layout: Literal["packed", "upstream"] = "packed"
    """packed: one file; upstream: LlamaGen's folders OUT/{split}/{dataset}{size}_codes/ and ..._labels/."""

    dataset: str = "fundus"
    """The name in upstream's folders."""

    device: str = "auto"
    """auto, cpu or cuda. Codes of another device may differ here and there."""

    processes: int = 1
    """Processes on the CPU, which share its threads; the codes are the same for any number. torchrun can start them,
    too, on several machines.
    """

    gpus: int = 1
    """GPUs to use, from cuda:0, with a process for each."""

    def run(self, progress: Progress) -> dict[str, object]:
        from retinar.train.codes import encode_folder
        from retinar.train.world import joined

        devices = self._devices()
        splits = self.splits
        if splits is None:
            splits = ("train", "valid") if (self.data / "valid").is_dir() else ("train",)
        done = {}
        with joined(devices[0] if devices else self.device) as world:
            for split in splits:
                meta = encode_folder(
                    self.data,
                    self.tokenizer,
                    self.out / split,
                    split,
                    self.layout,
                    dataset=self.dataset,
                    views=self.views,
                    crop_range=self.crop_range,
                    devices=devices,
                    world=world,
                    progress=progress,
                )
                done[split] = {name: meta[name] for name in ("path", "images", "views", "grid")}
        return {"codes": str(self.out), "splits": done, "tokenizer": str(self.tokenizer)}

    def _devices(self) -> list[str]:
        """A device for each process to be started here; [] for none."""
        import torch

        from retinar.engine.errors import InputError
        from retinar.train.device import pick_device
        from retinar.train.world import launched

        for name, count in (("processes", self.processes), ("gpus", self.gpus)):
            if count < 1:
                raise InputError(f"Expected --{name} of at least 1, found {count}: leave it out for one.")
        if self.processes == 1 and self.gpus == 1:
            return []
        if launched():
            raise InputError("Expected torchrun or --processes and --gpus, found both: leave out one of them.")
        if self.processes > 1:
            if self.gpus > 1 or pick_device(self.device).type != "cpu":
                raise InputError(
                    f"Expected --processes with --device cpu, found --device {self.device} and --gpus {self.gpus}: "
                    "GPUs have a process each."
                )
            return ["cpu"] * self.processes
        if self.device not in ("auto", "cuda"):
            raise InputError(f"--gpus {self.gpus} uses cuda:0 and on, but --device is {self.device}; drop one of them")
        if self.gpus > (there := torch.cuda.device_count()):
            raise InputError(f"expected {self.gpus} GPUs, found {there} in this machine; lower --gpus")
        return [f"cuda:{number}" for number in range(self.gpus)]
