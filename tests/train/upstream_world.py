"""What the tests of the drop-in entry points share: photographs in class folders, a tokenizer of 8 pixels a code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from retinar.engine.checkpoint import file_weights
from retinar.engine.config import TokenizerConfig
from retinar.engine.tokenizer import VQTokenizer
from tests.train.pictures import draw

SIZE, GRID = 32, 4
TOKENIZER = TokenizerConfig(
    ch=8,
    ch_mult=(1, 1, 1, 2),
    z_channels=16,
    codebook_size=32,
    codebook_embed_dim=8,
    image_size=SIZE,
    num_res_blocks=1,
    attention=False,
)


def write_photographs(root: Path) -> Path:
    """Seven of three classes, not square, in the order of torchvision's ImageFolder: B/x.PNG, a/1.png, a/2.jpg, ..."""
    names = ("B/x.PNG", "a/1.png", "a/2.jpg", "a/deep/0.png", "a/deep/9.bmp", "c/0.png", "c/1.png")
    for seed, name in enumerate(names):
        pixels = draw(seed, 40 + 8 * seed)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[: len(pixels) - 3 * seed]).save(root / name, format="PNG")
    (root / "a" / "notes.txt").write_text("no photograph")
    return root


def write_tokenizer(path: Path, **others: object) -> VQTokenizer:
    """A LlamaGen file with {model} alone, as the published ones, and what ``others`` says."""
    torch.manual_seed(0)
    model = VQTokenizer(TOKENIZER).eval()
    torch.save({"model": file_weights(model), **others}, path)
    return model


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """The pixels of a folder's PNG files."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found[path.name] = np.array(image)
    return found
