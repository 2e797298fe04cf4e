"""Make an image again from what its file says, and compare codes and pixels."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retinar.engine import provenance
from retinar.engine.errors import InputError
from retinar.engine.precision import PRECISIONS
from retinar.engine.progress import Progress, plain
from retinar.engine.sampler import Sampler
from retinar.kernels import ops


def reproduce(
    file: Path | str,
    model: Path | str | None = None,
    tokenizer: Path | str | None = None,
    config: str | None = None,
    progress: Progress = plain,
) -> dict[str, Any]:
    """Sample and decode ``file``'s image anew and say whether it is equal.

    ``model``, ``tokenizer`` and ``config`` default to those in the ``run.json`` of the folder that `generate` wrote.
    As far as this machine allows, the recorded kernels and thread count are used. Returns ``equal``,
    ``codes_differing`` of ``codes``, ``largest_pixel_difference`` (0 to 255), ``same_implementation`` with the fields
    that differ, ``file_untouched`` and a ``verdict`` in words. InputError for files without provenance, and for
    checkpoints that are not the recorded ones.
    """
    found = provenance.read(file)
    recorded = found.implementation
    if found.fields["dtype"] not in PRECISIONS:
        raise InputError(f"the provenance in {file} is damaged (dtype {found.fields['dtype']}); use the original file")
    model, tokenizer, config = named_checkpoint(Path(file), model, tokenizer, config)
    with torch_threads(recorded.get("threads")):
        sampler = Sampler.from_pretrained(
            model,
            tokenizer,
            recorded_device(recorded),
            found.fields["dtype"],
            config=config,
            backend=_backend(recorded),
            batch_invariant=bool(recorded.get("batch_invariant")),
        )
        origin = sampler.origin
        same_weights("checkpoint", "--model", found.fields["checkpoint"], origin.checkpoint, file, model)
        wanted, given = found.fields["tokenizer"], origin.tokenizer or provenance.UNSAVED
        same_weights("tokenizer", "--tokenizer", wanted, given, file, tokenizer or model)
        if not 0 <= found.request.label < sampler.config.num_classes:
            raise InputError(
                f"the provenance in {file} is damaged (class {found.request.label}); use the original file"
            )
        [again] = sampler.sample([found.request], max_images=1, progress=progress)

    codes_T = provenance.unpack_codes(found.fields["codes"], origin.vocab_size)
    if codes_T.shape != again.codes_T.shape or found.pixels_HWC.shape != again.pixels_HWC.shape:
        raise InputError(f"{file} does not have the size that this checkpoint makes; use the original file")
    differing = int((codes_T != again.codes_T).sum())
    return compare(file, found, origin, again.pixels_HWC, {"codes": codes_T.numel(), "codes_differing": differing})


def compare(
    file: Path | str,
    found: provenance.Record,
    origin: provenance.Origin,
    again_HWC: np.ndarray,
    codes: dict[str, int],
) -> dict[str, Any]:
    """What `reproduce` returns: ``file`` as ``found``, against the pixels made again by ``origin``, of the same size.
    ``codes``: how many, and how many differ; {} for a model without."""
    recorded = found.implementation
    largest = int(np.abs(found.pixels_HWC.astype(int) - again_HWC.astype(int)).max())
    changes = {
        key: [recorded.get(key), origin.implementation.get(key)]
        for key in recorded.keys() | origin.implementation.keys()
        if recorded.get(key) != origin.implementation.get(key)
    }
    report: dict[str, Any] = {
        "file": str(file),
        "equal": codes.get("codes_differing", 0) == 0 and largest == 0,
        **codes,
        "largest_pixel_difference": largest,
        "file_untouched": found.untouched,
        "same_implementation": not changes,
        "batch_invariant": recorded.get("batch_invariant", True),
        "implementation_differences": dict(sorted(changes.items())),
    }
    return report | {"verdict": _verdict(report)}


def _verdict(report: dict[str, Any]) -> str:
    if report["equal"]:
        return "equal: the same codes and the same pixels" if "codes" in report else "equal: the same pixels"
    text = f"{report['codes_differing']} of {report['codes']} codes differ, " if "codes" in report else ""
    text += f"the largest pixel difference is {report['largest_pixel_difference']} of 255"
    if not report["file_untouched"]:
        text += "; the file's pixels were changed after it was made"
    if report["same_implementation"]:
        if report["batch_invariant"]:
            return text + "; on this same implementation they should be equal"
        return text + (
            "; it was made in the fast mode, where rounding depends on what is made at the same time: "
            "generate with --batch-invariant for equal bits"
        )
    names = ", ".join(
        f"{key} {was} then, {now} now" for key, (was, now) in report["implementation_differences"].items()
    )
    return f"{text}; it was made by another implementation ({names}), whose rounding may differ"


def named_checkpoint(
    file: Path, model: Path | str | None, tokenizer: Path | str | None, config: str | None
) -> tuple[Path, Path | None, str | None]:
    """What is given, and for the rest what run.json above images/{label}/ says."""
    record = file.resolve().parent.parent.parent / "run.json"
    run: dict[str, Any] = {}
    if model is None and record.is_file():
        try:
            run = dict(json.loads(record.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{record} is damaged ({error}); name the checkpoint with --model") from error
    model = model or run.get("model")
    tokenizer = tokenizer or run.get("tokenizer_path")
    if run.get("model") is not None and not Path(run["model"]).exists():
        raise InputError(f"expected the checkpoint at {run['model']} (see {record}), found none; name it with --model")
    if model is None:
        raise InputError(f"expected to find the checkpoint's path in {record}, found none; name it with --model")
    return Path(model), None if tokenizer is None else Path(tokenizer), config or run.get("config")


def same_weights(what: str, flag: str, wanted: str, got: str, file: Path | str, path: Path) -> None:
    """InputError unless the recorded digest is that of the weights at ``path``."""
    if wanted == provenance.UNSAVED:
        raise InputError(f"{file} was made by a {what} that was never saved; it cannot be made again")
    if wanted != got:
        raise InputError(
            f"{file} was made by the {what} {wanted[:12]}, but {path} is {got[:12]}; give that one with {flag}"
        )


def recorded_device(recorded: dict[str, Any]) -> str:
    """A GPU where the image was made on one and there is one, else the CPU."""
    return "cuda" if recorded.get("device") == "cuda" and torch.cuda.is_available() else "cpu"


def _backend(recorded: dict[str, Any]) -> str | None:
    """The recorded kernels where they can run here, else the default."""
    backend = recorded.get("backend")
    return backend if ops.backends("decode_step").get(str(backend), "unknown") is None else None


@contextmanager
def torch_threads(count: object) -> Iterator[None]:
    """Torch's thread count as it was when the image was made, if there are that many cores."""
    before = torch.get_num_threads()
    if isinstance(count, int) and 0 < count <= (os.cpu_count() or 1):
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
