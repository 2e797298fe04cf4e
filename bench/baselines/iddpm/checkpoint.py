"""Checkpoints of iDDPM: our folders (kind "iddpm"), and improved-diffusion's files with the config they belong to.

A folder holds ``config.json``, ``model.safetensors`` with improved-diffusion's keys, and ``README.md``. It is written
as a whole or not at all, and its weights are checked against the digest in ``config.json`` when they are loaded.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retinar import __version__
from retinar.bench.baselines.iddpm.config import IDDPM_SIZES, IDDPMConfig, iddpm_config
from retinar.bench.baselines.iddpm.unet import UNet, load_weights
from retinar.engine import weights as disk
from retinar.engine.checkpoint import FORMAT, OWN_FIELDS, expect_kind, is_folder, is_ours, read_config, verified
from retinar.engine.errors import InputError
from retinar.engine.fields import ConfigSource
from retinar.engine.folders import atomic_folder

KIND = "iddpm"


def is_iddpm(path: Path | str, config: str | None = None) -> bool:
    """Whether ``path`` is to be read by :func:`load_iddpm`: a folder whose config.json says so, or a file whose
    ``config`` names one of its sizes or is a JSON file with its fields. InputError for a folder that is no checkpoint.
    """
    if is_folder(Path(path)):
        return bool(read_config(path)["kind"] == KIND)
    if config is None or config.lower() in {name.lower() for name in IDDPM_SIZES}:
        return config is not None
    if not Path(config).is_file():
        return False
    try:
        return not {"num_channels", "noise_schedule", "diffusion_steps"}.isdisjoint(_stated(Path(config)))
    except ValueError:  # no JSON: whoever reads the file as a config says so
        return False


def _stated(file: Path) -> Mapping[str, Any]:
    """The fields of a JSON file, or of the config in it."""
    value = json.loads(file.read_text(encoding="utf-8"))
    inner = value.get("config", value) if isinstance(value, dict) else {}
    return inner if isinstance(inner, dict) else {}


def load_iddpm(
    path: Path | str,
    config: ConfigSource | IDDPMConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> UNet:
    """The network in a folder of ours, or in a state dict of improved-diffusion's (.pt) with its ``config``, in
    evaluation mode.

    Raises InputError for a file that is missing, damaged, unsafe or another model, and for a .pt file without config.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"Expected a checkpoint at {path}, found none: check the path.")
    if is_folder(path):
        stored = read_config(path)
        expect_kind(path, KIND, stored["kind"])
        if config is not None:
            raise InputError(f"Expected no config with the checkpoint folder {path}, found one: leave it out.")
        settings, weights = iddpm_config(stored["config"]), verified(path, stored, dtype)
    else:
        if config is None:
            raise InputError(
                f"Expected the config of the weights in {path}, found none: give a size ({', '.join(IDDPM_SIZES)}) or "
                "a JSON file."
            )
        settings, weights = iddpm_config(config), _read_public(path)
    model = UNet(settings)
    load_weights(model, weights)
    return model.to(device, dtype).eval()


def _read_public(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(
            f"Expected a state dict in {path}, found something unsafe or damaged: give another."
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"Expected a state dict in {path}, found something else: give improved-diffusion's .pt file.")
    return dict(found)


def save_iddpm(
    folder: Path | str,
    model: UNet,
    *,
    classes: Sequence[str] = (),
    card: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write our folder, atomically; an earlier checkpoint there is replaced.

    ``classes`` names the labels 0, 1, …; ``card`` is the text of README.md (None: a short default); ``extra`` goes into
    config.json. The parameters' dtype is kept. Raises InputError where the folder holds other files, or the names are
    not as many as the classes.
    """
    if classes and (len(set(classes)) != len(classes) or len(classes) != model.config.num_classes):
        raise InputError(
            f"Expected {model.config.num_classes or 'no'} different class names, found {len(classes)} "
            f"({', '.join(classes)}): name each class."
        )
    if clash := set(OWN_FIELDS) & (extra or {}).keys():
        raise ValueError(f"Expected extra keys other than config.json's own, found {sorted(clash)}: rename them.")
    with atomic_folder(folder, is_ours) as partial:
        fields: dict[str, Any] = {
            "format": FORMAT,
            "kind": KIND,
            "retinar": __version__,
            "config": model.config.to_dict(),
            "classes": list(classes),
            "sha256": disk.write_weights(partial, model.state_dict()),
            **(extra or {}),
        }
        text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        (partial / "README.md").write_text(card or _card(model, fields), encoding="utf-8")


def _card(model: UNet, fields: Mapping[str, Any]) -> str:
    config, names = model.config, fields["classes"]
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    label = f"--label {names[0]} " if names else ""
    trained = fields.get("training", {})
    how = f" Recipe {trained['recipe']}, {trained['steps']} steps." if trained else ""
    return (
        "# retinar iddpm\n\n"
        f"A diffusion model (iDDPM) of {config.image_size}x{config.image_size} pixels, {config.diffusion_steps} steps, "
        f"{config.noise_schedule} schedule, variance {config.variance}, {millions:.1f} M parameters.{how}\n\n"
        f"Labels: {', '.join(names) or 'none'}.\n\n"
        f"    retinar generate --model . {label}--count 16 --out images\n\n"
        "What it draws is synthetic and no basis for a diagnosis.\n\n"
        f"Written by retinar {fields['retinar']}. Weights: SHA-256 {fields['sha256']}.\n"
    )
