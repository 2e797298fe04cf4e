"""What the tests of the command line share: a shell in this process, and pictures to feed it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinar import cli


@dataclass(frozen=True)
class World:
    source: Path
    prepared: Path
    tokenizer: Path
    codes: Path
    gpt: Path


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


class Shell:
    """Runs command lines in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *argv: object) -> Said:
        self.capsys.readouterr()
        code = cli.main([str(part) for part in argv])
        told = self.capsys.readouterr()
        return Said(code, told.out, told.err)

    def refused(self, *argv: object, words: str = "") -> str:
        """Run a line that must be refused: exit code 2, one sentence on stderr, no traceback. Returns the sentence."""
        said = self(*argv)
        assert said.code == 2, (said.code, said.out, said.err)
        assert "Traceback" not in said.err and said.out == ""
        assert said.err.startswith("retinar: ") and said.err.count("\n") == 1, said.err
        assert words.lower() in said.err.lower(), said.err
        return said.err


def photograph(path: Path, seed: int) -> None:
    """A smooth 48-pixel picture as JPEG."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize((48, 48), Image.Resampling.BICUBIC).save(path, quality=90)


def write_source(root: Path, per_split: int = 4) -> Path:
    """OIA-DDR's layout with ``per_split`` photographs each of grade 0 and 2."""
    for split_number, split in enumerate(("train", "valid", "test")):
        lines = []
        for index in range(2 * per_split):
            name = f"{split}{index:03d}.jpg"
            photograph(root / split / name, seed=1000 * split_number + index)
            lines.append(f"{name} {0 if index % 2 == 0 else 2}")
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root
