"""Folders of small pictures, and a dictionary of an evaluation with every part, for the tests of the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("healthy", "npdr")
METRICS = ("fid", "kid", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Pictures:
    real: Path
    fake: Path
    train: Path
    run: Path


def picture(path: Path, seed: int, size: int) -> None:
    """A smooth colourful square."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(path)


def write_pictures(root: Path, count: int = 7) -> Pictures:
    """``count`` images a class in real/ (64 px), fake/ (40 px), train/ (48 px), and a run with losses."""
    for number, (side, size) in enumerate((("real", 64), ("fake", 40), ("train", 48))):
        for place, label in enumerate(CLASSES):
            for index in range(count):
                picture(root / side / label / f"{side}{index}.png", 1000 * number + 100 * place + index, size)
    run = root / "run"
    run.mkdir()
    lines = [{"step": step, "loss": 9.0 / step, "lr": 1e-4} for step in range(1, 60)]
    lines[-1]["valid_loss"] = 0.25
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Pictures(root / "real", root / "fake", root / "train", run)


def evaluation(pictures: Pictures, seed: int = 0) -> dict[str, Any]:
    """What ``retinar evaluate --json`` prints, with random figures: no two are alike."""
    rng = np.random.default_rng(seed)

    def span(value: float) -> list[float]:
        return [value - rng.random(), value + rng.random()]

    def figure() -> dict[str, Any]:
        return {"mean": rng.random(), "sd": rng.random(), "interval": span(rng.random())}

    def share(n: int) -> dict[str, Any]:
        return {"n": n, "flagged": 1, "share": rng.random(), "interval": [rng.random(), rng.random()]}

    def measured(name: str, n: int) -> dict[str, Any]:
        sides = {"generated": share(n), "held_out": share(n)}
        return {"measure": name, "threshold": rng.random(), "excess": rng.random(), **sides}

    def rate() -> dict[str, Any]:
        more = {"balanced_accuracy": figure(), "within_sources": figure()}
        return {"auroc": figure(), "accuracy": figure(), "sensitivity_at_95_specificity": figure(), **more}

    counts = dict.fromkeys(CLASSES, 7)
    files = {side: sorted((getattr(pictures, side)).rglob("*.png")) for side in ("real", "fake", "train")}
    return {
        "real": str(pictures.real),
        "fake": str(pictures.fake),
        "inception": {"source": "a stand-in", "sha256": "ab" * 32, "is_2015": True, "device": "cpu"},
        "scores": [
            {
                "label": label,
                "mode": "clean",
                "n_real": count,
                "n_fake": count,
                "metrics": (values := {name: 100 * rng.random() for name in METRICS}),
                "intervals": {name: span(value) for name, value in values.items()},
                "floor": {
                    name: {
                        "mean": rng.random(),
                        "sd": rng.random(),
                        "draws": 10,
                        "n_sample": count,
                        "n_reference": count,
                        "source": str(pictures.train),
                    }
                    for name in METRICS
                },
            }
            for label, count in (*counts.items(), ("all", 14))
        ],
        "diversity": {
            side: [
                {"label": label, "images": 7, "pairs": 21, "mean": rng.random(), "interval": span(rng.random())}
                for label in CLASSES
            ]
            for side in ("real", "fake")
        },
        "tokenizer": {"path": "tokenizer", "sha256": "cd" * 32},
        "reconstruction": [
            {
                "label": label,
                "images": 7,
                "l1": rng.random(),
                "psnr": 30 * rng.random(),
                "ssim": rng.random(),
                "lpips": rng.random(),
                "codes_used": 31,
                "codebook_size": 64,
                "perplexity": 20 * rng.random(),
                "rfid": {"clean": 50 * rng.random()},
                "intervals": {"psnr": span(20.0)},
            }
            for label in CLASSES
        ],
        "memorisation": {
            "train": str(pictures.train),
            "generated": str(pictures.fake),
            "held_out": str(pictures.real),
            "counts": {"train": 14, "generated": 14, "held_out": 14},
            "quantile": 0.01,
            "measures": [
                {
                    **measured(name, 14),
                    "copies": [{"kind": "jpeg-75", "n": 32, "flagged": 31, "share": rng.random()}],
                }
                for name in ("inception", "lpips")
            ],
            "classes": [{"label": label, "measures": [measured("inception", 7)]} for label in CLASSES],
            "exact_copies": 1,
            "leaked": ["/photographs/leaked.png"],
            "distances": {
                name: {side: list(rng.random(14)) for side in ("generated", "held_out")}
                for name in ("inception", "lpips")
            },
            "pairs": [
                {
                    "generated": str(fake),
                    "train": str(train),
                    "mirrored": place == 1,
                    "inception": float(place),
                    "lpips": None,
                    "flagged": place == 0,
                }
                for place, (fake, train) in enumerate(zip(files["fake"], files["train"], strict=True))
            ],
            "held_out_pairs": [],
            "warnings": ["a warning of memorisation"],
        },
        "usefulness": {
            "network": "resnet18",
            "size": 64,
            "seeds": 3,
            "positive": "npdr",
            "differences": [{"row": name, "less": "real", "auroc": figure()} for name in ("synthetic", "both")],
            "sources": {
                "counts": {"eyepacs": {"healthy": 211, "npdr": 212}, "odir": {"healthy": 213, "npdr": 0}},
                "source_alone_auroc": {"mean": rng.random(), "sd": None, "interval": span(0.5)},
            },
            "rows": [
                {
                    "trained_on": name,
                    "n_train": counts,
                    "n_test": counts,
                    **rate(),
                    "operating_point": {"chosen_on": "valid", "sensitivity": figure(), "specificity": figure()},
                    "by_source": [{"source": "eyepacs", "n": counts, "auroc": figure()}],
                }
                for name in ("real", "synthetic", "both")
            ],
            "class_fidelity": [
                {"label": label, "images": 7, "agreement": rng.random(), "interval": span(rng.random())}
                for label in CLASSES
            ],
            "real_agreement": [
                {"label": label, "images": 7, "agreement": rng.random(), "interval": span(rng.random())}
                for label in CLASSES
            ],
            "warnings": ["label and source are tied"],
        },
        "skipped": [{"file": "/photographs/<b onclick=alert(1)>.png", "reason": "cannot identify & read"}],
        "warnings": ["fewer than 2,048 images"],
    }
