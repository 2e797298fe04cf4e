"""Pages: never leaked, never shared; the pool's size; NaN in unwritten slots changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from retinar.engine import kv_cache
from retinar.engine.config import GPTConfig
from retinar.engine.errors import InputError
from retinar.engine.kv_cache import KVCache, PageAllocator, check_pool, page_bytes, pages_for, pool_pages

CPU = torch.device("cpu")
CONFIG = GPTConfig(n_layer=2, n_head=4, n_kv_head=2, dim=64, vocab_size=64, num_classes=2, grid=6)


class Allocation(RuleBasedStateMachine):
    """Any order of taking and giving back: every page is free or has exactly one owner."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(13)
        self.owned: list[list[int]] = []

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        if count <= self.allocator.free:
            taken = self.allocator.allocate(count)
            assert len(taken) == count
            self.owned.append(taken)
        else:
            with pytest.raises(RuntimeError, match="free"):
                self.allocator.allocate(count)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        taken = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        again = list(taken)
        self.allocator.release(taken)
        assert taken == []
        if again:
            with pytest.raises(RuntimeError, match="twice"):
                self.allocator.release(again)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        pages = [page for taken in self.owned for page in taken]
        assert len(pages) == len(set(pages)) == 13 - self.allocator.free
        assert set(pages) <= set(range(13))


TestAllocation = Allocation.TestCase
TestAllocation.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_all_pages_come_back() -> None:
    allocator = PageAllocator(5)
    taken = allocator.allocate(5)
    assert sorted(taken) == [0, 1, 2, 3, 4] and allocator.free == 0
    allocator.release(taken)
    assert allocator.free == 5


@settings(deadline=None)
@given(positions=st.integers(0, 5000), exponent=st.integers(0, 11))
def test_pages_for_is_the_least_number_that_holds(positions: int, exponent: int) -> None:
    size = 1 << exponent
    pages = pages_for(positions, size)
    assert pages * size >= positions > (pages - 1) * size


@pytest.mark.parametrize("page_size", [0, -16, 3, 24, 1000])
def test_page_size_must_be_a_power_of_two(page_size: int) -> None:
    with pytest.raises(InputError, match=f"power of two.*got {page_size}"):
        check_pool(page_size)


@pytest.mark.parametrize("pages", [0, -1])
def test_no_pages_is_refused(pages: int) -> None:
    with pytest.raises(InputError, match=f"at least 1, got {pages}"):
        KVCache(CONFIG, pages=pages, page_size=16, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 16, 1024])
def test_shape_and_bytes(dtype: torch.dtype, page_size: int) -> None:
    cache = KVCache(CONFIG, pages=3, page_size=page_size, dtype=dtype, device=CPU)
    assert cache.k_LPSGD.shape == cache.v_LPSGD.shape == (2, 4, page_size, 2, 16)  # one is scratch
    assert cache.scratch_page == cache.pages == 3
    assert cache.k_LPSGD.dtype == dtype
    assert cache.k_LPSGD.nbytes + cache.v_LPSGD.nbytes == 4 * page_bytes(CONFIG, page_size, dtype)


def test_pool_is_bounded_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    one = page_bytes(CONFIG, 16, torch.float32)
    monkeypatch.setattr(kv_cache, "free_memory", lambda device: 20 * one)  # half of it may be used
    assert pool_pages(4, 3, CONFIG, 16, torch.float32, CPU) == 4
    assert pool_pages(64, 3, CONFIG, 16, torch.float32, CPU) == 9  # and the scratch page
    with pytest.raises(InputError, match=r"one image needs .* MiB of KV cache .* MiB free"):
        pool_pages(64, 10, CONFIG, 16, torch.float32, CPU)


def test_free_memory_is_plausible() -> None:
    assert 1 << 20 < kv_cache.free_memory(CPU) < 1 << 50


def test_a_cache_beyond_memory_is_a_sentence() -> None:
    with pytest.raises(InputError, match="GiB, more than cpu has"):
        KVCache(CONFIG, pages=1 << 40, page_size=16, dtype=torch.float32, device=CPU)
