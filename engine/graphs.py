"""The runner of a GPU: one CUDA graph for each bucket of batch sizes, holding the whole step with the sampler.

A step of GPT-XL is 219 small kernels; launched one by one from Python they would take longer
than they run. A graph is launched whole, but for fixed sizes and addresses: steps are padded to the next bucket, and
their inputs lie in buffers that are allocated once. Where there is no GPU the same code runs the padded steps directly.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retinar.engine.buckets import BLOCK, Bucket, bucket_of
from retinar.engine.config import GPTConfig
from retinar.engine.kv_cache import KVCache
from retinar.engine.progress import Progress, silent
from retinar.engine.step_batch import front, step_buffers
from retinar.kernels import ops

#: Above so many rows torch's products take over from ours, unless bits must not depend on the batch: ours read the
#: weights once more from the L2 cache for every further block.
FEW_ROWS = 2 * BLOCK
#: Steps that are queued behind the one that runs: enough to lay out the next, few enough to stop soon.
AHEAD = 2


class Step(NamedTuple):
    """A step of one bucket: its results are overwritten by every replay. ``graph`` is None where there is no GPU."""

    inputs: ops.StepInputs
    backend: str
    codes_I: Tensor | None = None
    logits_BV: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


class GraphRunner:
    """`retinar.engine.runner.Runner` over CUDA graphs.

    ``backend`` of ``decode_step``; None: our kernels, and above `FEW_ROWS` rows, where ``batch_invariant`` does not
    forbid it, torch's products. The logits of a row have the same bits in every bucket with our kernels alone.

    ``graph_bytes`` and ``warm_up_seconds`` are those of all graphs so far (bytes None without a GPU); ``logits_BV``
    fp32 those of the last step, before guidance, valid until the next.
    """

    def __init__(
        self,
        weights: ops.DecodeWeights,
        config: GPTConfig,
        cache: KVCache,
        max_images: int,
        *,
        backend: str | None = None,
        batch_invariant: bool = False,
    ) -> None:
        self.weights, self.config, self.cache = weights, config, cache
        self.device = cache.k_LPSGD.device
        self.max_images, self.backend, self.batch_invariant = max_images, backend, batch_invariant
        self.warm_up_seconds = 0.0
        self.graph_bytes = 0 if self.device.type == "cuda" else None
        self.logits_BV: Tensor | None = None
        self._inputs = step_buffers(config, cache.page_size, cache.scratch_page, max_images, self.device)
        self._steps: dict[Bucket, Step] = {}
        # One pool and one stream for all captures: torch's memory belongs to a stream, and is shared within it alone.
        self._pool: Any = None  # torch's handle; its type has no public name
        self._side: torch.cuda.Stream | None = None
        self._queued: deque[torch.cuda.Event] = deque()

    def buffers(self, max_images: int) -> ops.StepInputs:
        """The front of the runner's own inputs: one loop at a time."""
        if max_images > self.max_images:
            raise ValueError(f"expected room for at most {self.max_images} images, found {max_images}; make another")
        for own, padding in zip(self._inputs, self._padding(), strict=True):
            own.copy_(padding)  # what another loop has left
        return front(self._inputs, max_images, 2 * max_images)

    def warm_up(self, buckets: Iterable[Bucket], progress: Progress = silent) -> None:
        """Compile and capture the steps of these buckets now; others are captured when they come up.

        The largest first: the others' memory fits into its.
        """
        wanted = sorted(set(buckets) - self._steps.keys(), key=lambda each: (-each.rows, -each.images))
        if not wanted:
            return
        with progress("preparing steps", len(wanted)) as bar:
            for bucket in wanted:
                self._prepare(bucket)
                bar.advance(1, f"{bucket.rows} rows")

    @torch.inference_mode()
    def step(self, inputs: ops.StepInputs) -> Tensor:
        """As `Runner.step`; ``inputs`` are views of `buffers` from the front (ValueError)."""
        if any(one.data_ptr() != own.data_ptr() for one, own in zip(inputs, self._inputs, strict=True) if one.numel()):
            raise ValueError("expected the front of this runner's own buffers, found other memory; see buffers()")
        images, rows = inputs.cond_row_I.shape[0], inputs.tokens_B.shape[0]
        bucket = bucket_of(images, rows, self.max_images)
        step = self._steps.get(bucket) or self._prepare(bucket)
        if step.graph is None:
            step = self._run(step)
        else:
            step.graph.replay()
            self._wait_for_all_but_the_last()
        assert step.codes_I is not None and step.logits_BV is not None
        self.logits_BV = step.logits_BV[:rows]
        return step.codes_I[:images]

    def _padding(self) -> ops.StepInputs:
        return step_buffers(self.config, self.cache.page_size, self.cache.scratch_page, self.max_images, self.device)

    def _run(self, step: Step) -> Step:
        cache = self.cache
        codes_I, logits_BV = ops.decode_step(
            self.weights, cache.k_LPSGD, cache.v_LPSGD, step.inputs, backend=step.backend
        )
        return step._replace(codes_I=codes_I, logits_BV=logits_BV)

    def _backend(self, bucket: Bucket) -> str:
        if self.backend is not None:
            return self.backend
        # by name, so that a model that they do not take is refused with the reason: the reference cannot be captured
        return "triton" if self.batch_invariant or bucket.rows <= FEW_ROWS else "blas"

    @torch.inference_mode()
    def _prepare(self, bucket: Bucket) -> Step:
        """A step ready to run: on a GPU run once, so that all is compiled and libraries have set themselves up, then
        captured. Running it is harmless in the middle of a generation: it writes what its replay will write again."""
        began = time.perf_counter()
        step = Step(front(self._inputs, *bucket), self._backend(bucket))
        if self.device.type == "cuda":
            step = self._captured(step)
        self._steps[bucket] = step
        self.warm_up_seconds += time.perf_counter() - began
        return step

    def _captured(self, step: Step) -> Step:
        with torch.cuda.device(self.device):
            before = self._free_bytes()
            self._side = side = self._side or torch.cuda.Stream()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._run(step)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # cuBLAS keeps a workspace a stream, which others may free and a graph would go on writing to: it makes a
            # new one during the capture, out of the graph's own memory, and forgets it after.
            torch._C._cuda_clearCublasWorkspaces()
            # thread_local: another thread, which decodes images, may allocate memory meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                step = self._run(step)
            torch._C._cuda_clearCublasWorkspaces()
            assert self.graph_bytes is not None
            self.graph_bytes += max(0, before - self._free_bytes())
        return step._replace(graph=graph)

    @staticmethod
    def _free_bytes() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def _wait_for_all_but_the_last(self) -> None:
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        self._queued.append(event)
        if len(self._queued) > AHEAD:
            self._queued.popleft().synchronize()
