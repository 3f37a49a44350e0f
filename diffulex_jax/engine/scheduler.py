"""Which request runs where and when: host logic only. The device is behind a small interface, so tests can put a model of it there."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from diffulex_jax.cache.pages import PagePool, chain_digest
from diffulex_jax.engine.pace import CREDIT, Pace
from diffulex_jax.engine.request import Chunk, Ended, Tracked
from diffulex_jax.engine.shards import Shard, by_preference, make_shards
from diffulex_jax.state import ERROR, RUNNING, Canvas, StepReport


_LEAST_STEPS = 2  # between prompts
_MOST_PREFILL_BLOCKS = 16  # of one request in turn
_COUNTS = [name for name in StepReport.__dataclass_fields__ if name != "tokens"]
_MOST_AHEAD = 32  # times so many tokens of prompts as are free, before the steps of those whose prompts are done
_SPARE_BLOCKS = 3  # that a row may finish in a dispatch beside the one that the host knows of, where pages are plenty
_MOST_PASSED_OVER = 64  # so often may later requests overtake one that waits for pages


class Device(Protocol):
    """What the scheduler asks of the device. Calls take effect in order."""

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """Writes the KV of prompt blocks into the pages of their requests; those before them were written, or come before them here."""

    def admit(self, request: Tracked) -> None:
        """Sets up the request's row in its slot."""

    def save(self, request: Tracked) -> Any:
        """The request's row and the KV of its written blocks."""

    def restore(self, request: Tracked) -> None:
        """Puts what :meth:`save` gave (``request.saved``) into the request's slot and pages."""

    def release(self, slot: int) -> None:
        """Stops the row in ``slot``."""

    def read(self, request: Tracked) -> Canvas:
        """All that is known of the positions of the row in the request's slot."""

    def launch(self, running: dict[int, Tracked], *, max_steps: int, stop_on_finish: bool) -> Any:
        """Begins to denoise; does not wait."""

    def collect(self, launched: Any) -> StepReport:
        """Waits for what :meth:`launch` began, and gives its report (NumPy arrays)."""


class Flight(NamedTuple):
    """What the device is busy with: the launched work, and the requests in it by slot."""

    launched: Any
    running: dict[int, Tracked]


class Scheduler:
    """First come, first served, over slots and pages; nobody waits behind one who waits for more pages than there are."""

    def __init__(
        self,
        device: Device,
        pools: Sequence[PagePool],
        *,
        slots: int,
        block: int,
        page: int,
        window: int,
        pace: Pace,
        steps_per_dispatch: int,
        root: bytes,
        whole_prompts: bool = False,
        prompt_apart: bool = False,
        commit_alone: bool = False,
        keeps_window: bool = False,
        paged: bool = True,
    ):
        """Makes one.

        Args:
          pools: the pages of each data shard. Each has its equal part of the ``slots``, in order.
          page: tokens of a page, one or several blocks.
          pace: how prompts and requests that decode share the device, of each data shard.
          whole_prompts: a prompt is prefilled in one piece, however long.
          prompt_apart: see ``state.Dims``. The last block of a prompt is written before the first step too, however few tokens it has.
          commit_alone: see ``state.Dims``. The last block of a prompt that ends with one is left to the first step, which decides the
            token behind it.
          keeps_window: a block has its pages from its first step on, not only when it is committed.
          paged: otherwise requests take no pages, and their prompts are not prefilled.
        """
        self.device, self._shards = device, make_shards(pools, slots)
        self.block, self.page, self.window, self.pace = block, page, window, pace
        self._per_page = page // block
        self.steps_per_dispatch = steps_per_dispatch
        self.waiting: collections.deque[Tracked] = collections.deque()
        self.prefilling: collections.deque[Tracked] = collections.deque()
        self.running: dict[int, Tracked] = {}
        self.preemptions = 0
        self._root, self._whole_prompts, self._commit_alone, self._paged = root, whole_prompts, commit_alone, paged
        self._keeps_window, self._prompt_apart = keeps_window, prompt_apart
        self._admitted = 0
        # Steps that come before the next prompts, where somebody would notice; below 0 prompts have so many in advance.
        self._owed = -CREDIT
        # Tokens of prompts since the last steps; the last of the requests that those wait for who have shown nothing.
        self._ahead, self._burst = 0, 0
        self._flight: Flight | None = None
        self._ended: list[Ended] = []

    def __len__(self) -> int:
        return len(self.waiting) + len(self.prefilling) + len(self.running) + len(self._ended)

    @property
    def stats(self) -> dict[str, int]:
        """Counters and gauges: requests, pages, prefix cache lookups in pages, preemptions."""
        pools = [shard.pages for shard in self._shards]
        return {
            "waiting": len(self.waiting),
            "prefilling": len(self.prefilling),
            "running": len(self.running),
            "pages": sum(pool.num_pages for pool in pools),
            "pages_held": sum(pool.num_held for pool in pools),
            "prefix_cache_queries": sum(pool.queries for pool in pools),
            "prefix_cache_hits": sum(pool.hits for pool in pools),
            "preemptions": self.preemptions,
        }

    def add(self, request: Tracked) -> None:
        self.waiting.append(request)

    def step(self) -> list[Ended]:
        """Collects the last dispatch, admits, prefills what the pace allows, launches the next; returns what ended."""
        self.settle()
        self._admit()
        noticed = self._noticed()
        self._prefill(noticed)
        for request in sorted(self.running.values(), key=lambda r: r.order):
            if request.slot is not None:
                self._provide_page(request)
        busy = bool(self.prefilling)
        if self.running and not (busy and self._waits_for_prompts(noticed)):
            self._ahead = 0
            for request in self.running.values():
                self._provide_spare_pages(request)
            owed = max(_LEAST_STEPS, self._owed if noticed else 0)
            steps = min(owed, self.steps_per_dispatch) if busy else self.steps_per_dispatch
            launched = self.device.launch(self.running, max_steps=steps, stop_on_finish=busy or bool(self.waiting))
            self._flight = Flight(launched, dict(self.running))
        ended, self._ended = self._ended, []
        return ended

    def settle(self) -> None:
        """Waits for the dispatch under way, if there is one: then host and device know the same. :meth:`step` gives what ended."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._ended += self._collect(self.device.collect(flight.launched), flight.running)

    def forget_prefixes(self) -> None:
        """Prefixes that earlier requests left are found no more."""
        for shard in self._shards:
            shard.pages.forget()

    def has_ended(self, request: Tracked) -> bool:
        """Whether it ended in a dispatch that was collected, and the next :meth:`step` will say so."""
        return any(ended.request is request for ended in self._ended)

    def drop(self, request: Tracked) -> None:
        """Takes a request out, wherever it is; its pages and slot come back."""
        if request in self.waiting:
            self.waiting.remove(request)
            return
        if self.has_ended(request):
            self._ended = [ended for ended in self._ended if ended.request is not request]
            return
        if request in self.prefilling:
            self.prefilling.remove(request)
        else:
            assert request.slot is not None
            del self.running[request.slot]
            self.device.release(request.slot)
        self._vacate(request)

    def preempt(self, request: Tracked) -> None:
        """Moves a request from its slot back to the head of the queue, with all it needs to go on exactly as it was.

        A request that turns out to have ended stays ended.
        """
        self.settle()
        if request.slot is None:
            return
        self.preemptions += 1
        self._owed = min(self._owed, 0)  # pages are short: prompts that hold some should get on
        if request in self.prefilling:
            self.prefilling.remove(request)
            request.written = 0
        else:
            request.saved = self.device.save(request)
            del self.running[request.slot]
            self.device.release(request.slot)
        self._vacate(request)
        self.waiting.appendleft(request)

    def _vacate(self, request: Tracked) -> None:
        assert request.slot is not None
        shard = self._shard_of(request)
        shard.free_slots.append(request.slot)
        request.slot = None
        shard.pages.release(request.pages)
        request.pages = []

    def _admit(self) -> None:
        for request in list(self.waiting):
            if not any(shard.free_slots for shard in self._shards):
                return
            shard = self._place(request)
            if shard is None:
                request.passed_over += 1
                if request.passed_over > _MOST_PASSED_OVER:
                    return
                continue
            self.waiting.remove(request)
            request.slot = min(shard.free_slots)
            shard.free_slots.remove(request.slot)
            self._admitted += 1
            request.order = self._admitted
            request.began = request.began or time.perf_counter()
            if request.saved is not None:
                self.device.restore(request)
                request.saved = None
                self.running[request.slot] = request
            elif request.written < self._to_prefill(request):
                self.prefilling.append(request)
            else:
                self._start(request)

    def _start(self, request: Tracked) -> None:
        """From here on it denoises."""
        assert request.slot is not None
        self.device.admit(request)
        self.running[request.slot] = request

    def _place(self, request: Tracked) -> Shard | None:
        """A shard with a free slot and the pages to go on with, which the request holds from then on."""
        if request.saved is None:
            self._digest(request, self._to_prefill(request) // self._per_page)
        digests = request.digests if request.saved is None else ()
        return next((shard for shard in by_preference(self._shards, digests) if self._take_pages(request, shard.pages)), None)

    def _take_pages(self, request: Tracked, pool: PagePool) -> bool:
        """Pages to go on with: those of written or whole prompt blocks, and one for the first block of the window."""
        if not self._paged:
            return True
        if request.saved is not None:
            needed = self._pages_upto(request, (request.written + 1) * self.block)
            if pool.num_available < needed:
                return False
            request.pages = pool.allocate(needed)
            return True
        whole = len(request.prompt) // self.block
        shared = pool.match(request.digests)
        needed = self._pages_upto(request, (whole + 1) * self.block) - len(shared)
        if pool.num_available < needed:
            pool.release(shared)
            return False
        request.pages = shared + pool.allocate(needed)
        request.written = len(shared) * self._per_page
        request.start = len(request.prompt) if self._prompt_apart else whole * self.block
        return True

    def _pages_upto(self, request: Tracked, position: int) -> int:
        """Pages that hold the positions of a request below ``position``."""
        return -(-min(position, len(request.prompt) + request.params.max_tokens) // self.page)

    def _prefill(self, noticed: bool) -> None:
        """Prompt blocks up to what the pace allows in each shard: some of each request in turn, all in one call. Shards compute at the
        same time, so what the fullest takes goes for all."""
        if noticed and self._owed > 0:
            return
        decoding = max(collections.Counter(map(self._shard_index, self.running.values())).values(), default=0) * self.window * self.block
        most = max(self.block, self.pace.prompts(decoding, credit=-self._owed) if noticed else self.pace.budget)
        budgets = [most] * len(self._shards)
        chunks: list[Chunk] = []
        done: list[Tracked] = []
        while request := next((r for r in self.prefilling if budgets[self._shard_index(r)] >= self.block), None):
            self.prefilling.remove(request)
            at = self._shard_index(request)
            left = self._to_prefill(request) - request.written
            count = left if self._whole_prompts else min(left, budgets[at] // self.block, _MOST_PREFILL_BLOCKS)
            chunks.append(Chunk(request, request.written, count))
            self._publish(request, request.written + count)
            budgets[at] -= count * self.block
            (self.prefilling if count < left else done).append(request)
        if chunks:
            self.device.prefill(chunks)
            self._ahead += most - min(budgets)
            self._owed += self.pace.steps(most - min(budgets), decoding) if noticed else 0
        for request in done:
            self._start(request)

    def _noticed(self) -> bool:
        """Whether somebody has seen tokens and waits for more: whoever has none waits for their first block, whatever comes before it."""
        return any(request.tokens for request in self.running.values())

    def _waits_for_prompts(self, noticed: bool) -> bool:
        """Whether those that have shown nothing yet wait for the prompts of others that came with them: a step takes as long for a few as
        for all. Whoever comes later holds nobody up."""
        self._burst = 0 if noticed else self._burst or self._admitted
        came_together = any(request.order <= self._burst for request in self.prefilling)
        return came_together and self._ahead < _MOST_AHEAD * self.pace.free

    def _to_prefill(self, request: Tracked) -> int:
        """Blocks of the prompt that are written before the first step."""
        if not self._paged:
            return 0
        whole, left = divmod(len(request.prompt), self.block)
        return whole + (self._prompt_apart and left > 0) - (self._commit_alone and left == 0)

    def _provide_page(self, request: Tracked) -> None:
        """Makes sure the window's first block can be committed, and, where it must, that the window can move on; the youngest others of its
        shard give way when pages run out."""
        if not self._paged:
            return
        upto = request.start + (1 + self._keeps_window) * self.block
        missing = self._pages_upto(request, upto) - len(request.pages)
        shard = self._shard_of(request)
        while missing > 0 and shard.pages.num_available < missing:
            beside = [r for r in (*self.running.values(), *self.prefilling) if self._shard_of(r) is shard]
            youngest = max(beside, key=lambda r: r.order)
            self.preempt(youngest)
            if youngest is request:
                return
        if missing > 0:
            request.pages += shard.pages.allocate(missing)

    def _provide_spare_pages(self, request: Tracked) -> None:
        """Pages for blocks that the row may finish before the host hears of it, unless others may miss them: without, a dispatch ends."""
        if not self._paged:
            return
        spare = self._pages_upto(request, request.start + (1 + self._keeps_window + _SPARE_BLOCKS) * self.block) - len(request.pages)
        pages = self._shard_of(request).pages
        if spare > 0 and pages.num_available >= spare + len(self.running):
            request.pages += pages.allocate(spare)

    def _shard_of(self, request: Tracked) -> Shard:
        return self._shards[self._shard_index(request)]

    def _shard_index(self, request: Tracked) -> int:
        assert request.slot is not None
        return request.slot // self._shards[0].slots

    def _collect(self, report: StepReport, launched: dict[int, Tracked]) -> list[Ended]:
        ended, now, steps = [], time.perf_counter(), 0
        for slot, request in launched.items():
            if self.running.get(slot) is not request:
                continue  # dropped while the device was busy with it
            row = {name: int(getattr(report, name)[slot]) for name in _COUNTS}
            status, known = row["status"], request.known
            steps = max(steps, row["nfe"] - request.nfe)
            request.start, request.nfe, request.revised, request.remasked = (row[n] for n in ("start", "nfe", "revised", "remasked"))
            settled = row["settled_upto"] if status == RUNNING else row["length"]
            request.tokens += report.tokens[slot, : max(0, settled - known)].tolist()
            if request.tokens:
                request.settled = request.settled or now
            if status != ERROR:
                self._publish(request, -(-row["written_upto"] // self.block))
            if status != RUNNING:
                ended.append(Ended(request, status, self.device.read(request) if request.wants_sequence else None))
                del self.running[slot]
                self._vacate(request)
        self._owed = max(-CREDIT, self._owed - steps)
        return ended

    def _publish(self, request: Tracked, written: int) -> None:
        """Pages whose blocks all have their KV become findable; only a prefill about to begin and the step's own report say that it is
        written."""
        full = written // self._per_page
        self._digest(request, full)
        for i in range(request.written // self._per_page, full):
            self._shard_of(request).pages.publish(request.pages[i], request.digests[i])
        request.written = written

    def _digest(self, request: Tracked, pages: int) -> None:
        """Makes ``request.digests`` reach over so many first pages, each continuing the one before it, the first the engine's and the
        request's salt."""
        for i in range(len(request.digests), pages):
            parent = request.digests[-1] if request.digests else self._root + request.salt
            request.digests.append(chain_digest(parent, request.known_tokens(i * self.page, self.page)))
