"""Who is in the next step: first come, first served, pairs together, pages reserved in full.

An image is admitted when a slot and *all* pages that it can ever need (its conditional row, and its null row for as
long as it is guided) are free. Growing page by page would hold more images at once, but needs preemption or a proof
that some image can always finish; with full reservation an admitted image never waits again, so there is no deadlock,
and the strict order means that no request starves: the head of the queue waits only for images that are certain to
finish. The scheduler counts positions and never sees a code (every image has the same number of them), hence a step
needs nothing back from the device.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from retinar.engine.errors import InputError
from retinar.engine.kv_cache import PageAllocator, check_pool, pages_for
from retinar.engine.request import Request


@dataclass(eq=False)
class LiveImage:
    """An admitted image: ``position`` is that of its next input token, which is also the code that the step draws."""

    ticket: int
    request: Request
    slot: int
    guided_codes: int
    cond_pages: list[int]
    null_pages: list[int]
    position: int = 0

    @property
    def guided(self) -> bool:
        """Whether the next step runs a null row for this image."""
        return self.position < self.guided_codes


@dataclass
class Scheduler:
    """Requests in, live images out. ``changed`` says that the set of rows is not that of the step before.

    ``block_size`` codes an image; a pool of ``pages`` pages of ``page_size`` slots; at most ``max_images`` live at
    once.
    """

    block_size: int
    page_size: int
    pages: int
    max_images: int
    live: list[LiveImage] = field(default_factory=list)
    changed: bool = False

    def __post_init__(self) -> None:
        check_pool(self.page_size, self.pages)
        if self.max_images < 1:
            raise InputError(f"max-images must be at least 1, got {self.max_images}; try 16")
        self.allocator = PageAllocator(self.pages)
        self._waiting: OrderedDict[int, Request] = OrderedDict()
        self._slots = list(range(self.max_images - 1, -1, -1))
        self._next_ticket = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        return bool(self.live or self._waiting)

    def submit(self, request: Request) -> int:
        """Queue a request; returns its ticket. InputError when it could never fit the pool, with the numbers."""
        check_fits(pages_needed(request, self.block_size, self.page_size), self.page_size, self.pages)
        ticket = self._next_ticket
        self._next_ticket += 1
        self._waiting[ticket] = request
        return ticket

    def admit(self) -> int:
        """Move waiting requests, in order, into free slots and pages; returns how many. Stops at the first that must
        wait.
        """
        admitted = 0
        while self._waiting and self._slots:
            ticket, request = next(iter(self._waiting.items()))
            if pages_needed(request, self.block_size, self.page_size) > self.allocator.free:
                break
            del self._waiting[ticket]
            guided_codes = request.params.guided_codes(self.block_size)
            cond_pages = self.allocator.allocate(pages_for(self.block_size, self.page_size))
            null_pages = self.allocator.allocate(pages_for(guided_codes, self.page_size))
            slot = self._slots.pop()
            self.live.append(LiveImage(ticket, request, slot, guided_codes, cond_pages, null_pages))
            admitted += 1
        self.changed |= admitted > 0
        return admitted

    @property
    def quiet(self) -> int:
        """Steps for which the set of rows stays as it is, unless somebody submits or cancels; 0 with nobody live."""
        ends = (i.guided_codes if i.guided else self.block_size for i in self.live)
        return min((end - i.position for end, i in zip(ends, self.live, strict=True)), default=0)

    def advance(self, steps: int = 1) -> list[LiveImage]:
        """So many steps (at most `quiet`) are done: count them, release null rows whose guidance has ended, take out
        and return finished images.
        """
        finished = []
        for image in self.live:
            image.position += steps
            if image.position == image.guided_codes:
                self.allocator.release(image.null_pages)
                self.changed = True
            if image.position == self.block_size:
                finished.append(image)
        for image in finished:
            self._drop(image)
        return finished

    def cancel(self, ticket: int) -> bool:
        """Forget a waiting or live image and release its pages; False when the ticket is unknown or finished."""
        if self._waiting.pop(ticket, None) is not None:
            return True
        for image in self.live:
            if image.ticket == ticket:
                self._drop(image)
                return True
        return False

    def _drop(self, image: LiveImage) -> None:
        self.live.remove(image)
        self.allocator.release(image.cond_pages)
        self.allocator.release(image.null_pages)
        self._slots.append(image.slot)
        self.changed = True


def pages_needed(request: Request, block_size: int, page_size: int) -> int:
    """All pages that the image can need: the conditional row's and, while guided, the null row's."""
    return pages_for(block_size, page_size) + pages_for(request.params.guided_codes(block_size), page_size)


def check_fits(need: int, page_size: int, pages: int) -> None:
    """InputError when an image that needs ``need`` pages could wait for ever."""
    if need > pages:
        raise InputError(
            f"one image needs {need} pages of {page_size} slots and the pool has {pages}; "
            f"give at least --pages {need} or leave it out"
        )
