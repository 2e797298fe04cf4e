"""retinar reproduce: make an image again from its own provenance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retinar.engine.progress import Progress


@dataclass
class Reproduce:
    """Make a generated image again from what its file says, and compare the two.

    Example: retinar reproduce images/healthy/000000.png --model runs/gpt/model
    """

    file: Annotated[Path, tyro.conf.Positional]
    """A PNG that retinar generate wrote."""
    model: Path | None = None
    """The checkpoint; by default the one named in the run.json of the image's folder."""
    tokenizer: Path | None = None
    """The tokenizer; by default the one of that run, or inside the checkpoint."""

    config: str | None = None
    """For upstream files: the size's name or JSON file that generate was given."""

    def run(self, progress: Progress) -> dict[str, object]:
        from retinar.bench.baselines.iddpm import generate as diffusion
        from retinar.engine.errors import InputError
        from retinar.engine.reproduce import reproduce

        if not diffusion.made_by_iddpm(self.file):
            return reproduce(self.file, self.model, self.tokenizer, self.config, progress)
        if self.tokenizer is not None:
            raise InputError(f"{self.file} was made by a diffusion model, without a tokenizer; leave out --tokenizer")
        return diffusion.reproduce(self.file, self.model, self.config, progress)
