"""A folder of the transformer's images: see ``image_folder``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from retinar.engine import images, provenance
from retinar.engine.image_folder import Folder, Item, ask_for, common, items_of
from retinar.engine.pipeline import Sampled
from retinar.engine.progress import Progress, plain
from retinar.engine.request import Request, SamplingParams
from retinar.engine.sampler import Sampler

# The fields of a config that change images and that no weight shows: the digests say nothing about them.
UNSHOWN = ("n_head", "n_kv_head", "grid", "rope_base", "norm_eps", "norm_groups")


class Limits(NamedTuple):
    """Images made at the same time, and the cache they share, of every process; no image depends on them."""

    max_images: int
    page_size: int
    pages: int | None


Make = Callable[[Sampler, Path, Sequence[Item[Request]], Limits, Progress], None]
"""``make(sampler, out, missing, limits, progress)`` writes the missing images: here, or in processes of their own."""


def save_images(
    sampler: Sampler, out: Path, items: Sequence[Item[Request]], limits: Limits, progress: Progress
) -> Generator[int, None, None]:
    """Make these images; yields each one's index once its file is there. Close it when leaving early."""
    files = {item.request.index: item.file for item in items}

    def save(done: Sampled) -> int:
        images.save_png(images.to_pil(done.pixels_HWC, done.fields), out / files[done.request.index])
        return done.request.index

    return sampler.sample([item.request for item in items], **limits._asdict(), progress=progress, finish=save)


def make_here(
    sampler: Sampler, out: Path, missing: Sequence[Item[Request]], limits: Limits, progress: Progress
) -> None:
    """Write the missing images in this process."""
    with closing(save_images(sampler, out, missing, limits, progress)) as saved:
        for _ in saved:
            pass


def generate_folder(
    sampler: Sampler,
    out: Path | str,
    labels_counts: Sequence[tuple[int | str, int]],
    *,
    seed: int = 0,
    cfg_scale: float = 2.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cfg_interval: int = -1,
    start_index: int = 0,
    npz: bool = False,
    max_images: int | None = None,
    page_size: int = 16,
    pages: int | None = None,
    model: Path | str | None = None,
    tokenizer: Path | str | None = None,
    config: str | None = None,
    make: Make = make_here,
    progress: Progress = plain,
) -> dict[str, Any]:
    """Make ``count`` images of each label into ``out``, or what is missing of them; returns a summary.

    Writes what `image_folder.Folder.complete` says; indices run through all labels from ``start_index``. ``model``,
    ``tokenizer`` and ``config`` say where they came from, noted for `reproduce`. ``make`` writes the images that are
    missing; with `retinar.engine.shards.Shards` several GPUs share them. InputError for parameters out of range, and
    for a folder that holds another run; OSError as the file system has it.
    """
    params = SamplingParams(cfg_scale, temperature, top_k, top_p, cfg_interval)
    items = items_of(sampler.requests(ask_for(labels_counts), params, seed, start_index), sampler.classes)
    side = sampler.config.grid * sampler.require_tokenizer().config.downsample
    limits = Limits(sampler.at_once if max_images is None else max_images, page_size, pages)
    sampler.plan([item.request for item in items], **limits._asdict())  # refused before anything is written
    run = common(items, sampler.origin) | {
        "tokenizer": sampler.origin.tokenizer,
        "config_read": _config_read(sampler),
        "model": None if model is None else str(Path(model).resolve()),
        "tokenizer_path": None if tokenizer is None else str(Path(tokenizer).resolve()),
        "config": str(Path(config).resolve()) if config and Path(config).is_file() else config,
    }
    folder = Folder(
        items=items,
        origin=sampler.origin,
        run=run,
        size=(side, side),
        note=_in_words(params),
        read=provenance.read,
        make=lambda where, missing: make(sampler, where, missing, limits, progress),
    )
    return folder.complete(out, npz=npz, progress=progress)


def _config_read(sampler: Sampler) -> dict[str, dict[str, Any]]:
    configs = {"transformer": sampler.config.to_dict(), "tokenizer": sampler.require_tokenizer().config.to_dict()}
    return {name: {key: config[key] for key in UNSHOWN if key in config} for name, config in configs.items()}


def _in_words(params: SamplingParams) -> str:
    words = f"guidance {params.cfg_scale:g} · temperature {params.temperature:g}"
    return words + f" · top-k {params.top_k}" * (params.top_k > 0) + f" · top-p {params.top_p:g}" * (params.top_p < 1)
