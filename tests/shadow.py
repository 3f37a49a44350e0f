"""A device that computes nothing and remembers everything: which page holds the KV of which block of which prefix.

It follows the interface in ``engine.scheduler.Device``, moves rows as the decode step does, and fails on the first read of
a page that was never written, or that holds something else than the reader's own prefix.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Sequence

import numpy as np

from diffulex_jax.cache.pages import PagePool
from diffulex_jax.engine.pace import Pace
from diffulex_jax.engine.request import Chunk, Ended, Tracked
from diffulex_jax.engine.scheduler import Scheduler
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.state import LENGTH, RUNNING, Canvas, StepReport


BLOCK, POSITIONS = 4, 64

Place = tuple[int, int]
"""A page, and the number of a block in it."""


class StaleRead(AssertionError):
    pass


@dataclasses.dataclass
class Row:
    tokens: list[int]
    limit: int
    start: int
    written: int
    pending: bool = False
    ready: bool = False
    nfe: int = 0


class ShadowDevice:
    """See the module; blocks finish by the roll of a die."""

    def __init__(self, *, slots: int, seed: int, page: int, commit_alone: bool = False, keeps_window: bool = False):
        self.slots, self.random, self.per_page, self.commit_alone = slots, random.Random(seed), page // BLOCK, commit_alone
        self.keeps_window = keeps_window
        self.pages_of: dict[int, range] = {}  # those that the devices of a slot have
        self.content: dict[Place, tuple[int, ...]] = {}
        self.rows: dict[int, Row] = {}
        self.reads = 0

    def check(self, pages: list[int], tokens: list[int], blocks: int) -> None:
        for i in range(blocks):
            self.reads += 1
            found = self.content.get(self.place(pages, i))
            if found != tuple(tokens[: (i + 1) * BLOCK]):
                raise StaleRead(f"block {i} at {self.place(pages, i)}: {found}, wanted {tokens[: (i + 1) * BLOCK]}")

    def place(self, pages: list[int], block: int) -> Place:
        return pages[block // self.per_page], block % self.per_page

    def write(self, pages: list[int], tokens: list[int], block: int) -> None:
        self.content[self.place(pages, block)] = tuple(tokens[: (block + 1) * BLOCK])

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        for request, first, count in chunks:
            prompt = request.prompt.tolist()
            self.check(request.pages, prompt, first)
            for i in range(first, first + count):
                self.write(request.pages, prompt, i)

    def admit(self, request: Tracked) -> None:
        start, prompt = len(request.prompt) // BLOCK * BLOCK, request.prompt.tolist()
        limit = len(prompt) + request.params.max_tokens
        fill = random.Random(request.params.seed)  # the tokens a request decodes are its own, whatever happens around it
        tokens = prompt + [fill.randrange(100, 999) for _ in range(POSITIONS - len(prompt))]
        pending = self.commit_alone and len(prompt) == start
        self.rows[request.slot] = Row(tokens, limit, start, start - BLOCK * pending, pending)

    def save(self, request: Tracked):
        return copy.copy(self.rows[request.slot]), [self.content.get(self.place(request.pages, i)) for i in range(request.written)]

    def restore(self, request: Tracked) -> None:
        row, kv = request.saved
        self.rows[request.slot] = copy.copy(row)
        self.content |= {self.place(request.pages, i): content for i, content in enumerate(kv)}

    def release(self, slot: int) -> None:
        self.rows.pop(slot, None)  # it may have ended in the dispatch under way

    def read(self, request: Tracked) -> Canvas:
        tokens = np.array(self.rows[request.slot].tokens)
        return Canvas(*[tokens] * 4)

    def launch(self, running: dict[int, Tracked], *, max_steps: int, stop_on_finish: bool) -> StepReport:
        counts = [name for name in StepReport.__dataclass_fields__ if name != "tokens"]
        report = {name: np.zeros(self.slots, np.int64) for name in counts}
        tokens = np.zeros((self.slots, POSITIONS), np.int64)
        assert running.keys() == self.rows.keys()
        assert all(page in self.pages_of[slot] for slot, request in running.items() for page in request.pages)
        live = set(running)
        for _ in range(max_steps):
            last = {s: self.rows[s].start // BLOCK + self.keeps_window for s in live}
            starved = any(self.rows[s].ready and len(running[s].pages) * self.per_page <= last[s] for s in live)
            if not live or starved or (stop_on_finish and len(live) < len(running)):
                break
            for slot in sorted(live):
                if self.forward(self.rows[slot], running[slot].pages):
                    live.discard(slot)
        for slot, row in list(self.rows.items()):
            report["start"][slot], report["written_upto"][slot], report["nfe"][slot] = row.start, row.written, row.nfe
            report["settled_upto"][slot] = min(row.limit, row.start + BLOCK * row.ready)
            known = running[slot].known
            tokens[slot, : POSITIONS - known] = row.tokens[known:]
            if slot not in live:
                report["status"][slot], report["length"][slot] = LENGTH, row.limit
                del self.rows[slot]
        assert RUNNING == 0
        return StepReport(**report, tokens=tokens)

    def collect(self, launched: StepReport) -> StepReport:
        return launched

    def forward(self, row: Row, pages: list[int]) -> bool:
        """One step of a row; True when it ended."""
        if row.ready:
            row.start, row.pending, row.ready = row.start + BLOCK, True, False
        self.check(pages, row.tokens, row.written // BLOCK)
        assert not self.keeps_window or row.start // BLOCK < len(pages) * self.per_page, "a window without its pages"
        if row.pending:
            self.write(pages, row.tokens, row.start // BLOCK - 1)
            row.written, row.pending = row.start, False
            if self.commit_alone:
                row.nfe += 1
                return row.start + 1 >= row.limit
        row.nfe += 1
        row.ready = self.random.random() < 0.4
        return row.ready and row.start + BLOCK >= row.limit


class World:
    """A scheduler over a shadow device, and what a random user does to it."""

    def __init__(
        self, *, pool: float, seed: int, page: int = BLOCK, device: type[ShadowDevice] = ShadowDevice, shards: int = 1, **kind: bool
    ):
        """``pool``: of a shard, in longest requests. ``kind``: ``commit_alone`` and ``keeps_window``, of the scheduler and the device."""
        self.random = random.Random(seed)
        slots, longest = 4, POSITIONS // page
        each = max(longest, int(pool * longest))
        self.pools = [PagePool(each, first=i * each) for i in range(shards)]
        self.device = device(slots=slots, seed=seed, page=page, **kind)
        self.device.pages_of = {slot: range(each * i, each * (i + 1)) for slot in range(slots) for i in [slot * shards // slots]}
        sizes = {"slots": slots, "block": BLOCK, "page": page, "window": 1, "pace": Pace(24, (8,), 0), "steps_per_dispatch": 4}
        self.scheduler = Scheduler(self.device, self.pools, **sizes, root=b"", **kind)
        self.requests: dict[int, Tracked] = {}
        self.ended: list[Ended] = []
        self.count = 0

    def add(self) -> None:
        shared = [1] * self.random.randrange(0, 20)  # common beginnings, so that prefixes are found
        prompt = shared + [self.random.randrange(2, 5) for _ in range(self.random.randrange(1, 12))]
        params = SamplingParams(max_tokens=self.random.randrange(1, POSITIONS - len(prompt) + 1), seed=self.count)
        request = Tracked(id=self.count, prompt=np.array(prompt, np.int32), params=params)
        self.count += 1
        self.requests[request.id] = request
        self.scheduler.add(request)

    def step(self) -> None:
        for ended in self.scheduler.step():
            request = self.requests.pop(ended.request.id)
            assert len(request.tokens) == request.params.max_tokens
            self.ended.append(ended)

    def abort(self) -> None:
        if self.requests:
            self.scheduler.drop(self.requests.pop(self.random.choice(sorted(self.requests))))

    def preempt(self) -> None:
        placed = [r for r in self.requests.values() if r.slot is not None]
        if placed:
            self.scheduler.preempt(self.random.choice(placed))

    def finish(self) -> None:
        """Nothing is left waiting for ever, and an idle pool is free."""
        for _ in range(10_000):
            if not len(self.scheduler):
                break
            self.step()
        assert not self.requests and self.scheduler.stats["pages_held"] == 0

    @property
    def hits(self) -> int:
        """Pages that requests found."""
        return self.scheduler.stats["prefix_cache_hits"]
