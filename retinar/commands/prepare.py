"""``retinar prepare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from retinar.engine.progress import Progress


@dataclass
class Prepare:
    """Turn fundus photographs into square PNGs by split and class, with a manifest.

    Example: retinar prepare DR_grading prepared
    """

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder in OIA-DDR's layout, folder of class folders (with or without train/valid/test), or CSV file."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write: {train,valid,test}/{class}/NAME.png, manifest.jsonl, skipped.jsonl, duplicates.jsonl."""

    layout: Literal["auto", "ddr", "folder", "csv"] = "auto"
    """How SRC is arranged; auto looks for grade files, then for a CSV, then for class folders."""

    classes: str | None = None
    """Labels of each class, as "healthy=0 npdr=2,3" (the default for graded sources; else every label is a class)."""

    size: int = 256
    """Pixels on a side."""

    fractions: tuple[float, float, float] = (0.5, 0.2, 0.3)
    """Shares of train, valid and test where SRC has no split; a patient stays on one side."""

    workers: int | None = None
    """Processes; all processors by default. The files do not depend on it."""

    skip_missing: bool = False
    """Go on without listed photographs that do not exist."""

    drop_leaks: bool = False
    """Leave out photographs of patients who are also in a more held-out split (test before valid before train)."""

    def run(self, progress: Progress) -> dict[str, object]:
        """Prepare; returns counts by split and class, and what was skipped, reused or suspicious."""
        from retinar.train.data.prepare import prepare

        return prepare(
            self.src,
            self.out,
            layout=self.layout,
            classes=self.classes,
            size=self.size,
            fractions=self.fractions,
            workers=self.workers,
            skip_missing=self.skip_missing,
            drop_leaks=self.drop_leaks,
            progress=progress,
        )
