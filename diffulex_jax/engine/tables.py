"""What the host tells the device of its slots: which pages they have, what is known of them, and whose adapter they use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from diffulex_jax.engine.dispatch import Plan
from diffulex_jax.engine.packing import AdapterOf
from diffulex_jax.engine.request import Tracked
from diffulex_jax.state import Dims


class Tables:
    """Page tables, kept from dispatch to dispatch: only what is new is written.

    Attributes:
      rows: for each number of rows of a data shard that a dispatch may have, the slots that they are.
      adapter_of: the number of a request's adapter; None where there are none.
    """

    def __init__(self, dims: Dims, *, num_pages: int, shards: int, few: Sequence[int], adapters: Sequence[str]):
        """``few``: numbers of rows beside all of a shard's slots. ``adapters``: names of those that the parameters hold, in order."""
        self._dims, self._none = dims, num_pages
        self._each = each = dims.slots // shards
        self.rows = {n: np.flatnonzero(np.arange(dims.slots) % each < n) for n in sorted({min(n, each) for n in (*few, each)})}
        self._numbers: dict[str | None, int] = {name: i for i, name in enumerate((None, *adapters))}
        self.adapter_of: AdapterOf | None = (lambda request: self._numbers[request.params.adapter_name]) if adapters else None
        self._pages, self._known = np.full((dims.slots, dims.pages_per_slot), num_pages, np.int32), np.zeros(dims.slots, np.int32)
        self._adapter = np.zeros(dims.slots, np.int32) if adapters else None
        # The list of pages that each row was made from, and how many of them.
        self._placed: list[tuple[list[int], int]] = [([], 0)] * dims.slots

    def place(self, running: dict[int, Tracked]) -> None:
        """Takes in what is new of requests by slot. Slots that nothing runs in keep old pages: their rows are not live."""
        for slot, request in running.items():
            pages, placed = self._placed[slot]
            if pages is not request.pages:
                placed = 0
                self._pages[slot] = self._none
            new = self.split(request.pages[placed:])
            first = len(new) // max(1, len(request.pages) - placed) * placed
            self._pages[slot, first : first + len(new)] = new
            self._placed[slot] = request.pages, len(request.pages)
            self._known[slot] = request.known
            if self._adapter is not None:
                self._adapter[slot] = self._numbers[request.params.adapter_name]

    def rows_for(self, running: Iterable[int]) -> list[int]:
        """Those numbers of ``rows`` whose slots are all that run, and maybe more; fewest first."""
        last = max((slot % self._each for slot in running), default=0)
        return [n for n in self.rows if n > last]

    def of(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """``pages`` and ``known`` of a ``Plan`` over so many ``rows`` of each shard."""
        slots = self.rows[rows]
        return self._pages[slots], self._known[slots]

    def plan(self, rows: int, *, max_steps: int, stop_on_finish: bool) -> Plan:
        """A dispatch over so many ``rows`` of each shard."""
        adapter = None if self._adapter is None else self._adapter[self.rows[rows]]
        return Plan(*self.of(rows), max_steps, stop_on_finish, adapter)

    def table(self, pages: Sequence[int], count: int | None = None) -> np.ndarray:
        """``[P]`` int32: a request's pages as the device knows them, the first ``count`` of them; one past the pool elsewhere."""
        table = np.full(self._dims.pages_per_slot, self._none, np.int32)
        own = self.split(pages)[:count]
        table[: len(own)] = own
        return table

    def split(self, pages: Sequence[int]) -> np.ndarray:
        """Pages of the pool: the scheduler's hold at least a block, and are several of the pool's where a block does not fit in one."""
        parts = self._dims.unit // self._dims.page
        return (np.asarray(pages, np.int32)[:, None] * parts + np.arange(parts, dtype=np.int32)).reshape(-1)

    def all_of(self, adapter: str | None, count: int) -> np.ndarray | None:
        """``[count]`` int32, the number of an adapter for each of so many rows; None where there are none."""
        return None if self._adapter is None else np.full(count, self._numbers[adapter], np.int32)
