"""Checkpoints: our folders, and upstream's files read in place.

A folder holds ``config.json``, ``model.safetensors`` (or shards with an index) in upstream's key layout, ``README.md``,
and for a transformer, if given, its tokenizer's complete folder as ``tokenizer/``. It is written as a whole or not at
all, and its weights are checked against the digest in ``config.json`` when they are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from retinar import __version__
from retinar.engine import weights as disk
from retinar.engine.card import model_card
from retinar.engine.config import (
    ConfigSource,
    GPTConfig,
    TokenizerConfig,
    gpt_config,
    gpt_fields,
    tokenizer_config,
    tokenizer_fields,
)
from retinar.engine.errors import InputError
from retinar.engine.files import sha256_file
from retinar.engine.fit import fill
from retinar.engine.folders import atomic_folder
from retinar.engine.infer import infer_gpt_config, infer_tokenizer_config
from retinar.engine.model import GPT
from retinar.engine.tokenizer import VQTokenizer
from retinar.engine.upstream import (
    CONSOLIDATED,
    clean_keys,
    kind_of,
    read_upstream,
    to_upstream_state_dict,
)

FORMAT = 1
KINDS = ("gpt", "tokenizer", "iddpm")
OWN_FIELDS = ("format", "kind", "retinar", "config", "sha256", "classes")
"""The keys of config.json that save_gpt and save_tokenizer write; others are the caller's (``extra``)."""
_WINDOW = "quantize.codebook_used"

Model = TypeVar("Model", GPT, VQTokenizer)


def load_gpt(
    path: Path | str,
    config: ConfigSource | GPTConfig | None = None,
    ema: bool = False,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> GPT:
    """A transformer from our folder or any file of upstream's, in evaluation mode.

    ``config``: a size's name, a dict, a JSON file or a GPTConfig; upstream's names are understood. What it leaves open
    comes from the folder, or from the file's shapes and flags. ``ema``: the averaged weights of an upstream file.
    ``dtype`` None keeps the stored one. Raises InputError for a file that is missing, damaged, unsafe or another model.
    """
    path = Path(path)
    if is_folder(path):
        stored = _folder(path, "gpt", ema)
        settings = gpt_config({**stored["config"], **_stated(config, gpt_fields)})
        weights = verified(path, stored, dtype)
    else:
        file = read_upstream(path, ema=ema)
        expect_kind(path, "gpt", kind_of(file.weights))
        config = file.config if config is None else config
        settings = infer_gpt_config(config, to_upstream_state_dict(file.weights), file.args, str(path))
        weights = {key: _cast(key, tensor, dtype) for key, tensor in file.weights.items()}
    model = _build(GPT, settings, weights, path)
    fill(model, weights, path)
    return model.to(device).eval()


def load_tokenizer(
    path: Path | str,
    config: ConfigSource | TokenizerConfig | None = None,
    ema: bool = False,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> VQTokenizer:
    """A tokenizer; arguments and errors as in :func:`load_gpt`. A transformer's folder gives the one inside it."""
    path = Path(path)
    if is_folder(path) and is_folder(path / "tokenizer") and read_config(path)["kind"] == "gpt":
        path = path / "tokenizer"
    if is_folder(path):
        stored = _folder(path, "tokenizer", ema)
        settings = tokenizer_config({**stored["config"], **_stated(config, tokenizer_fields)})
        weights = verified(path, stored, dtype)
    else:
        file = read_upstream(path, ema=ema)
        expect_kind(path, "tokenizer", kind_of(file.weights))
        config = file.config if config is None else config
        settings = infer_tokenizer_config(config, file.weights, file.args, str(path))
        weights = {key: _cast(key, tensor, dtype) for key, tensor in file.weights.items()}
    model = _build(VQTokenizer, settings, weights, path)
    # Files written without usage tracking have no window: it starts empty.
    weights.setdefault(_WINDOW, torch.zeros(model.quantize.codebook_used.shape, dtype=torch.int32))
    fill(model, weights, path)
    return model.to(device).eval()


def save_gpt(
    folder: Path | str,
    model: GPT,
    *,
    classes: Sequence[str] = (),
    tokenizer: VQTokenizer | None = None,
    card: str | None = None,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = disk.MAX_SHARD_BYTES,
) -> None:
    """Write our folder, atomically; an earlier checkpoint there is replaced.

    ``classes`` names the labels 0, 1, …; ``card`` is the text of README.md (None: a short default); ``extra`` goes into
    config.json. The parameters' dtype is kept. Raises InputError where the folder holds other files.
    """
    if classes and len(classes) != model.config.num_classes:
        raise InputError(
            f"Expected {model.config.num_classes} class names, found {len(classes)} ({', '.join(classes)}): name each."
        )
    if len(set(classes)) != len(classes):
        raise InputError(f"Expected a different name for each class, found {', '.join(classes)}: rename one.")
    if tokenizer is not None and tokenizer.config.codebook_size != model.config.vocab_size:
        raise InputError(
            f"Expected a tokenizer of {model.config.vocab_size} codes, found one of {tokenizer.config.codebook_size}: "
            "give the one that the transformer was trained with."
        )
    with atomic_folder(folder, is_ours) as partial:
        write_folder(partial, model, classes=classes, card=card, extra=extra, max_shard_bytes=max_shard_bytes)
        if tokenizer is not None:
            write_folder(partial / "tokenizer", tokenizer)


def save_tokenizer(
    folder: Path | str,
    model: VQTokenizer,
    *,
    card: str | None = None,
    extra: Mapping[str, Any] | None = None,
    discriminator: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a tokenizer's folder, as :func:`save_gpt`; a PatchGAN's weights go into discriminator.safetensors."""
    with atomic_folder(folder, is_ours) as partial:
        write_folder(partial, model, card=card, extra=extra)
        if discriminator:
            disk.write_file(partial / disk.DISCRIMINATOR, discriminator)


def write_folder(
    folder: Path,
    model: GPT | VQTokenizer,
    *,
    classes: Sequence[str] = (),
    card: str | None = None,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = disk.MAX_SHARD_BYTES,
) -> None:
    """The files of one checkpoint, into a folder that nobody reads yet (save_gpt and save_tokenizer are atomic)."""
    folder.mkdir(exist_ok=True)
    if clash := set(OWN_FIELDS) & (extra or {}).keys():
        raise ValueError(f"Expected extra keys other than config.json's own, found {sorted(clash)}: rename them.")
    fields: dict[str, Any] = {
        "format": FORMAT,
        "kind": "gpt" if isinstance(model, GPT) else "tokenizer",
        "retinar": __version__,
        "config": model.config.to_dict(),
        **({"classes": list(classes)} if isinstance(model, GPT) else {}),
        "sha256": disk.write_weights(folder, file_weights(model), max_shard_bytes),
        **(extra or {}),
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card or model_card(model, fields), encoding="utf-8")


def file_weights(model: GPT | VQTokenizer) -> dict[str, Tensor]:
    """The weights as files hold them: upstream's layout and dtypes."""
    result = to_upstream_state_dict(model.state_dict())
    if _WINDOW in result:
        result[_WINDOW] = result[_WINDOW].float()
    return result


def read_config(path: Path | str) -> dict[str, Any]:
    """``config.json`` of our folder. Raises InputError where there is none, or none of ours."""
    file = Path(path) / "config.json"
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"Expected a checkpoint folder at {path}, found no config.json: {_hint(path)}.") from None
    except ValueError:
        raise InputError(f"Expected JSON in {file}, found a damaged file: copy the checkpoint again.") from None
    if not isinstance(value, dict) or value.get("kind") not in KINDS or not isinstance(value.get("config"), dict):
        raise InputError(f"Expected a checkpoint's config in {file}, found something else: {_hint(path)}.")
    if value.get("format") != FORMAT:
        raise InputError(
            f"Expected checkpoint format {FORMAT} in {file}, found {value.get('format')!r}: use a newer retinar."
        )
    classes = value.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"Expected classes in {file} as a list of names, found {classes!r}: correct the file.")
    return value


def digest(path: Path | str) -> str:
    """SHA-256 of the weights, computed now: of our folder (all its shards), or of an upstream file as it is."""
    path = Path(path)
    if is_folder(path):
        return disk.weights_digest(path)
    path = path / CONSOLIDATED if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"Expected a checkpoint at {path}, found none: check the path.")
    return sha256_file(path)


def is_folder(path: Path) -> bool:
    """Whether to read ``path`` as our folder (any folder, but one of upstream's FSDP training)."""
    return path.is_dir() and not (path / CONSOLIDATED).is_file()


def is_ours(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint and nothing else, so that a new one may replace it."""
    names = {path.name for path in folder.iterdir()}
    known = {"config.json", "README.md", "tokenizer", disk.SINGLE, disk.INDEX, disk.DISCRIMINATOR}
    try:
        read_config(folder)
    except InputError:
        return False
    return all(name in known or disk.SHARD.fullmatch(name) for name in names)


def _build(kind: Callable[[Any], Model], settings: Any, weights: Mapping[str, Tensor], path: Path) -> Model:
    """The empty model; InputError where a damaged config asks for one of absurd size."""
    blocks = settings.n_layer if isinstance(settings, GPTConfig) else settings.num_res_blocks
    try:
        if blocks > max(1000, len(weights)):  # minutes of building; fewer are built, and fill names what is missing
            raise RuntimeError(f"{blocks} blocks for {len(weights)} weights")
        with torch.device("meta"):
            return kind(settings)
    except (RuntimeError, OverflowError) as error:
        raise InputError(
            f"Expected a config of the size of the weights in {path}, found one that cannot be built ({error}): "
            "correct the config."
        ) from error


def _stated(config: Any, fields_of: Any) -> dict[str, Any]:
    if config is None:
        return {}
    return config.to_dict() if isinstance(config, (GPTConfig, TokenizerConfig)) else fields_of(config)


def _folder(path: Path, kind: str, ema: bool) -> dict[str, Any]:
    stored = read_config(path)
    expect_kind(path, kind, stored["kind"])
    if ema:
        raise InputError(f"Expected averaged weights (ema) in {path}, found a folder with one set: leave out ema.")
    return stored


def expect_kind(path: Path, kind: str, found: str | None) -> None:
    """InputError unless ``found`` is the ``kind`` asked for."""
    if found != kind:
        names = {"gpt": "a transformer", "tokenizer": "a tokenizer", "iddpm": "a diffusion model"}
        other = names.get(found or "", "other weights")
        raise InputError(f"Expected {names[kind]} in {path}, found {other}: give another path.")


def verified(path: Path, stored: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies of a folder's weights in ``dtype`` (None: as stored). InputError unless they have the recorded digest."""
    if disk.weights_digest(path) != stored.get("sha256"):
        raise InputError(
            f"Expected weights in {path} with the digest in its config.json, found others: "
            "the checkpoint is damaged or was changed, copy it again."
        )
    return clean_keys({key: _cast(key, tensor, dtype) for key, tensor in disk.read_weights(path)})


def _cast(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy in ``dtype``; codes stay whole numbers."""
    if key.endswith(_WINDOW):
        return tensor.to(torch.int32)
    return tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=True)


def _hint(path: Path | str) -> str:
    inner = Path(path) / "model"
    return f"did you mean {inner}" if (inner / "config.json").is_file() else "check the path"
