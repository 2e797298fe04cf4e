"""LPIPS with VGG16 (Zhang et al., 2018): the network of the package ``lpips``, its weights from a file."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from retinar.engine.errors import InputError
from retinar.engine.files import sha256_file
from retinar.engine.torchvision_shim import import_torchvision

_CONVOLUTIONS = {
    "slice1": (0, 2),
    "slice2": (5, 7),
    "slice3": (10, 12, 14),
    "slice4": (17, 19, 21),
    "slice5": (24, 26, 28),
}
"""VGG16's convolutions by the slices of ``lpips``; the numbers are those of torchvision's ``features``."""
TORCHVISION_FILE = "vgg16-397923af.pth"
GIVE_IT = "give VGG16's weights with --vgg PATH"


class LPIPS(nn.Module):
    """Distances between images as VGG16 sees them, version 0.1 of ``lpips``.

    The network is frozen and runs in ``dtype``; distances between its normalised features are taken in fp32.
    ``digest`` is the SHA-256 of the weight file. ``advice`` ends the sentences about weights that are missing.
    """

    def __init__(
        self, weights: Path | str | None, *, dtype: torch.dtype = torch.float32, advice: str = GIVE_IT
    ) -> None:
        super().__init__()
        if weights is None:
            raise InputError(f"Expected VGG16's weights for the perceptual distance, found none: {advice}.")
        vgg = read_vgg16(weights, advice)
        self.digest = sha256_file(weights)
        network = _lpips(vgg)
        network.net.to(dtype).to(memory_format=torch.channels_last)
        self.network: Any = network.requires_grad_(False).eval()  # lpips knows no types
        self.dtype = dtype

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in evaluation mode: there is nothing to train, and the heads' dropout must not run."""
        return super().train(False)

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """:meth:`distances`."""
        return self.distances(a_BCHW, b_BCHW)

    def distances(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """fp32 [B, 3, H, W] twice, in [-1, 1], H and W at least 16 -> fp32 [B]."""
        return self.between(self.features(a_BCHW), self.features(b_BCHW))

    def features(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Five fp32 maps [B, C, h, w] of unit length over the channels: what :meth:`between` compares."""
        with torch.autocast(images_BCHW.device.type, enabled=False):
            scaled = self.network.scaling_layer(images_BCHW.float())
            # channels_last: twice as fast in oneDNN, and what tensor cores want
            maps = self.network.net(scaled.to(self.dtype, memory_format=torch.channels_last))
            return tuple(_normalised(each) for each in maps)

    def between(self, features_a: Sequence[Tensor], features_b: Sequence[Tensor]) -> Tensor:
        """fp32 [B] from the features of two batches; one of a single image stands for as many as the other has."""
        total: Tensor | None = None
        with torch.autocast(features_a[0].device.type, enabled=False):
            for head, a_BCHW, b_BCHW in zip(self.network.lins, features_a, features_b, strict=True):
                distance_B = head((a_BCHW.float() - b_BCHW.float()).square()).mean(dim=(1, 2, 3))
                total = distance_B if total is None else total + distance_B
        assert total is not None
        return total

    def vectors(self, images_BCHW: Tensor) -> Tensor:
        """fp32 [B, D] whose squared Euclidean distances are :meth:`distances`, so that a search is a matrix product.

        The heads' weights are not negative, and a mean over pixels is a sum with one more factor. D is 499,712 at
        64 x 64 pixels and grows with their number.
        """
        parts = []
        for head, map_BCHW in zip(self.network.lins, self.features(images_BCHW), strict=True):
            weights_C = head.model[-1].weight.flatten() / (map_BCHW.shape[2] * map_BCHW.shape[3])
            parts.append((map_BCHW * weights_C.sqrt()[:, None, None]).flatten(1))
        return torch.cat(parts, dim=1)


def find_vgg16(path: Path | str | None = None) -> Path | None:
    """The file of VGG16's weights: ``path`` where given, else torchvision's own in torch hub's folder, else None.

    Nothing is downloaded. InputError for a ``path`` without a file.
    """
    if path is not None:
        if not Path(path).is_file():
            raise InputError(f"Expected VGG16's weights in {path}, found no file: check --vgg.")
        return Path(path)
    found = Path(torch.hub.get_dir()) / "checkpoints" / TORCHVISION_FILE
    return found if found.is_file() else None


def read_vgg16(path: Path | str, advice: str = GIVE_IT) -> dict[str, Tensor]:
    """VGG16's convolutional weights by torchvision's names, fp32.

    ``path``: safetensors with ``features.N.weight`` and ``.bias``, or torchvision's own state dict
    (``vgg16-397923af.pth``). InputError where the file is missing, damaged, or another network's.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"Expected VGG16's weights in {path}, found no file: {advice}.")
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    # torch's reader takes the letters of a text for its commands: KeyError, IndexError
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        raise InputError(f"Expected VGG16's weights in {path}, found a damaged or another file: {advice}.") from error
    wanted: dict[str, tuple[int, ...]] = {}
    width_in, widths = 3, (64, 128, 256, 512, 512)
    for numbers, width in zip(_CONVOLUTIONS.values(), widths, strict=True):
        for number in numbers:
            wanted[f"features.{number}.weight"] = (width, width_in, 3, 3)
            wanted[f"features.{number}.bias"] = (width,)
            width_in = width
    for name, shape in wanted.items():
        found = weights.get(name) if isinstance(weights, dict) else None
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            what = f"shape {list(found.shape)}" if isinstance(found, Tensor) else "nothing"
            raise InputError(f"Expected {name} {list(shape)} in {path}, found {what}: give VGG16's weights.")
    return {name: weights[name].float() for name in wanted}


def _normalised(features_BCHW: Tensor) -> Tensor:
    """Unit length over the channels, in fp32; 1e-10 is ``lpips``'s.

    The clamp changes no value: it keeps the root's gradient finite where no filter fires (``lpips`` gives NaN there).
    """
    features_BCHW = features_BCHW.float()
    length_B1HW = features_BCHW.square().sum(dim=1, keepdim=True).clamp_min(1e-20).sqrt()
    return features_BCHW / (length_B1HW + 1e-10)


def _lpips(vgg: dict[str, Tensor]) -> Any:
    """``lpips.LPIPS`` with its own linear heads and this trunk; nothing printed, no random numbers used up.

    Built without memory and filled afterwards: ``lpips`` would draw all of VGG16 first, a classifier of 124 million
    weights included, and throw it away.
    """
    try:
        import_torchvision()
        import lpips
    except ImportError as error:
        raise InputError(
            f"Expected the package lpips for the perceptual distance, found {error}: pip install 'retinar[metrics]'."
        ) from None
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False)
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    weights = torch.load(heads, map_location="cpu", weights_only=True)
    for slice_name, numbers in _CONVOLUTIONS.items():
        for number in numbers:
            for kind in ("weight", "bias"):
                weights[f"net.{slice_name}.{number}.{kind}"] = vgg[f"features.{number}.{kind}"]
    network.load_state_dict(weights, strict=False, assign=True)
    if empty := [name for name, tensor in network.state_dict().items() if tensor.is_meta]:
        raise RuntimeError(f"this version of lpips has other weights: {', '.join(empty)}")
    return network
