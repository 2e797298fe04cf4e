"""Sizes that steps are prepared for: large enough, few, and known before the first step."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from retinar.engine.buckets import BLOCK, Bucket, bucket_of, buckets_of, sizes
from retinar.engine.config import GPTConfig
from retinar.engine.request import Request, SamplingParams, make_request
from retinar.engine.scheduler import Scheduler, pages_needed

CONFIG = GPTConfig(n_layer=1, n_head=1, dim=4, multiple_of=4, vocab_size=8, num_classes=2, grid=3)
BLOCK_SIZE = CONFIG.block_size


@given(st.integers(1, 600))
def test_sizes_rise_to_the_most_and_waste_little(most: int) -> None:
    found = sizes(most)
    assert found == sorted(set(found)) and found[-1] == most
    for smaller, larger in zip([0, *found], found, strict=False):
        # one row more than a size is padded to less than the double of it, and above a block within that block
        assert larger <= 2 * (smaller + 1) and (larger <= BLOCK or (larger - 1) // BLOCK == smaller // BLOCK)


@given(st.integers(1, 300), st.data())
def test_a_bucket_is_the_smallest_that_holds_the_step(most: int, data: st.DataObject) -> None:
    images = data.draw(st.integers(1, most))
    rows = data.draw(st.integers(images, 2 * images))
    found = bucket_of(images, rows, most)
    assert found.images >= images and found.rows >= rows
    assert not [each for each in sizes(most) if images <= each < found.images]
    assert not [each for each in sizes(2 * most) if rows <= each < found.rows]


kinds = st.builds(
    lambda index, scale, interval: make_request(index, 0, SamplingParams(cfg_scale=scale, cfg_interval=interval)),
    st.integers(0, 9),
    st.sampled_from([1.0, 2.0]),
    st.sampled_from([-1, 0, 4]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(kinds, min_size=1, max_size=20), st.integers(1, 9), st.integers(0, 30), st.integers(0, 4))
def test_what_requests_will_need_is_known(requests: list[Request], limit: int, spare: int, room: int) -> None:
    pages = max(pages_needed(each, BLOCK_SIZE, 2) for each in requests) + spare
    scheduler = Scheduler(BLOCK_SIZE, 2, pages, limit)
    for each in requests:
        scheduler.submit(each)
    seen: set[Bucket] = set()
    while scheduler.busy:
        scheduler.admit()
        rows = len(scheduler.live) + sum(image.guided for image in scheduler.live)
        seen.add(bucket_of(len(scheduler.live), rows, limit + room))
        scheduler.advance()
    found = buckets_of(requests, CONFIG, page_size=2, pages=pages, max_images=limit, most=limit + room)
    assert found == seen
