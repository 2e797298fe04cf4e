"""retinar evaluate: how far generated images are from photographs, class by class, and what else there is to know."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from retinar.engine.progress import Progress

if TYPE_CHECKING:
    from retinar.report.parts import Folders

BOOTSTRAP, READING = 200, 40


@dataclass
class Evaluate:
    """Score a folder of images against photographs: FID per class and overall, with counts and the floor.

    Class subfolders of the same name are scored one by one; the output folder of generate is understood. With --report
    everything that the given folders allow is measured and written as a page: memorisation, usefulness, diversity.

    Example: retinar evaluate data/test images --train data/train --valid data/valid --report report
    """

    real: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="REAL")] = None
    """Folder of photographs that no training saw (the test split)."""
    fake: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="FAKE")] = None
    """Folder of images to score; may be left out with --reconstruct."""
    report: Path | None = None
    """Write a report to this folder: report.html, metrics.json, plots and a blinded reading for human graders."""
    train: Path | None = None
    """The training photographs: for memorisation, usefulness, and the floor."""
    valid: Path | None = None
    """The validation photographs: the classifiers of usefulness choose their state and threshold on them."""
    parts: str | None = None
    """What else to measure, separated by commas: diversity, memorisation, usefulness, or none. By default all that the
    folders allow with --report, none without."""
    metrics: str | None = None
    """Which metrics, separated by commas: fid, kid, precision, recall, density, coverage; prdc for the last four, all
    for all. By default all with --report, fid without."""
    mode: Literal["clean", "legacy", "both"] = "clean"
    """How images are resized for Inception: clean-fid's way, or pytorch-fid's (legacy)."""
    bootstrap: int | None = None
    """Draws behind the 95 % intervals of the metrics, 0 for none; by default 200 with --report, none without."""
    inception: Path | None = None
    """A TorchScript file of the Inception network of 2015; by default the installed one."""
    vgg: Path | None = None
    """VGG16's weights for LPIPS (diversity, memorisation, reconstruction); by default those of torch hub's folder."""
    floor: bool = False
    """Also score real against real at the same count: the best that any generator could reach."""
    floor_from: Path | None = None
    """Take the floor's samples from this folder of other photographs (--train by default); implies --floor."""
    reconstruct: Path | None = None
    """A tokenizer: also encode and decode the photographs and score what comes back."""
    run_: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="run", metavar="RUN")] = ()
    """A training run whose losses to draw in the report; may be repeated."""
    reading: int | None = None
    """Images of the report's blinded reading, 0 for none; by default 40."""
    score_reading: Annotated[tuple[Path, Path] | None, tyro.conf.arg(metavar="FORM KEY")] = None
    """Instead of all this, score a filled-in form of a blinded reading against its key."""
    seeds: int = 3
    """Classifiers of each kind for usefulness."""
    network: str | None = None
    """Which torchvision network the classifiers are; by default one that the device affords."""
    steps: int | None = None
    """Training steps of each classifier; by default what the device affords."""
    weights: Path | None = None
    """Weights that the classifiers start from, a torchvision state dict; by default random ones."""
    positive: str | None = None
    """The class that sensitivity speaks of; by default the last by name (npdr)."""
    limit: int | None = None
    """At most this many images a class, for a quick look."""
    batch_size: int = 0
    """Images at a time through Inception; 0 chooses."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default the GPU where there is one."""
    seed: int = 0
    """Draws the samples of the floor, the intervals, the pairs and the reading."""
    save: Path | None = None
    """Also write everything to this JSON file."""

    def run(self, progress: Progress) -> dict[str, object]:
        if self.score_reading is not None:
            from retinar.report.reading_score import score_reading

            return {"reading": score_reading(*self.score_reading)}

        from retinar import ui
        from retinar.engine.checkpoint import digest, load_tokenizer
        from retinar.engine.device import find_device
        from retinar.engine.files import write_json
        from retinar.engine.metrics.evaluation import evaluate_folders
        from retinar.engine.metrics.features import FeatureStore
        from retinar.engine.metrics.inception import load_inception
        from retinar.engine.metrics.reconstruction import evaluate_reconstruction
        from retinar.report import write_report
        from retinar.report.parts import Classifiers, check_classifiers, measure_parts, plan_parts

        # What can be refused is refused before anything long.
        folders, metrics, modes, reading = self.checked()
        device = find_device(self.device)
        reporting = self.report is not None
        draws = self.bootstrap if self.bootstrap is not None else BOOTSTRAP if reporting else 0
        plan = plan_parts(self.parts, folders, report=reporting, vgg=self.vgg, device=device, seeds=self.seeds)
        classifiers = Classifiers(self.seeds, self.network, self.steps, self.weights, self.positive)
        check_classifiers(plan, folders, classifiers, device)
        tokenizer = load_tokenizer(self.reconstruct, device=device) if self.reconstruct is not None else None
        store = FeatureStore(load_inception(self.inception, device), self.batch_size, progress)
        summary: dict[str, Any] = {"real": str(folders.real), "inception": store.inception.describe()}
        if folders.fake is not None:
            summary = evaluate_folders(
                folders.real,
                folders.fake,
                store,
                metrics=metrics,
                modes=modes,
                floor=self.floor or reporting or self.train is not None,
                floor_from=self.floor_from or self.floor_of_train(plan.warnings),
                limit=self.limit,
                seed=self.seed,
                bootstrap=draws,
            ).to_dict()
        if plan.lpips is not None:
            summary["lpips"] = {"sha256": plan.lpips.digest}
        if self.reconstruct is not None and tokenizer is not None:
            unused: dict[Path, str] = {}
            rows = evaluate_reconstruction(
                folders.real,
                tokenizer,
                store,
                lpips=plan.lpips,
                modes=modes,
                limit=self.limit,
                seed=self.seed,
                bootstrap=draws,
                skipped=unused,
                progress=progress,
            )
            known = summary.get("skipped", [])  # of the scores, which do without classes that only one side has
            fresh = [{"file": str(path), "reason": reason} for path, reason in sorted(unused.items())]
            summary["skipped"] = [*known, *(row for row in fresh if row not in known)]
            summary["tokenizer"] = {"path": str(self.reconstruct), "sha256": digest(self.reconstruct)}
            summary["reconstruction"] = [row.to_dict() for row in rows]
        summary |= measure_parts(
            plan,
            folders,
            store,
            classifiers=classifiers,
            device=device,
            limit=self.limit,
            seed=self.seed,
            progress=progress,
        )
        if plan.warnings:
            summary["warnings"] = [*summary.get("warnings", ()), *plan.warnings]
        if self.report is not None:
            page = write_report(
                summary,
                self.report,
                real=folders.real,
                fake=folders.fake,
                train=folders.train,
                tokenizer=tokenizer,
                runs=self.run_,
                reading=reading,
                seed=self.seed,
                command=self.command_line(),
                progress=progress,
            )
            summary["report"] = str(page)
        if self.save is not None:
            write_json(self.save, ui.jsonable(summary))
        return summary

    def checked(self) -> tuple[Folders, list[str], Sequence[str], int]:
        """(folders, metrics, modes, images of the reading). InputError for what cannot be done."""
        from retinar.engine.errors import InputError
        from retinar.engine.metrics.evaluation import check_metrics
        from retinar.engine.metrics.features import resizer
        from retinar.engine.metrics.folders import open_folder
        from retinar.report import check_report_folder
        from retinar.report.parts import Folders
        from retinar.report.reading import check_count
        from retinar.report.run_curves import check_run

        if self.real is None:
            raise InputError("Expected a folder of photographs, found none: give REAL.")
        if self.fake is None and self.reconstruct is None:
            raise InputError("Expected a second folder to score, found none: give FAKE, or --reconstruct TOKENIZER.")
        if self.limit is not None and self.limit < 2:
            raise InputError(f"Expected --limit of at least 2 images, found {self.limit}: leave it out for all.")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"Expected --seed between 0 and 2^63 - 1, found {self.seed}: choose another.")
        if self.bootstrap is not None and (self.bootstrap < 0 or self.bootstrap == 1):
            raise InputError(f"Expected --bootstrap of 2 draws or more, or 0 for none, found {self.bootstrap}: 200 do.")
        if self.batch_size < 0:
            raise InputError(f"Expected --batch-size of at least 1, found {self.batch_size}: leave it out.")
        given = self.metrics if self.metrics is not None else "fid" if self.report is None else "all"
        metrics = check_metrics([name.strip() for name in given.split(",") if name.strip()])
        modes = ("clean", "legacy") if self.mode == "both" else (self.mode,)
        opened = {
            folder: open_folder(folder)
            for folder in (self.real, self.fake, self.train, self.valid, self.floor_from)
            if folder is not None
        }
        for mode in modes:
            resizer(mode)
        if self.save is not None and not self.save.absolute().parent.is_dir():
            raise InputError(f"Expected a folder for --save {self.save}, found none: create {self.save.parent} first.")
        if self.save is not None and self.save.is_dir():
            raise InputError(f"Expected a file for --save, found the folder {self.save}: name a file.")
        reading = 0
        if self.report is not None:
            check_report_folder(self.report, opened)
            for run in self.run_:
                check_run(run)
            if self.fake is not None:
                classes = len(set(opened[self.real].classes) & set(opened[self.fake].classes)) or 1
                reading = max(READING, 2 * classes) if self.reading is None else check_count(self.reading, classes)
        elif self.run_ or self.reading is not None:
            flag = "--run" if self.run_ else "--reading"
            raise InputError(f"Expected --report DIR with {flag}, found none: say where the report goes.")
        return Folders(self.real, self.fake, self.train, self.valid), metrics, modes, reading

    def floor_of_train(self, warnings: list[str]) -> Path | None:
        """--train, unless it lacks a class that is scored: nobody who names it wants fewer figures for that."""
        from retinar.engine.metrics.folders import open_folder

        sides = [
            set(open_folder(folder).classes) for folder in (self.real, self.fake, self.train) if folder is not None
        ]
        if len(sides) < 3 or sides[0] & sides[1] <= sides[2]:
            return self.train
        lacking = ", ".join(sorted(sides[0] & sides[1] - sides[2]))
        warnings.append(f"{self.train} has no subfolder {lacking}: the floor is of {self.real} itself")
        return None

    def command_line(self) -> str:
        """The command that gives this evaluation again."""
        words = ["retinar", "evaluate"]
        for each in fields(self):
            value = getattr(self, each.name)
            default = each.default if each.default is not MISSING else None
            if value == default:
                continue
            flag = "--" + each.name.rstrip("_").replace("_", "-")
            if each.name in ("real", "fake"):
                words.append(str(value))
            elif value is True:
                words.append(flag)
            else:
                for item in value if isinstance(value, tuple) else (value,):
                    words += [flag, str(item)]
        return shlex.join(words)

    def render(self, found: Mapping[str, Any]) -> str:
        """The summary as tables, and below them what limits the figures."""
        from retinar.report.text import reading_lines, report_lines

        return "\n".join(reading_lines(found["reading"]) if "reading" in found else report_lines(found))
