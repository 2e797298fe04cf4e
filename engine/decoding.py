"""Decode loops of one model on one device: which runner, how large a cache, what is kept from call to call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from retinar.engine import provenance
from retinar.engine.buckets import buckets_of
from retinar.engine.errors import InputError
from retinar.engine.graphs import GraphRunner
from retinar.engine.kv_cache import KVCache, check_pool, pool_pages
from retinar.engine.model import GPT
from retinar.engine.precision import Precision
from retinar.engine.progress import Progress, silent
from retinar.engine.request import Request
from retinar.engine.runner import DecodeLoop, EagerRunner, NativeRunner
from retinar.engine.scheduler import check_fits, pages_needed
from retinar.kernels import ops

AnyRunner = EagerRunner | NativeRunner | GraphRunner


class Asked(NamedTuple):
    """What a runner was made for; ``wanted`` pages where ``pages`` does not say how many."""

    page_size: int
    pages: int | None
    wanted: int
    images: int

    def covers(self, other: Asked) -> bool:
        """Whether that runner serves another call, and need not be warmed up again."""
        same = (self.page_size, self.pages) == (other.page_size, other.pages)
        return same and self.wanted >= other.wanted and self.images >= other.images


def check_limits(max_images: int, page_size: int, pages: int | None) -> None:
    """InputError for limits out of range."""
    check_pool(page_size, pages)
    if max_images < 1:
        raise InputError(f"max-images must be at least 1, got {max_images}; try 16")


class Decoding:
    """A transformer's weights in a ``precision`` on ``device``, ready for decode loops.

    ``backend``: one of ``decode_step``'s; "native", a CPU's compiled decoder; or None for the device's first.
    ``batch_invariant`` as in `GraphRunner`. ``pin``: the compiled decoder's threads, as many as torch has when this is
    made, each to a processor of its own.
    """

    def __init__(
        self,
        gpt: GPT,
        device: torch.device,
        precision: Precision,
        backend: str | None,
        batch_invariant: bool,
        pin: bool = False,
    ) -> None:
        self.config, self.device, self.precision = gpt.config, device, precision
        self.backend, self.batch_invariant = backend, batch_invariant
        self._weights: ops.DecodeWeights | None = gpt.to(device).decode_weights(precision.dtype)
        self._native: ops.NativeDecoder | None = None
        native = ops.native_info()
        if device.type == "cpu" and backend is None and not native["loaded"]:
            warnings.warn(f"decoding on torch, many times slower: {native['reason']}", stacklevel=2)
        if self._backend() == "native":
            threads = torch.get_num_threads()
            self._native = ops.NativeDecoder(self.weights, int8=precision.int8_weights, threads=threads, pin=pin)
            self._weights = None  # packed, they need not be there twice
        self._idle: AnyRunner | None = None
        self._asked: WeakKeyDictionary[AnyRunner, Asked] = WeakKeyDictionary()

    @property
    def weights(self) -> ops.DecodeWeights:
        """As the decode step takes them."""
        if self._weights is None:
            raise RuntimeError("the weights were unloaded, or packed for the native decoder")
        return self._weights

    @property
    def graphs(self) -> bool:
        """Whether steps are CUDA graphs: where our kernels run; the reference looks at what its inputs hold."""
        return self.device.type == "cuda" and self._backend() != "reference"

    def implementation(self) -> dict[str, object]:
        """What besides weights and parameters may change bits, for the provenance."""
        backend = self._backend()
        isa = ops.native_info()["isa"] if backend == "native" else None
        found = provenance.implementation(
            "graphs" if self.graphs else "native" if backend == "native" else "eager", backend, isa, self.device
        )
        return found if self.device.type == "cpu" else found | {"batch_invariant": self.batch_invariant}

    def plan(self, requests: Sequence[Request], *, max_images: int, page_size: int, pages: int | None = None) -> int:
        """Pages of the pool for these requests. InputError when one image cannot fit, or a limit is out of range."""
        check_limits(max_images, page_size, pages)
        most = self._most(requests, page_size)
        if pages is None:
            wanted = most * min(max_images, len(requests))
            return pool_pages(wanted, most, self.config, page_size, self.precision.cache_dtype, self.device)
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
        """A loop over a cache that fits these requests, nothing submitted yet. Errors as `plan`.

        A runner that `keep` got back serves this call too where it can, for it may have cost a warm-up.
        """
        check_limits(max_images, page_size, pages)
        wanted = min(max_images, len(requests))
        # What was asked for, not what came of it: where memory is short a pool is smaller, and will be again.
        most = self._most(requests, page_size)
        asked = Asked(page_size, pages, most * wanted, wanted)
        runner, self._idle = self._idle, None  # nobody else's until `keep`
        if runner is None or not self._asked[runner].covers(asked) or runner.cache.pages < most:
            runner = None  # its cache is freed before free memory is asked for, and the next one made
            planned = self.plan(requests, max_images=max_images, page_size=page_size, pages=pages)
            dtype = self.precision.cache_dtype
            cache = KVCache(self.config, pages=planned, page_size=page_size, dtype=dtype, device=self.device)
            runner = self._runner(cache, wanted)
            self._asked[runner] = asked
        loop = DecodeLoop(runner, wanted)  # which clears the runner's inputs
        if isinstance(runner, GraphRunner):
            limits = {"page_size": page_size, "pages": runner.cache.pages, "max_images": wanted}
            runner.warm_up(buckets_of(requests, self.config, **limits, most=runner.max_images), progress)
        return loop

    def keep(self, loop: DecodeLoop) -> None:
        """Takes back the runner of a loop that is done."""
        if isinstance(loop.runner, AnyRunner):
            self._idle = loop.runner

    def unload(self) -> None:
        """Free the device's memory; plans can still be made, loops no more."""
        self._weights = self._native = self._idle = None

    def _backend(self) -> str:
        if self.backend is not None:
            return self.backend
        preferred = ops.preferred("decode_step", self.device.type)
        compiled = self.device.type == "cpu" and preferred == "reference" and ops.native_info()["loaded"]
        return "native" if compiled else preferred

    def _runner(self, cache: KVCache, max_images: int) -> AnyRunner:
        if self._native is not None:
            return NativeRunner(self._native, self.config, cache)
        if not self.graphs:
            return EagerRunner(self.weights, self.config, cache, self.backend)
        return GraphRunner(
            self.weights, self.config, cache, max_images, backend=self.backend, batch_invariant=self.batch_invariant
        )

    def _most(self, requests: Sequence[Request], page_size: int) -> int:
        return max(pages_needed(request, self.config.block_size, page_size) for request in requests)
