"""``retinar convert``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retinar.engine.progress import Progress


@dataclass
class Convert:
    """Convert a LlamaGen file to a folder of ours, or back.

    Example: retinar convert c2i_XL_384.pt xl --config GPT-XL --grid 24
    """

    src: Annotated[Path, tyro.conf.Positional]
    """A LlamaGen .pt or .pth file (transformer or tokenizer), the folder of an FSDP checkpoint, or a folder of ours."""
    dst: Annotated[Path, tyro.conf.Positional]
    """Where to write: a name ending in .pt or .pth gives a LlamaGen file, any other a folder."""
    config: str | None = None
    """A size's name (GPT-XL) or a JSON file (upstream's field names are understood), for files that do not tell."""
    grid: int | None = None
    """Codes per side of an image, for transformer files that do not tell (upstream: image size / downsample size)."""
    ema: bool = False
    """Take the averaged weights of the file."""
    classes: tuple[str, ...] = ()
    """Names of the labels 0, 1, ... for a transformer's folder."""
    tokenizer: Path | None = None
    """A tokenizer (file or folder) to put into a transformer's folder, which then can draw images by itself."""
    discriminator: bool = False
    """Keep a tokenizer's discriminator."""

    def run(self, progress: Progress) -> dict[str, object]:
        from retinar.engine.config import gpt_fields
        from retinar.engine.convert import convert

        config: str | dict[str, object] | None = self.config
        if self.grid is not None:
            config = {**(gpt_fields(self.config) if self.config else {}), "grid": self.grid}
        with progress(f"converting {self.src}", None) as bar:
            summary = convert(
                self.src,
                self.dst,
                config,
                ema=self.ema,
                classes=self.classes,
                tokenizer=self.tokenizer,
                discriminator=self.discriminator,
            )
            bar.advance(note="; ".join(summary["notes"]))
        return summary
