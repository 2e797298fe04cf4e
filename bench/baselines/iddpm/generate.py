"""A folder of iDDPM's images, and one of them made again: as the transformer's (``engine.image_folder``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from retinar.bench.baselines.iddpm.sampler import RUNNER, DiffusionParams, DiffusionRequest, IDDPMSampler, Method
from retinar.engine import images, provenance
from retinar.engine.errors import InputError
from retinar.engine.image_folder import Folder, Item, ask_for, common, items_of
from retinar.engine.philox import stream
from retinar.engine.progress import Progress, plain
from retinar.engine.reproduce import compare, named_checkpoint, recorded_device, same_weights, torch_threads

STEPS = 50
"""Steps of an image, unless said otherwise."""
GUIDED = 1.5
"""The guidance of a model with a null class, unless said otherwise."""


def generate_folder(
    sampler: IDDPMSampler,
    out: Path | str,
    labels_counts: Sequence[tuple[int | str, int]],
    *,
    seed: int = 0,
    steps: int | None = None,
    method: Method = "ancestral",
    eta: float = 0.0,
    cfg_scale: float | None = None,
    start_index: int = 0,
    npz: bool = False,
    max_images: int | None = None,
    model: Path | str | None = None,
    config: str | None = None,
    progress: Progress = plain,
) -> dict[str, Any]:
    """Make ``count`` images of each label into ``out``, or what is missing of them; returns a summary.

    As :func:`retinar.engine.generate.generate_folder`, with the parameters of `DiffusionParams` (``method`` is its
    ``sampler``). ``steps`` None: `STEPS`, or all where the process has fewer. ``cfg_scale`` None: `GUIDED` for a model
    with a null class, else no guidance.
    """
    if steps is None:
        steps = min(STEPS, sampler.config.diffusion_steps)
    if cfg_scale is None:
        cfg_scale = 1.0 if sampler.config.null_label is None else GUIDED
    params = DiffusionParams(steps, method, eta, cfg_scale)
    items = items_of(sampler.requests(ask_for(labels_counts), params, seed, start_index), sampler.classes)
    run = common(items, sampler.origin) | {
        "config_read": {"diffusion": sampler.config.to_dict()},
        "model": None if model is None else str(Path(model).resolve()),
        "config": str(Path(config).resolve()) if config and Path(config).is_file() else config,
    }

    def make(where: Path, missing: Sequence[Item[DiffusionRequest]]) -> None:
        files = {item.request.index: item.file for item in missing}
        with closing(
            sampler.sample([item.request for item in missing], max_images=max_images, progress=progress)
        ) as drawn:
            for each in drawn:
                images.save_png(images.to_pil(each.pixels_HWC, each.fields), where / files[each.request.index])

    words = f"guidance {params.cfg_scale:g} · {params.steps} steps, {params.sampler}"
    folder = Folder(
        items=items,
        origin=sampler.origin,
        run=run,
        size=(sampler.config.image_size,) * 2,
        note=words + f" (eta {params.eta:g})" * (params.sampler == "ddim"),
        read=read_record,
        make=make,
    )
    return folder.complete(out, npz=npz, progress=progress)


def read_record(path: Path | str) -> provenance.Record:
    """What a PNG of a diffusion model's says of itself; InputError where it is no whole one."""
    return provenance.read_record(path, without=provenance.OF_CODES)


def made_by_iddpm(path: Path | str) -> bool:
    """Whether a PNG says that this sampler made it. InputError where it is no whole image of ours."""
    return read_record(path).implementation.get("runner") == RUNNER


def reproduce(
    file: Path | str, model: Path | str | None = None, config: str | None = None, progress: Progress = plain
) -> dict[str, Any]:
    """Make ``file``'s image anew and say whether it is equal: as :func:`retinar.engine.reproduce.reproduce`, without
    codes."""
    found = read_record(file)
    recorded = found.implementation
    with provenance.told_damage(file):
        params = DiffusionParams(**json.loads(found.fields["parameters"]))
        place = stream(int(found.fields["seed"]), int(found.fields["index"]))
        request = DiffusionRequest(place, int(found.fields["class"]), params)
    path, _, config = named_checkpoint(Path(file), model, None, config)
    with torch_threads(recorded.get("threads")):
        invariant = bool(recorded.get("batch_invariant"))
        sampler = IDDPMSampler.from_pretrained(
            path, recorded_device(recorded), found.fields["dtype"], config=config, batch_invariant=invariant
        )
        same_weights("checkpoint", "--model", found.fields["checkpoint"], sampler.origin.checkpoint, file, path)
        sampler.requests([request.label], params)  # as the checkpoint allows it
        if found.pixels_HWC.shape != (sampler.config.image_size, sampler.config.image_size, 3):
            raise InputError(f"{file} does not have the size that this checkpoint makes; use the original file")
        [again] = sampler.sample([request], max_images=1, progress=progress)
    return compare(file, found, sampler.origin, again.pixels_HWC, {})
