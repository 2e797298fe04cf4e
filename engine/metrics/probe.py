"""A small classifier for a quick question: do generated images look like the class that was asked for?

It is trained in seconds on a CPU and is no diagnostic tool: lesions of an NPDR photograph are small, and whatever else
tells the classes apart (a camera, a source) serves it as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retinar.engine.errors import InputError
from retinar.engine.progress import Progress, silent


class ProbeNet(nn.Module):
    """Three strided convolution blocks; the mean and the maximum over the picture feed one linear layer.

    The maximum keeps a single small lesion visible that the mean would drown.
    """

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 4 * width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=1 if index == 0 else 2, padding=1, bias=False),
                nn.GroupNorm(4, after),
                nn.ReLU(),
            )
            for index, (before, after) in enumerate(pairwise(channels))
        )
        self.head = nn.Linear(2 * channels[-1], classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, classes] of images in [-1, 1]."""
        hidden = images_BCHW
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], dim=1))


@dataclass
class Probe:
    """A trained classifier with the size it looks at."""

    network: ProbeNet
    size: int

    def logits(self, images_BHWC: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """fp32 [n, classes] of uint8 images [n, H, W, 3] of any size, averaged over the image and its mirror."""
        rows = []
        with torch.inference_mode():
            for start in range(0, len(images_BHWC), batch_size):
                images = to_input(images_BHWC[start : start + batch_size], self.size)
                rows.append((self.network(images) + self.network(images.flip(-1))) / 2)
        return torch.cat(rows).numpy() if rows else np.zeros((0, self.network.head.out_features), np.float32)

    def predict(self, images_BHWC: np.ndarray) -> np.ndarray:
        """int64 [n] class numbers."""
        return self.logits(images_BHWC).argmax(axis=1)

    def accuracy(self, images_BHWC: np.ndarray, labels_B: np.ndarray) -> float:
        """Share of the images that it gives their label."""
        return float(np.mean(self.predict(images_BHWC) == np.asarray(labels_B)))


def to_input(images_BHWC: np.ndarray, size: int) -> Tensor:
    """fp32 [B, 3, size, size] in [-1, 1] of uint8 images; area-averaged down to ``size``."""
    images = torch.tensor(images_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    if images.shape[2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return images


def train_probe(
    images_BHWC: np.ndarray,
    labels_B: np.ndarray,
    *,
    size: int = 64,
    steps: int = 150,
    batch_size: int = 32,
    width: int = 16,
    lr: float = 3e-3,
    seed: int = 0,
    progress: Progress = silent,
) -> Probe:
    """Train on uint8 images [n, H, W, 3] and their class numbers 0, 1, ...

    Every batch holds the classes equally often, mirrored, turned, and in part blurred, shifted in brightness and
    noised: generated images are softer than photographs, and the probe should read lesions, not sharpness. The same
    seed gives the same probe on one machine. Raises InputError for unlike lengths or fewer than two classes.
    """
    labels = np.asarray(labels_B, np.int64)
    if len(images_BHWC) != len(labels) or images_BHWC.dtype != np.uint8:
        raise InputError(
            f"Expected uint8 images and as many labels, found {images_BHWC.dtype} {len(images_BHWC)} and {len(labels)}."
        )
    members = [np.flatnonzero(labels == label) for label in range(int(labels.max(initial=-1)) + 1)]
    if len(members) < 2 or min(len(index) for index in members) == 0:
        raise InputError(f"Expected labels 0, 1, ... with images of each, found {np.unique(labels).tolist()}.")
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ProbeNet(len(members), width)
    images_BCHW = to_input(images_BHWC, size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(2, steps))
    with progress("probe classifier", steps) as bar:
        for _ in range(steps):
            index, target = _balanced(members, batch_size, draw)
            loss = F.cross_entropy(network(augment(images_BCHW[index], draw)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.advance(1, f"loss {loss.item():.3f}")
    return Probe(network.eval(), size)


def _balanced(members: list[np.ndarray], batch_size: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    target = torch.arange(batch_size) % len(members)
    position = torch.rand(batch_size, generator=draw)
    index = [members[label][int(where * len(members[label]))] for label, where in zip(target, position, strict=True)]
    return torch.tensor(np.array(index)), target


def augment(images_BCHW: Tensor, draw: torch.Generator) -> Tensor:
    """A view of a batch: turned, mirrored and (one time in two) blurred as a whole, brightness and noise by image."""
    turns, flip, blur = torch.randint(0, 12, (3,), generator=draw).tolist()
    images = torch.rot90(images_BCHW, turns % 4, (2, 3))
    images = images.flip(-1) if flip % 2 else images
    if blur % 2:
        size = images.shape[-1]
        less = max(1, size // 2 if blur % 4 == 1 else size // 3)
        small = F.interpolate(images, (less, less), mode="bilinear", antialias=True, align_corners=False)
        images = F.interpolate(small, (size, size), mode="bilinear", align_corners=False)
    count = len(images)
    gain = 1 + 0.2 * (torch.rand(count, 1, 1, 1, generator=draw) - 0.5)
    shift = 0.2 * (torch.rand(count, 3, 1, 1, generator=draw) - 0.5)
    noise = 0.03 * torch.rand(count, 1, 1, 1, generator=draw) * torch.randn(images.shape, generator=draw)
    return images * gain + shift + noise
