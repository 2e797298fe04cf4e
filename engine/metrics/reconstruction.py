"""What a tokenizer loses: photographs encoded, decoded and compared with themselves.

No image generated through that tokenizer can be expected to be better than this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retinar.engine.errors import InputError
from retinar.engine.images import to_bytes
from retinar.engine.metrics.evaluation import ALL, Score, score_classes
from retinar.engine.metrics.features import FeatureStore
from retinar.engine.metrics.folders import open_folder, read_image, thin
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
    for an image that comes back unchanged); ``codes_used`` the distinct codes seen, of ``codebook_size``;
    ``perplexity`` the exponential of the codes' entropy; ``rfid`` has the mode as its key.
    """

    label: str
    images: int
    l1: float
    psnr: float
    codes_used: int
    codebook_size: int
    perplexity: float
    rfid: dict[str, float]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class Tally:
    """Sums over images; tallies add up."""

    l1: list[float]
    psnr: list[float]
    codes_K: np.ndarray

    @classmethod
    def empty(cls, codebook_size: int) -> Tally:
        return cls([], [], np.zeros(codebook_size, np.int64))

    def add(self, original: np.ndarray, decoded: np.ndarray, codes: np.ndarray) -> None:
        """uint8 [H, W, 3] twice, and the image's codes."""
        error = original.astype(np.float64) - decoded
        mse = max(float(np.mean(error**2)), 255.0**2 * 1e-10)
        self.l1.append(float(np.mean(np.abs(error))) / 255)
        self.psnr.append(float(10 * np.log10(255.0**2 / mse)))
        self.codes_K += np.bincount(codes.ravel(), minlength=len(self.codes_K))

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.l1 + other.l1, self.psnr + other.psnr, self.codes_K + other.codes_K)

    def result(self, label: str, rfid: dict[str, float]) -> Reconstruction:
        share = self.codes_K[self.codes_K > 0] / max(1, self.codes_K.sum())
        return Reconstruction(
            label=label,
            images=len(self.psnr),
            l1=float(np.mean(self.l1)),
            psnr=float(np.mean(self.psnr)),
            codes_used=len(share),
            codebook_size=len(self.codes_K),
            perplexity=float(np.exp(-(share * np.log(share)).sum())),
            rfid=rfid,
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


def evaluate_reconstruction(
    root: Path | str,
    tokenizer: Tokenizer,
    store: FeatureStore | None = None,
    *,
    modes: Sequence[str] = ("clean",),
    limit: int | None = None,
    batch_size: int = 8,
    progress: Progress = silent,
) -> list[Reconstruction]:
    """Figures per class subfolder (if any) and for ALL; rFID where a ``store`` is given.

    rFID compares the decoded images with what the tokenizer was given, so it shows the tokenizer's loss alone.
    Unreadable files are left out (``evaluate_folders`` on the same folder names them). Raises InputError for a folder
    without two readable images.
    """
    folder = open_folder(root)
    classes = folder.classes or {ALL: folder.files}
    tallies: dict[str, Tally] = {}
    features: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {mode: {} for mode in modes}
    for label, files in classes.items():
        files = thin(files, limit)
        tally = tallies[label] = Tally.empty(tokenizer.config.codebook_size)
        parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {mode: [] for mode in modes}
        with progress(f"reconstructions of {folder.root.name}/{label}", len(files)) as bar:
            for originals, count in _batches(files, tokenizer.config.image_size, batch_size):
                if len(originals):
                    decoded, codes = reconstruct(tokenizer, originals)
                    for triple in zip(originals, decoded, codes, strict=True):
                        tally.add(*triple)
                    if store is not None:
                        for mode in modes:
                            parts[mode].append((store.of_arrays(originals, mode), store.of_arrays(decoded, mode)))
                bar.advance(count)
        if len(tally.psnr) < 2:
            raise InputError(
                f"Expected at least 2 readable images in {folder.root}, found {len(tally.psnr)} of {label}."
            )
        for mode in modes if store is not None else ():
            real, fake = zip(*parts[mode], strict=True)
            features[mode][label] = np.concatenate(real), np.concatenate(fake)
    if len(tallies) > 1:
        tallies[ALL] = sum(tallies.values(), Tally.empty(tokenizer.config.codebook_size))
    scores = [score for mode, pairs in features.items() for score in _scores(pairs, mode)]
    return [
        tally.result(label, {score.mode: score.metrics["fid"] for score in scores if score.label == label})
        for label, tally in tallies.items()
    ]


def _scores(pairs: dict[str, tuple[np.ndarray, np.ndarray]], mode: str) -> list[Score]:
    real = {label: pair[0] for label, pair in pairs.items()}
    fake = {label: pair[1] for label, pair in pairs.items()}
    return score_classes(real, fake, mode=mode) if pairs else []


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
