"""The sampler: labels and parameters in, images with their provenance out.

An image depends on the checkpoint, dtype, label, parameters, seed, index and implementation, and on nothing else:
rows are independent of their batch down to the bit (`retinar.kernels.ops`), noise comes from the image's own stream,
and the decoder sees one image at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retinar.engine import checkpoint, images, provenance
from retinar.engine.config import ConfigSource
from retinar.engine.device import find_device
from retinar.engine.errors import InputError
from retinar.engine.kv_cache import KVCache, check_pool, pool_pages
from retinar.engine.model import GPT
from retinar.engine.progress import Progress, silent
from retinar.engine.request import Request, SamplingParams, make_request, resolve_label
from retinar.engine.runner import DecodeLoop, EagerRunner, Finished, Runner
from retinar.engine.scheduler import check_fits, pages_needed
from retinar.engine.tokenizer import VQTokenizer
from retinar.kernels import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Sampled(NamedTuple):
    """A finished image: pixels uint8 [H, W, 3], codes int64 [block_size], and its text fields."""

    request: Request
    codes_T: Tensor
    pixels_HWC: np.ndarray
    fields: dict[str, str]


class Sampler:
    """A transformer, its tokenizer and their origin, ready to sample.

    ``dtype`` is that of weights and cache (float32 or bfloat16); the tokenizer decodes in fp32. ``tokenizer`` may be
    None where only codes are wanted, and is switched to evaluation. ``digest`` and ``tokenizer_digest`` identify the
    files for the provenance.
    """

    def __init__(
        self,
        gpt: GPT,
        tokenizer: VQTokenizer | None = None,
        *,
        classes: Sequence[str] = (),
        digest: str = provenance.UNSAVED,
        tokenizer_digest: str = provenance.UNSAVED,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> None:
        if dtype not in DTYPES.values():
            raise InputError(f"dtype must be float32 or bfloat16, got {dtype}; choose one of them")
        self.device = find_device(device)
        self.dtype, self.backend, self.classes = dtype, backend, tuple(classes)
        self.config = gpt.config
        if self.classes and len(self.classes) != gpt.config.num_classes:
            raise InputError(
                f"the transformer has {gpt.config.num_classes} classes and {len(self.classes)} names were found "
                f"({', '.join(self.classes)}); name each class"
            )
        if tokenizer is not None and tokenizer.config.codebook_size != gpt.config.vocab_size:
            raise InputError(
                f"the transformer draws from {gpt.config.vocab_size} codes and the tokenizer has "
                f"{tokenizer.config.codebook_size}; give the tokenizer that the transformer was trained with"
            )
        self.weights = gpt.to(self.device).decode_weights(dtype)
        self.tokenizer = None if tokenizer is None else tokenizer.to(self.device).eval()
        self.origin = provenance.Origin(
            checkpoint=digest,
            tokenizer=tokenizer_digest,
            dtype=str(dtype).removeprefix("torch."),
            implementation=self._implementation(),
            classes=self.classes,
            vocab_size=gpt.config.vocab_size,
        )
        self._idle: Runner | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        tokenizer: Path | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        config: ConfigSource | None = None,
        tokenizer_config: ConfigSource | None = None,
        backend: str | None = None,
    ) -> Sampler:
        """Load a checkpoint (our folder or an upstream file). The tokenizer is the folder's own unless given.

        ``config`` and ``tokenizer_config`` say what an upstream file does not show, as in `checkpoint.load_gpt`.
        InputError for anything unreadable, of another shape or kind, or altered since it was written.
        """
        path = Path(path)
        given = Path(path if tokenizer is None else tokenizer)
        inner = given / "tokenizer"
        tokenizer_path = inner if inner.is_dir() else None if tokenizer is None else given
        gpt = checkpoint.load_gpt(path, config)
        return cls(
            gpt,
            None if tokenizer_path is None else checkpoint.load_tokenizer(tokenizer_path, tokenizer_config),
            classes=checkpoint.read_config(path).get("classes", ()) if checkpoint.is_folder(path) else (),
            digest=checkpoint.digest(path),
            tokenizer_digest=provenance.UNSAVED if tokenizer_path is None else checkpoint.digest(tokenizer_path),
            device=device,
            dtype=dtype,
            backend=backend,
        )

    def requests(
        self, labels: Iterable[int | str], params: SamplingParams, seed: int = 0, start_index: int = 0
    ) -> list[Request]:
        """One request a label, with consecutive indices. InputError for an unknown label, naming the known ones."""
        if params.cfg_scale > 1 and not self.config.null_class:
            raise InputError(
                f"this checkpoint has no null class, and cfg-scale {params.cfg_scale} needs one; use --cfg-scale 1"
            )
        numbers = [resolve_label(label, self.classes, self.config.num_classes) for label in labels]
        return [make_request(start_index + i, number, params, seed) for i, number in enumerate(numbers)]

    def generate(
        self,
        labels: Sequence[int | str],
        *,
        cfg_scale: float = 2.0,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        cfg_interval: int = -1,
        start_index: int = 0,
        max_images: int = 16,
        page_size: int = 16,
        pages: int | None = None,
        progress: Progress = silent,
    ) -> list[Image.Image]:
        """One PIL image a label, in that order, with its provenance in ``.info`` (`images.save_png` keeps it).

        Image i has the index ``start_index + i``; the parameters are those of `SamplingParams`, the limits those of
        `sample_codes`. InputError for parameters out of range.
        """
        if isinstance(labels, str) or not len(labels):
            raise InputError(f"expected a list with at least one label, got {labels!r}; name a class for each image")
        requests = self.requests(
            labels, SamplingParams(cfg_scale, temperature, top_k, top_p, cfg_interval), seed, start_index
        )
        done = self.sample(requests, max_images=max_images, page_size=page_size, pages=pages, progress=progress)
        made = {sampled.request.index: images.to_pil(sampled.pixels_HWC, sampled.fields) for sampled in done}
        return [made[request.index] for request in requests]

    def sample(
        self,
        requests: Sequence[Request],
        *,
        max_images: int = 16,
        page_size: int = 16,
        pages: int | None = None,
        progress: Progress = silent,
    ) -> Iterator[Sampled]:
        """Finished images as they complete (not in order), decoded. Arguments and errors as `sample_codes`."""
        self.require_tokenizer()
        steps = self._run(requests, max_images, page_size, pages, progress)
        return (self.develop(finished.request, finished.codes_T) for finished in steps)

    def sample_codes(
        self,
        requests: Sequence[Request],
        *,
        max_images: int = 16,
        page_size: int = 16,
        pages: int | None = None,
        progress: Progress = silent,
    ) -> Iterator[tuple[int, Tensor]]:
        """(index, codes int64 [block_size]) of each image as it completes.

        At most ``max_images`` live at once; a cache of ``pages`` pages of ``page_size`` slots (a power of two), or as
        many as are needed and free memory allows. Neither changes the codes. InputError when an image cannot fit the
        cache.
        """
        steps = self._run(requests, max_images, page_size, pages, progress)
        return ((finished.request.index, finished.codes_T) for finished in steps)

    def develop(self, request: Request, codes_T: Tensor) -> Sampled:
        """Decode one image and write down where it came from."""
        pixels_HWC = self.decode(codes_T)
        return Sampled(request, codes_T, pixels_HWC, provenance.describe(self.origin, request, codes_T, pixels_HWC))

    @torch.no_grad()
    def decode(self, codes_T: Tensor) -> np.ndarray:
        """Codes [block_size] as pixels uint8 [H, W, 3]; alone, so that its bits depend on no other image."""
        grid = self.config.grid
        images_BCHW = self.require_tokenizer().decode(codes_T.view(1, grid, grid).to(self.device))
        return images.to_bytes(images_BCHW[0])

    def require_tokenizer(self) -> VQTokenizer:
        """The tokenizer; InputError when this sampler was made without one."""
        if self.tokenizer is None:
            raise InputError("this checkpoint holds no tokenizer folder, which images need; give one with --tokenizer")
        return self.tokenizer

    def plan(self, requests: Sequence[Request], *, max_images: int, page_size: int, pages: int | None = None) -> int:
        """Pages of the pool for these requests. InputError when one image cannot fit, or a limit is out of range."""
        check_pool(page_size, pages)
        if max_images < 1:
            raise InputError(f"max-images must be at least 1, got {max_images}; try 16")
        most = max(pages_needed(request, self.config.block_size, page_size) for request in requests)
        if pages is None:
            wanted = most * min(max_images, len(requests))
            return pool_pages(wanted, most, self.config, page_size, self.dtype, self.device)
        check_fits(most, page_size, pages)
        return pages

    def loop(
        self, requests: Sequence[Request], *, max_images: int, page_size: int, pages: int | None = None
    ) -> DecodeLoop:
        """A loop over a cache that fits these requests, nothing submitted yet. Errors as `plan`."""
        pages = self.plan(requests, max_images=max_images, page_size=page_size, pages=pages)
        runner, self._idle = self._idle, None
        if runner is None or (runner.cache.pages, runner.cache.page_size) != (pages, page_size):
            runner = None  # its cache is freed before the next one is made
            cache = KVCache(self.config, pages=pages, page_size=page_size, dtype=self.dtype, device=self.device)
            runner = EagerRunner(self.weights, self.config, cache, self.backend)
        return DecodeLoop(runner, min(max_images, len(requests)))

    def _run(
        self, requests: Sequence[Request], max_images: int, page_size: int, pages: int | None, progress: Progress
    ) -> Iterator[Finished]:
        # checked here and now, not when the first image is asked for
        requests = list(requests)
        if not requests:
            return iter(())
        loop = self.loop(requests, max_images=max_images, page_size=page_size, pages=pages)
        for request in requests:
            loop.submit(request)
        return self._steps(loop, len(requests), progress)

    def _steps(self, loop: DecodeLoop, total: int, progress: Progress) -> Iterator[Finished]:
        done = 0
        with progress("codes", total * self.config.block_size) as bar:
            while loop.scheduler.busy:
                finished = loop.step()
                done += len(finished)
                bar.advance(loop.codes, f"{done} of {total} images" if finished else None)
                yield from finished
        self._idle = loop.runner  # kept for the next call: a runner may have cost a warm-up

    def _implementation(self) -> dict[str, object]:
        reasons = ops.backends("decode_step")
        default = "native" if self.device.type == "cpu" and reasons.get("native", "absent") is None else "reference"
        backend = self.backend or default
        isa = ops.native_info()["isa"] if backend == "native" else None
        return provenance.implementation("eager", backend, isa, self.device)
