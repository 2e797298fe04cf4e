"""Decode loops of one model on one device: which runner, how large a cache, what is kept from call to call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from retinar.engine import provenance
from retinar.engine.buckets import buckets_of
from retinar.engine.errors import InputError
from retinar.engine.graphs import GraphRunner
from retinar.engine.kv_cache import KVCache, check_pool, pool_pages
from retinar.engine.model import GPT
from retinar.engine.progress import Progress, silent
from retinar.engine.request import Request
from retinar.engine.runner import DecodeLoop, EagerRunner
from retinar.engine.scheduler import check_fits, pages_needed
from retinar.kernels import ops


class Decoding:
    """A transformer's weights in ``dtype`` on ``device``, ready for decode loops.

    ``backend`` of ``decode_step``, or None for the device's first; ``batch_invariant`` as in `GraphRunner`.
    """

    def __init__(
        self, gpt: GPT, device: torch.device, dtype: torch.dtype, backend: str | None, batch_invariant: bool
    ) -> None:
        self.config, self.device, self.dtype = gpt.config, device, dtype
        self.backend, self.batch_invariant = backend, batch_invariant
        self._weights: ops.DecodeWeights | None = gpt.to(device).decode_weights(dtype)
        self._idle: EagerRunner | GraphRunner | None = None

    @property
    def weights(self) -> ops.DecodeWeights:
        """As the decode step takes them."""
        if self._weights is None:
            raise RuntimeError("the weights were unloaded")
        return self._weights

    @property
    def graphs(self) -> bool:
        """Whether steps are CUDA graphs: where our kernels run; the reference looks at what its inputs hold."""
        return self.device.type == "cuda" and self._backend() != "reference"

    def implementation(self) -> dict[str, object]:
        """What besides weights and parameters may change bits, for the provenance."""
        backend = self._backend()
        isa = ops.native_info()["isa"] if backend == "native" else None
        found = provenance.implementation("graphs" if self.graphs else "eager", backend, isa, self.device)
        return found if self.device.type == "cpu" else found | {"batch_invariant": self.batch_invariant}

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
        self,
        requests: Sequence[Request],
        *,
        max_images: int,
        page_size: int,
        pages: int | None = None,
        progress: Progress = silent,
    ) -> DecodeLoop:
        """A loop over a cache that fits these requests, nothing submitted yet. Errors as `plan`."""
        kept, self._idle = self._idle, None
        wanted = min(max_images, len(requests))
        if kept is not None and self._serves(kept, requests, max_images, page_size, pages):
            runner, pages = kept, kept.cache.pages
        else:
            kept = None  # its cache is freed before free memory is asked for, and the next one made
            pages = self.plan(requests, max_images=max_images, page_size=page_size, pages=pages)
            cache = KVCache(self.config, pages=pages, page_size=page_size, dtype=self.dtype, device=self.device)
            runner = self._runner(cache, wanted)
        if isinstance(runner, GraphRunner):
            limits = {"page_size": page_size, "pages": pages, "max_images": wanted}
            runner.warm_up(buckets_of(requests, self.config, **limits, most=runner.max_images), progress)
        return DecodeLoop(runner, wanted)

    def keep(self, loop: DecodeLoop) -> None:
        """A loop that is done: its runner serves the next one, for it may have cost a warm-up."""
        if isinstance(loop.runner, EagerRunner | GraphRunner):
            self._idle = loop.runner

    def unload(self) -> None:
        """Free the device's memory; plans can still be made, loops no more."""
        self._weights = self._idle = None

    def _backend(self) -> str:
        return self.backend or ops.preferred("decode_step", self.device.type)

    def _runner(self, cache: KVCache, max_images: int) -> EagerRunner | GraphRunner:
        if not self.graphs:
            return EagerRunner(self.weights, self.config, cache, self.backend)
        return GraphRunner(
            self.weights, self.config, cache, max_images, backend=self.backend, batch_invariant=self.batch_invariant
        )

    def _serves(
        self,
        runner: EagerRunner | GraphRunner,
        requests: Sequence[Request],
        max_images: int,
        page_size: int,
        pages: int | None,
    ) -> bool:
        """Whether a runner of an earlier call does for these requests and limits."""
        most = max(pages_needed(request, self.config.block_size, page_size) for request in requests)
        wanted = min(max_images, len(requests))
        enough = runner.cache.pages == pages if pages is not None else runner.cache.pages >= most * wanted
        room = not isinstance(runner, GraphRunner) or runner.max_images >= wanted
        return max_images > 0 and runner.cache.page_size == page_size and enough and room
