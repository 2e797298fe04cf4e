"""``retinar demo``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinar.engine.progress import Progress


@dataclass
class Demo:
    """The whole path in miniature, in under five minutes on two cores: photographs in, new ones and their FID out.

    Example: retinar demo --out retinar-demo
    """

    data: Path | None = None
    """Photographs to use, in OIA-DDR's layout, as class folders, or a CSV; by default phantoms are drawn."""
    out: Path = Path("retinar-demo")
    """Folder for everything the demo makes; run it again to go on where it stopped."""
    size: int = 48
    """Pixels on a side; a multiple of 4. The released recipes use 256."""
    images: int = 48
    """Generated images of each class."""
    seed: int = 0
    """Every random choice follows from it."""
    minutes: float = 5.0
    """Train longer for better pictures, or shorter; about the time on two cores. Under 5 the claims may fail."""

    def run(self, progress: Progress) -> dict[str, object]:
        """Everything that is missing; the summary has the figures, and "passed" for the claims of the demo."""
        from retinar.demo import Plan, demo
        from retinar.engine.errors import InputError

        if self.images < 2:
            raise InputError(f"Expected --images of at least 2 (FID needs two), found {self.images}: ask for more.")
        if self.size < 32 or self.size % 4:
            raise InputError(f"Expected --size as a multiple of 4 from 32 up, found {self.size}: 48 is the default.")
        if not 0.1 <= self.minutes <= 10_000:
            raise InputError(f"Expected --minutes from 0.1 to 10000, found {self.minutes}: 5 is the default.")
        if self.seed < 0:
            raise InputError(f"Expected --seed of at least 0, found {self.seed}: choose another.")
        if self.data is not None and not self.data.exists():
            raise InputError(f"Expected photographs at {self.data}, found nothing: check the path.")
        data = None if self.data is None else str(self.data.resolve())
        plan = Plan(data=data, size=self.size, images=self.images, seed=self.seed, minutes=self.minutes)
        return demo(plan, self.out, progress=progress)

    def render(self, found: Mapping[str, Any]) -> str:
        """The figures, what they say, where everything lies, and what to run next."""
        from retinar import ui

        rows = [
            [
                label,
                f"{row['generated']:.1f}",
                f"{row['random_codes']:.1f}",
                str(row["n_generated"]),
                str(row["n_real"]),
            ]
            for label, row in found["fid"].items()
        ]
        transformer = found["transformer"]
        return "\n".join(
            [
                "",
                *ui.table(["class", "FID", "FID of random codes", "generated", "held out"], rows),
                f"a classifier trained on the real images labels {found['probe']['generated']:.0%} of the generated "
                f"ones as asked ({found['probe']['held_out_real']:.0%} of held-out real ones)",
                "",
                *(f"{'PASS' if held else 'FAIL'}  {claim}" for claim, held in found["passed"].items()),
                "",
                f"sheet        {found['sheet']}",
                f"metrics      {found['metrics']}",
                f"tokenizer    {found['tokenizer']}",
                f"transformer  {transformer}",
                f"{found['seconds']:.0f} s; at so few images FID only ranks, it measures nothing",
                "",
                "next:",
                f"  retinar generate --model {transformer} --label npdr --count 16 --cfg-scale 4 --out more",
                "  retinar demo --data DR_grading --out real-demo      the same on real photographs",
                "  retinar prepare DR_grading prepared                 and in earnest: see README.md",
            ]
        )
