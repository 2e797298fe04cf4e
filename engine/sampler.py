"""The sampler: labels and parameters in, images with their provenance out.

An image depends on the checkpoint, dtype, label, parameters, seed, index and implementation, and on nothing else:
rows are independent of their batch down to the bit (`retinar.kernels.ops`), noise comes from the image's own stream,
and the decoder sees one image at a time. A GPU's fast mode gives up the first and the last (`Sampler`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retinar.engine import checkpoint, images, provenance
from retinar.engine.config import ConfigSource
from retinar.engine.decoding import Decoding
from retinar.engine.device import find_device
from retinar.engine.errors import InputError
from retinar.engine.model import GPT
from retinar.engine.pipeline import DECODE_BATCH, WAVES, Developer, Sampled, Steps, default_workers, develop
from retinar.engine.precision import find_precision
from retinar.engine.progress import Progress, silent
from retinar.engine.request import Request, SamplingParams, make_request, resolve_label
from retinar.engine.runner import DecodeLoop
from retinar.engine.tokenizer import VQTokenizer
from retinar.engine.vq_decoder import fast_decoder


class Sampler:
    """A transformer, its tokenizer and their origin, ready to sample.

    ``dtype`` is a precision by name (`retinar.engine.precision`) or torch's float32 or bfloat16: that of weights and
    cache, by default float32 on a CPU and bfloat16 on a GPU. ``tokenizer`` may be None where only codes are wanted, and
    is switched to evaluation; it decodes in fp32, or on a CPU by a copy that `fast_decoder` makes for ``dtype``.
    ``digest`` and ``tokenizer_digest`` identify the files for the provenance.

    ``batch_invariant``: bits do not depend on what is made at the same time, which on a CPU always holds. On a GPU it
    costs speed (`make gpu` measures how much): without it products of many rows are torch's, whose sums depend on the
    number of rows, and images are decoded in batches. ``pin`` as in `Decoding`.
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
        dtype: torch.dtype | str | None = None,
        backend: str | None = None,
        batch_invariant: bool = False,
        pin: bool = False,
    ) -> None:
        self.device = find_device(device)
        self.precision = find_precision(dtype, self.device, backend)
        self.classes = tuple(classes)
        self.batch_invariant = batch_invariant or self.device.type == "cpu"
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
        self.decoding = Decoding(gpt, self.device, self.precision, backend, self.batch_invariant, pin)
        self.tokenizer = None if tokenizer is None else tokenizer.to(self.device).eval()
        self.fast_decoder = None if tokenizer is None else fast_decoder(tokenizer, self.device, self.precision.dtype)
        self._aside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.origin = provenance.Origin(
            checkpoint=digest,
            tokenizer=tokenizer_digest,
            dtype=self.precision.name,
            implementation=self.decoding.implementation() | ({"decoder": "bfloat16"} if self.fast_decoder else {}),
            classes=self.classes,
            vocab_size=gpt.config.vocab_size,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        tokenizer: Path | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        config: ConfigSource | None = None,
        tokenizer_config: ConfigSource | None = None,
        backend: str | None = None,
        batch_invariant: bool = False,
        pin: bool = False,
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
            batch_invariant=batch_invariant,
            pin=pin,
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
        max_images: int | None = None,
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
        max_images: int | None = None,
        page_size: int = 16,
        pages: int | None = None,
        progress: Progress = silent,
        finish: Callable[[Sampled], Any] | None = None,
    ) -> Generator[Any, None, None]:
        """Each image as `Sampled`, or ``finish(sampled)``, as it completes (not in the order of ``requests``).

        Images are decoded, digested and finished in threads beside the decode loop, `retinar.engine.pipeline`;
        ``finish`` is called from several of them, and what it raises is raised here. On a CPU most images come when the
        loop has ended, or has too many waiting. Other arguments and errors as `sample_codes`.
        """
        developer = self._developer()
        backlog = WAVES * (self.at_once if max_images is None else max_images)
        steps = self._run(requests, max_images, page_size, pages, progress)
        return develop(
            steps,
            developer,
            finish or _as_it_is,
            backlog=backlog,
            workers=default_workers(self.device),
            low=self.device.type == "cpu",
            progress=progress,
        )

    def sample_codes(
        self,
        requests: Sequence[Request],
        *,
        max_images: int | None = None,
        page_size: int = 16,
        pages: int | None = None,
        progress: Progress = silent,
    ) -> Iterator[tuple[int, Tensor]]:
        """(index, codes int64 [block_size] on the CPU) of each image as it completes.

        At most ``max_images`` live at once (by default `at_once`); a cache of ``pages`` pages of ``page_size`` slots
        (a power of two), or as many as are needed and free memory allows. Neither changes the codes. InputError when an
        image cannot fit the cache.
        """
        steps = self._run(requests, max_images, page_size, pages, progress)
        return ((finished.request.index, finished.wait().cpu()) for step in steps for finished in step)

    def decode(self, codes_T: Tensor) -> np.ndarray:
        """Codes [block_size] as pixels uint8 [H, W, 3]; alone, so that its bits depend on no other image."""
        return self._developer().decode(codes_T[None])[0]

    @property
    def at_once(self) -> int:
        """Images made at the same time unless said otherwise: a GPU's step costs little more for many rows."""
        return 64 if self.device.type == "cuda" else 16

    def unload(self) -> None:
        """Free the device's memory, the tokenizer's own included: the sampler still knows what it is and plans, but
        makes nothing more.
        """
        self.decoding.unload()
        self.fast_decoder = None
        if self.tokenizer is not None:
            self.tokenizer.to("meta")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def require_tokenizer(self) -> VQTokenizer:
        """The tokenizer; InputError when this sampler was made without one."""
        if self.tokenizer is None:
            raise InputError("this checkpoint holds no tokenizer folder, which images need; give one with --tokenizer")
        return self.tokenizer

    def plan(self, requests: Sequence[Request], *, max_images: int, page_size: int, pages: int | None = None) -> int:
        """As `Decoding.plan`."""
        return self.decoding.plan(requests, max_images=max_images, page_size=page_size, pages=pages)

    def loop(
        self,
        requests: Sequence[Request],
        *,
        max_images: int,
        page_size: int,
        pages: int | None = None,
        progress: Progress = silent,
    ) -> DecodeLoop:
        """As `Decoding.loop`."""
        return self.decoding.loop(requests, max_images=max_images, page_size=page_size, pages=pages, progress=progress)

    def _developer(self) -> Developer:
        batch = 1 if self.batch_invariant else DECODE_BATCH
        decoder = self.fast_decoder or self.require_tokenizer()
        return Developer(decoder, self.origin, self.config.grid, self.device, batch, self._aside)

    def _run(
        self, requests: Sequence[Request], max_images: int | None, page_size: int, pages: int | None, progress: Progress
    ) -> Steps:
        # checked here and now, not when the first image is asked for
        requests = list(requests)
        if not requests:
            return _no_steps()
        max_images = self.at_once if max_images is None else max_images
        loop = self.loop(requests, max_images=max_images, page_size=page_size, pages=pages, progress=progress)
        for request in requests:
            loop.submit(request)
        return self._steps(loop, len(requests), progress)

    def _steps(self, loop: DecodeLoop, total: int, progress: Progress) -> Steps:
        done = 0
        with progress("codes", total * self.config.block_size) as bar:
            while loop.scheduler.busy:
                finished = loop.step()
                done += len(finished)
                bar.advance(loop.codes, f"{done} of {total} images" if finished else None)
                yield finished
        self.decoding.keep(loop)


def _no_steps() -> Steps:
    yield from ()


def _as_it_is(sampled: Sampled) -> Sampled:
    return sampled
