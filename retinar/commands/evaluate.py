"""retinar evaluate: how far generated images are from photographs, class by class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from retinar.engine.progress import Progress


@dataclass
class Evaluate:
    """Score a folder of images against photographs: FID per class and overall, with counts and the floor.

    Class subfolders of the same name are scored one by one; the output folder of generate is understood.

    Example: retinar evaluate data/test images --floor-from data/train
    """

    real: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="REAL")]
    """Folder of photographs."""
    fake: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="FAKE")] = None
    """Folder of images to score; may be left out with --reconstruct."""
    metrics: str = "fid"
    """Which metrics, separated by commas."""
    mode: Literal["clean", "legacy", "both"] = "clean"
    """How images are resized for Inception: clean-fid's way, or pytorch-fid's (legacy)."""
    inception: Path | None = None
    """A TorchScript file of the Inception network of 2015; by default the installed one."""
    floor: bool = False
    """Also score real against real at the same count: the best that any generator could reach."""
    floor_from: Path | None = None
    """Take the floor's samples from this folder of other photographs (the train split, say); implies --floor."""
    reconstruct: Path | None = None
    """A tokenizer: also encode and decode the photographs and score what comes back."""
    limit: int | None = None
    """At most this many images a class, for a quick look."""
    batch_size: int = 0
    """Images at a time through Inception; 0 chooses."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default the GPU where there is one."""
    seed: int = 0
    """Draws the samples of the floor."""
    save: Path | None = None
    """Also write everything to this JSON file."""

    def run(self, progress: Progress) -> dict[str, object]:
        from retinar.engine.checkpoint import digest, load_tokenizer
        from retinar.engine.device import find_device
        from retinar.engine.errors import InputError
        from retinar.engine.files import write_json
        from retinar.engine.metrics.evaluation import check_metrics, evaluate_folders
        from retinar.engine.metrics.features import FeatureStore, resizer
        from retinar.engine.metrics.folders import open_folder
        from retinar.engine.metrics.inception import load_inception
        from retinar.engine.metrics.reconstruction import evaluate_reconstruction

        if self.fake is None and self.reconstruct is None:
            raise InputError("Expected a second folder to score, found none: give FAKE, or --reconstruct TOKENIZER.")
        if self.limit is not None and self.limit < 2:
            raise InputError(f"Expected --limit of at least 2 images, found {self.limit}: leave it out for all.")
        if self.batch_size < 0:
            raise InputError(f"Expected --batch-size of at least 1, found {self.batch_size}: leave it out.")
        metrics = check_metrics([name.strip() for name in self.metrics.split(",") if name.strip()])
        modes = ("clean", "legacy") if self.mode == "both" else (self.mode,)
        # What can be refused is refused before anything long.
        for folder in (self.real, self.fake, self.floor_from):
            if folder is not None:
                open_folder(folder)
        for mode in modes:
            resizer(mode)
        if self.save is not None and not self.save.absolute().parent.is_dir():
            raise InputError(f"Expected a folder for --save {self.save}, found none: create {self.save.parent} first.")
        device = find_device(self.device)
        tokenizer = load_tokenizer(self.reconstruct, device=device) if self.reconstruct is not None else None
        store = FeatureStore(load_inception(self.inception, device), self.batch_size, progress)
        summary: dict[str, object] = {}
        if self.fake is not None:
            summary = evaluate_folders(
                self.real,
                self.fake,
                store,
                metrics=metrics,
                modes=modes,
                floor=self.floor,
                floor_from=self.floor_from,
                limit=self.limit,
                seed=self.seed,
            ).to_dict()
        if self.reconstruct is not None and tokenizer is not None:
            found = evaluate_reconstruction(
                self.real, tokenizer, store, modes=modes, limit=self.limit, progress=progress
            )
            summary |= {"real": str(self.real), "inception": store.inception.describe()}
            summary["tokenizer"] = {"path": str(self.reconstruct), "sha256": digest(self.reconstruct)}
            summary["reconstruction"] = [each.to_dict() for each in found]
        if self.save is not None:
            write_json(self.save, summary)
        return summary

    def render(self, found: Mapping[str, Any]) -> str:
        """The summary as tables, and below them what limits the figures."""
        return "\n".join(report_lines(found))


def report_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Tables of an evaluation's dictionary (what ``--json`` prints)."""
    from retinar import ui

    if found.get("scores"):
        yield f"real {found['real']}, scored {found['fake']}"
        names = list(found["scores"][0]["metrics"])
        floors = any(score["floor"] for score in found["scores"])
        header = ["class", "mode", "real", "scored"]
        for name in names:
            header += [name.upper(), "floor (real against real)"] if floors else [name.upper()]
        rows = []
        for score in found["scores"]:
            cells = [score["label"], score["mode"], str(score["n_real"]), str(score["n_fake"])]
            for name in names:
                cells.append(f"{score['metrics'][name]:.2f}")
                if floors:
                    cells.append(floor_text(score["floor"][name]))
            rows.append(cells)
        yield from ui.table(header, rows)
    if found.get("reconstruction"):
        modes = list(found["reconstruction"][0]["rfid"])
        yield f"{found['real']} through the tokenizer {found['tokenizer']['path']}"
        yield from ui.table(
            ["class", "images", "PSNR dB", "L1", "codes used", "perplexity", *(f"rFID {mode}" for mode in modes)],
            [
                [
                    row["label"],
                    str(row["images"]),
                    f"{row['psnr']:.2f}",
                    f"{row['l1']:.4f}",
                    f"{row['codes_used']} of {row['codebook_size']}",
                    f"{row['perplexity']:.0f}",
                    *(f"{row['rfid'][mode]:.2f}" for mode in modes),
                ]
                for row in found["reconstruction"]
            ],
        )
    yield f"Inception: {found['inception']['source']}, SHA-256 {found['inception']['sha256'][:12]}"
    for warning in found.get("warnings", ()):
        yield f"note: {warning}"
    for skipped in found.get("skipped", ())[:10]:
        yield f"left out: {skipped['file']}: {skipped['reason']}"
    if len(found.get("skipped", ())) > 10:
        yield f"left out: {len(found['skipped']) - 10} more (--json lists them)"


def floor_text(floor: Mapping[str, Any]) -> str:
    """Mean and deviation of a floor, with its counts."""
    spread = f" ± {floor['sd']:.2f}" if floor["sd"] is not None else ""
    return f"{floor['mean']:.2f}{spread} ({floor['draws']} x {floor['n_sample']} against {floor['n_reference']})"
