"""Random arrivals, sizes and pools: nothing leaks, nothing is shared, everyone finishes, in order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinar.engine.errors import InputError
from retinar.engine.request import Request, SamplingParams, make_request
from retinar.engine.scheduler import Scheduler, pages_needed

BLOCK = 9


def request(index: int = 0, cfg_scale: float = 2.0, cfg_interval: int = -1) -> Request:
    return make_request(index, 0, SamplingParams(cfg_scale=cfg_scale, cfg_interval=cfg_interval))


def check_pages(scheduler: Scheduler) -> None:
    """Pages of live rows are disjoint, and with the free ones make up the pool; each row holds what it still needs."""
    pages = [page for image in scheduler.live for page in (*image.cond_pages, *image.null_pages)]
    assert len(pages) == len(set(pages)) == scheduler.pages - scheduler.allocator.free
    for image in scheduler.live:
        assert image.position < len(image.cond_pages) * scheduler.page_size
        assert bool(image.null_pages) == image.guided
        if image.guided:
            assert image.position < len(image.null_pages) * scheduler.page_size
    slots = [image.slot for image in scheduler.live]
    assert len(set(slots)) == len(slots) <= scheduler.max_images


requests = st.builds(
    request, st.integers(0, 1000), st.sampled_from([0.0, 1.0, 1.5, 4.0]), st.sampled_from([-1, 0, 3, 7, 8, 100])
)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 4), requests), min_size=1, max_size=25),
    exponent=st.integers(0, 4),
    spare=st.integers(0, 40),
    max_images=st.integers(1, 9),
    cancels=st.dictionaries(st.integers(0, 60), st.integers(0, 24), max_size=6),
)
def test_every_image_finishes_and_no_page_leaks(
    arrivals: list[tuple[int, Request]], exponent: int, spare: int, max_images: int, cancels: dict[int, int]
) -> None:
    page_size = 1 << exponent
    pages = max(pages_needed(r, BLOCK, page_size) for _, r in arrivals) + spare
    scheduler = Scheduler(BLOCK, page_size, pages, max_images)
    due: list[tuple[int, Request]] = []
    time = 0
    for delay, one in arrivals:
        time += delay
        due.append((time, one))

    finished: list[int] = []
    cancelled: set[int] = set()
    admitted: list[int] = []
    steps = submitted = 0
    while submitted < len(due) or scheduler.busy:
        while submitted < len(due) and due[submitted][0] <= steps:
            assert scheduler.submit(due[submitted][1]) == submitted
            submitted += 1
        if (ticket := cancels.get(steps)) is not None and scheduler.cancel(ticket):
            cancelled.add(ticket)
            assert not scheduler.cancel(ticket)
        scheduler.admit()
        admitted += [image.ticket for image in scheduler.live if image.ticket not in admitted]
        check_pages(scheduler)
        assert scheduler.live or not scheduler.waiting, "a free pool makes somebody wait"
        for done in scheduler.advance():
            assert done.position == BLOCK and not done.cond_pages and not done.null_pages
            finished.append(done.ticket)
        check_pages(scheduler)
        steps += 1
        assert steps <= due[-1][0] + BLOCK * (len(due) + 1), "an image starves"
    assert admitted == sorted(admitted), "admission is not first come, first served"
    assert sorted(finished + list(cancelled)) == list(range(len(due))) and len(set(finished)) == len(finished)
    assert scheduler.allocator.free == pages


def run(scheduler: Scheduler) -> list[list[tuple[int, int, bool]]]:
    """(ticket, position, guided) of the live images, step by step."""
    seen = []
    while scheduler.busy:
        scheduler.admit()
        seen.append([(image.ticket, image.position, image.guided) for image in scheduler.live])
        scheduler.advance()
    return seen


def test_rows_at_different_positions_share_a_step() -> None:
    scheduler = Scheduler(BLOCK, 4, 2 * 3 * 2, max_images=8)
    scheduler.submit(request(0))
    for _ in range(5):
        scheduler.admit()
        scheduler.advance()
    scheduler.submit(request(1))
    scheduler.admit()
    assert [image.position for image in scheduler.live] == [5, 0]


def test_a_pair_takes_both_rows_at_once() -> None:
    scheduler = Scheduler(BLOCK, 16, 3, max_images=8)
    scheduler.submit(request(0))
    scheduler.submit(request(1))
    assert scheduler.admit() == 1 and scheduler.allocator.free == 1
    assert scheduler.waiting == 1


def test_max_images_bounds_the_live_ones() -> None:
    scheduler = Scheduler(BLOCK, 16, 100, max_images=3)
    for index in range(8):
        scheduler.submit(request(index))
    assert max(len(step) for step in run(scheduler)) == 3


@pytest.mark.parametrize(("interval", "guided"), [(-1, BLOCK), (0, 2), (3, 5), (6, 8), (7, 9), (8, 9), (99, 9)])
def test_null_rows_leave_when_guidance_stops(interval: int, guided: int) -> None:
    scheduler = Scheduler(BLOCK, 1, 100, max_images=1)
    scheduler.submit(request(cfg_interval=interval))
    steps = run(scheduler)
    assert [step[0][2] for step in steps] == [True] * guided + [False] * (BLOCK - guided)
    assert scheduler.allocator.free == 100


def test_their_pages_are_free_for_the_next_image_at_once() -> None:
    # 9 + 2 slots the first image; of 18, 7 are free: the second (9) fits as soon as the first's null row has left
    scheduler = Scheduler(BLOCK, 1, 18, max_images=2)
    scheduler.submit(request(0, cfg_interval=0))
    scheduler.submit(request(1, cfg_scale=1.0))
    steps = run(scheduler)
    assert [len(step) for step in steps] == [1, 1] + [2] * 7 + [1] * 2


def test_changed_tells_when_the_rows_change() -> None:
    scheduler = Scheduler(BLOCK, 4, 100, max_images=4)
    scheduler.submit(request(0, cfg_interval=2))
    changes = []
    while scheduler.busy:
        scheduler.admit()
        changes.append(scheduler.changed)
        scheduler.changed = False
        scheduler.advance()
    assert changes == [True, False, False, False, True, False, False, False, False]
    assert scheduler.changed


@settings(max_examples=100, deadline=None)
@given(st.lists(requests, min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 20))
def test_nothing_changes_while_it_is_quiet(arrivals: list[Request], max_images: int, spare: int) -> None:
    """Advancing by whole quiet stretches goes through the same sets of rows as advancing step by step."""
    pages = max(pages_needed(r, BLOCK, 2) for r in arrivals) + spare
    one_by_one, in_leaps = (Scheduler(BLOCK, 2, pages, max_images) for _ in range(2))
    for each in arrivals:
        one_by_one.submit(each)
        in_leaps.submit(each)
    sets = []
    for step in run(one_by_one):
        rows = [(ticket, guided) for ticket, _, guided in step]
        sets += [rows] if not sets or sets[-1] != rows else []
    leaps = []
    assert in_leaps.quiet == 0
    while in_leaps.busy:
        in_leaps.admit()
        leaps.append([(image.ticket, image.guided) for image in in_leaps.live])
        in_leaps.advance(in_leaps.quiet)
    assert leaps == sets


@pytest.mark.parametrize("live", [False, True])
def test_cancel_releases_pages(live: bool) -> None:
    scheduler = Scheduler(BLOCK, 4, 10, max_images=4)
    ticket = scheduler.submit(request())
    if live:
        scheduler.admit()
        scheduler.advance()
        assert scheduler.allocator.free < 10
    assert scheduler.cancel(ticket)
    assert scheduler.allocator.free == 10 and not scheduler.busy
    assert not scheduler.cancel(ticket) and not scheduler.cancel(99)


def test_what_can_never_fit_is_refused_with_numbers() -> None:
    scheduler = Scheduler(BLOCK, 4, 5, max_images=4)
    with pytest.raises(InputError, match=r"needs 6 pages of 4 slots and the pool has 5.*--pages 6"):
        scheduler.submit(request())
    scheduler.submit(request(cfg_scale=1.0))
    assert len(run(scheduler)) == BLOCK


def test_no_room_for_images_is_refused() -> None:
    with pytest.raises(InputError, match="max-images must be at least 1, got 0"):
        Scheduler(BLOCK, 4, 5, max_images=0)
