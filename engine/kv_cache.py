"""The paged KV cache: a pool of equal pages, and the list of those that are free.

A row (one sequence) owns whole pages and reaches them through its block table; slot ``p % page_size`` of its page
number ``p // page_size`` holds position p. Bookkeeping (``PageAllocator``) and memory (``KVCache``) know nothing of
each other, so that the first can be tested on its own and the second be captured in a graph.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from retinar.engine.config import GPTConfig
from retinar.engine.errors import InputError
from retinar.kernels import ops

# Of the memory that is free now, the share that the pool may take: the rest is for activations and the image decoder.
FREE_SHARE_CPU = 0.5
FREE_SHARE_GPU = 0.8


class PageAllocator:
    """Which pages are free. A page has at most one owner at a time; the last released is handed out first (warm in
    cache).
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._used = bytearray(pages)

    @property
    def free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages. The caller has checked ``free``; asking for more is a bug (RuntimeError), not bad
        input.
        """
        if count > len(self._free):
            raise RuntimeError(f"{count} pages asked for, {len(self._free)} free: admission must wait for them")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._used[page] = 1
        return taken

    def release(self, taken: list[int]) -> None:
        """Give pages back and empty the list, so that a second release of the same list frees nothing twice."""
        for page in taken:
            if not self._used[page]:
                raise RuntimeError(f"page {page} is released twice")
            self._used[page] = 0
        self._free.extend(reversed(taken))
        taken.clear()


class KVCache:
    """Keys and values [L, P + 1, S, G, D] (layers, pages, slots, kv heads, head dim): fp32, bf16, or int8 with fp32
    scales [L, P + 1, S, G].

    The last page, ``scratch_page``, belongs to no image: the padding rows of a step write there.
    The memory starts as zeros (pages that the system hands out lazily on a CPU) and is never cleared again: no result
    may depend on what an unwritten slot holds, which the tests check with NaN.
    """

    def __init__(
        self, config: GPTConfig, *, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        check_pool(page_size, pages)
        self.page_size, self.pages, self.scratch_page = page_size, pages, pages
        shape = (config.n_layer, pages + 1, page_size, config.kv_heads, config.head_dim)
        try:
            self.k_LPSGD = torch.zeros(shape, dtype=dtype, device=device)
            self.v_LPSGD = torch.zeros(shape, dtype=dtype, device=device)
            if device.type == "cpu":
                for cache_LPSGD in (self.k_LPSGD, self.v_LPSGD):
                    ops.huge_pages(cache_LPSGD)
            scales = [torch.zeros(shape[:-1], device=device) if dtype == torch.int8 else None for _ in range(2)]
            self.k_scale_LPSG, self.v_scale_LPSG = scales
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU allocator raises a bare one
            size = (pages + 1) * page_bytes(config, page_size, dtype) / 2**30
            raise InputError(
                f"a KV cache of {pages} pages needs {size:.1f} GiB, more than {device} has; lower --pages"
            ) from error


def check_pool(page_size: int, pages: int | None = None) -> None:
    """InputError unless ``page_size`` is a power of two and ``pages``, where given, at least 1."""
    if page_size < 1 or page_size & (page_size - 1):
        raise InputError(f"page-size must be a power of two (1, 2, 4, ...), got {page_size}; try 16")
    if pages is not None and pages < 1:
        raise InputError(f"pages must be at least 1, got {pages}; leave it out to size the pool from free memory")


def pages_for(positions: int, page_size: int) -> int:
    """Pages that hold ``positions`` slots."""
    return -(-positions // page_size)


def page_bytes(config: GPTConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, keys and values, with the scales of int8."""
    head = config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
    return 2 * config.n_layer * page_size * config.kv_heads * head


def pool_pages(
    wanted: int, least: int, config: GPTConfig, page_size: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Pages of a pool that serves ``wanted`` if free memory allows, else what fits; InputError when not even
    ``least`` fit.
    """
    share = FREE_SHARE_GPU if device.type == "cuda" else FREE_SHARE_CPU
    free = free_memory(device)
    fit = int(share * free) // page_bytes(config, page_size, dtype) - 1  # for the scratch page
    if fit < least:
        need = least * page_bytes(config, page_size, dtype)
        raise InputError(
            f"one image needs {need / 2**20:.0f} MiB of KV cache and {device} has {free / 2**20:.0f} MiB free "
            f"(of which {share:.0%} may be used); free some memory or use bfloat16"
        )
    return max(1, min(wanted, fit))


def free_memory(device: torch.device) -> int:
    """Bytes free now: the GPU's, or the system's available memory within the control group's limit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # blocks that torch keeps for later, and the pools of graphs that are gone
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: half of the physical memory
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return free
    return max(0, min(free, limit))
