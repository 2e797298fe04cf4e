"""What a tokenizer loses: photographs encoded, decoded and compared with themselves.

No image generated through that tokenizer can be expected to be better than this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retinar.engine.errors import InputError
from retinar.engine.images import to_bytes
from retinar.engine.metrics.bootstrap import NORMAL
from retinar.engine.metrics.features import FeatureStore
from retinar.engine.metrics.folders import open_folder, read_image, thin
from retinar.engine.metrics.scores import ALL, Score, score_classes
from retinar.engine.metrics.screening import usable
from retinar.engine.metrics.ssim import ssim
from retinar.engine.perceptual import LPIPS
from retinar.engine.progress import Progress, silent


class Tokenizer(Protocol):
    """The part of VQTokenizer used here (``config`` has image_size and codebook_size)."""

    config: Any

    def encode(self, images_BCHW: Tensor) -> Tensor: ...

    def decode(self, codes_Bhw: Tensor) -> Tensor: ...


@dataclass
class Reconstruction:
    """Figures of one class, or of ALL: on 8-bit pixels of the size that the tokenizer works at.

    ``l1`` is the mean absolute error with pixels in 0 to 1; ``psnr`` the mean over images in dB (peak 255, at most 100
    for an image that comes back unchanged); ``ssim`` the mean over images (None where they are smaller than its
    window); ``lpips`` the mean over images, None where it was not asked for; ``codes_used`` the distinct codes seen, of
    ``codebook_size``; ``perplexity`` the exponential of the codes' entropy; ``rfid`` has the mode as its key.
    ``intervals`` holds 95 % intervals of l1, psnr, ssim and lpips (normal, over the images) and, where they were asked
    for, of rFID as "rfid MODE".
    """

    label: str
    images: int
    l1: float
    psnr: float
    codes_used: int
    codebook_size: int
    perplexity: float
    rfid: dict[str, float]
    ssim: float | None = None
    lpips: float | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class Tally:
    """Figures of each image, and how often each code was seen; tallies add up."""

    images: dict[str, list[float]]
    codes_K: np.ndarray

    @classmethod
    def empty(cls, codebook_size: int) -> Tally:
        return cls({"l1": [], "psnr": []}, np.zeros(codebook_size, np.int64))

    def __len__(self) -> int:
        return len(self.images["psnr"])

    def add(self, original: np.ndarray, decoded: np.ndarray, codes: np.ndarray) -> None:
        """uint8 [H, W, 3] twice, and the image's codes."""
        error = original.astype(np.float64) - decoded
        mse = max(float(np.mean(error**2)), 255.0**2 * 1e-10)
        self.images["l1"].append(float(np.mean(np.abs(error))) / 255)
        self.images["psnr"].append(float(10 * np.log10(255.0**2 / mse)))
        if (similarity := ssim(original, decoded)) is not None:
            self.images.setdefault("ssim", []).append(similarity)
        self.codes_K += np.bincount(codes.ravel(), minlength=len(self.codes_K))

    def add_lpips(self, distances: Sequence[float]) -> None:
        """LPIPS of images that are counted by :meth:`add`."""
        self.images.setdefault("lpips", []).extend(distances)

    def __add__(self, other: Tally) -> Tally:
        names = dict.fromkeys([*self.images, *other.images])
        images = {name: self.images.get(name, []) + other.images.get(name, []) for name in names}
        return Tally(images, self.codes_K + other.codes_K)

    def result(
        self, label: str, rfid: dict[str, float], intervals: Mapping[str, tuple[float, float]] | None = None
    ) -> Reconstruction:
        share = self.codes_K[self.codes_K > 0] / max(1, self.codes_K.sum())
        means = {name: float(np.mean(values)) for name, values in self.images.items()}
        spans = {}
        for name, values in self.images.items():
            if len(values) > 1:
                half = NORMAL * float(np.std(values, ddof=1)) / len(values) ** 0.5
                spans[name] = (means[name] - half, means[name] + half)
        return Reconstruction(
            label=label,
            images=len(self),
            l1=means["l1"],
            psnr=means["psnr"],
            codes_used=len(share),
            codebook_size=len(self.codes_K),
            perplexity=float(np.exp(-(share * np.log(share)).sum())),
            rfid=rfid,
            ssim=means.get("ssim"),
            lpips=means.get("lpips"),
            intervals=spans | dict(intervals or {}),
        )


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """The largest centred square, bilinear to size x size, as ``retinar prepare`` does it; nothing if it fits."""
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))


def reconstruct(tokenizer: Tokenizer, images_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(decoded uint8 [B, H, W, 3], codes [B, h, w]) of uint8 images of the tokenizer's size."""
    parameter = next(iter(getattr(tokenizer, "parameters", lambda: iter(()))()), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    images_BCHW = torch.tensor(images_BHWC).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        codes_Bhw = tokenizer.encode(images_BCHW)
        decoded_BCHW = tokenizer.decode(codes_Bhw)
    return np.stack([to_bytes(image) for image in decoded_BCHW]), codes_Bhw.cpu().numpy()


def perceptual_distances(lpips: LPIPS, a_BHWC: np.ndarray, b_BHWC: np.ndarray) -> list[float]:
    """LPIPS of each pair of uint8 images [B, H, W, 3]."""
    device = next(lpips.parameters()).device
    sides = (torch.tensor(each).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1 for each in (a_BHWC, b_BHWC))
    with torch.inference_mode():
        found: list[float] = lpips.distances(*sides).tolist()
    return found


def evaluate_reconstruction(
    root: Path | str,
    tokenizer: Tokenizer,
    store: FeatureStore | None = None,
    *,
    lpips: LPIPS | None = None,
    modes: Sequence[str] = ("clean",),
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    bootstrap: int = 0,
    skipped: dict[Path, str] | None = None,
    progress: Progress = silent,
) -> list[Reconstruction]:
    """Figures per class subfolder (if any) and for ALL; rFID where a ``store`` is given, LPIPS where that is.

    rFID compares the decoded images with what the tokenizer was given, so it shows the tokenizer's loss alone; its
    interval rests on ``bootstrap`` half samples of the pairs (none where 0). Files that cannot be read and images of
    another kind (see ``screen``) are left out, and put into ``skipped`` with their reasons. Raises InputError for a
    folder without two readable images.
    """
    folder = open_folder(root)
    found = folder.classes or {ALL: folder.files}
    classes = usable({label: thin(files, limit) for label, files in found.items()}, folder.root, skipped)
    tallies: dict[str, Tally] = {}
    features: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {mode: {} for mode in modes}
    for label, files in classes.items():
        tally = tallies[label] = Tally.empty(tokenizer.config.codebook_size)
        parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {mode: [] for mode in modes}
        with progress(f"reconstructions of {folder.root.name}/{label}", len(files)) as bar:
            for originals, count in _batches(files, tokenizer.config.image_size, batch_size):
                if len(originals):
                    decoded, codes = reconstruct(tokenizer, originals)
                    for triple in zip(originals, decoded, codes, strict=True):
                        tally.add(*triple)
                    if lpips is not None:
                        tally.add_lpips(perceptual_distances(lpips, originals, decoded))
                    if store is not None:
                        for mode in modes:
                            parts[mode].append((store.of_arrays(originals, mode), store.of_arrays(decoded, mode)))
                bar.advance(count)
        if len(tally) < 2:
            raise InputError(
                f"Expected at least 2 readable images in {folder.root}, found {len(tally)} of {label}: add images."
            )
        for mode in modes if store is not None else ():
            real, fake = zip(*parts[mode], strict=True)
            features[mode][label] = np.concatenate(real), np.concatenate(fake)
    if len(tallies) > 1:
        tallies[ALL] = sum(tallies.values(), Tally.empty(tokenizer.config.codebook_size))
    scores: dict[str, list[Score]] = {}
    for mode, pairs in features.items():
        for score in _scores(pairs, mode, seed, bootstrap, progress):
            scores.setdefault(score.label, []).append(score)
    return [_result(tally, label, scores.get(label, ())) for label, tally in tallies.items()]


def _result(tally: Tally, label: str, scores: Sequence[Score]) -> Reconstruction:
    intervals = {f"rfid {score.mode}": score.intervals["fid"] for score in scores if score.intervals}
    return tally.result(label, {score.mode: score.metrics["fid"] for score in scores}, intervals)


def _scores(
    pairs: dict[str, tuple[np.ndarray, np.ndarray]], mode: str, seed: int, bootstrap: int, progress: Progress
) -> list[Score]:
    real = {label: pair[0] for label, pair in pairs.items()}
    fake = {label: pair[1] for label, pair in pairs.items()}
    if not pairs:
        return []
    return score_classes(real, fake, mode=mode, seed=seed, bootstrap=bootstrap, paired=True, progress=progress)


def _batches(files: Sequence[Path], size: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(uint8 [B, size, size, 3] of the readable ones, files looked at)."""
    for start in range(0, len(files), batch_size):
        chunk = files[start : start + batch_size]
        images = []
        for path in chunk:
            try:
                images.append(fit(read_image(path), size))
            except Exception:  # as in features: one bad file costs one file
                continue
        yield np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8), len(chunk)
