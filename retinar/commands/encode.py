"""``retinar encode``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from retinar.engine.progress import Progress


@dataclass
class Encode:
    """Turn prepared photographs and their mirrors into codes, a folder for each split.

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

    layout: Literal["packed", "upstream"] = "packed"
    """packed: one file; upstream: LlamaGen's folders OUT/{split}/{dataset}{size}_codes/ and ..._labels/."""

    dataset: str = "fundus"
    """The name in upstream's folders."""

    device: str = "auto"
    """auto, cpu or cuda. Codes of another device may differ here and there."""

    def run(self, progress: Progress) -> dict[str, object]:
        from retinar.train.codes import encode_folder

        splits = self.splits
        if splits is None:
            splits = ("train", "valid") if (self.data / "valid").is_dir() else ("train",)
        done = {}
        for split in splits:
            meta = encode_folder(
                self.data,
                self.tokenizer,
                self.out / split,
                split,
                self.layout,
                dataset=self.dataset,
                device=self.device,
                progress=progress,
            )
            done[split] = {name: meta[name] for name in ("path", "images", "views", "grid")}
        return {"codes": str(self.out), "splits": done, "tokenizer": str(self.tokenizer)}
