"""Which page belongs to whom: a host allocator over NumPy arrays."""

from __future__ import annotations

import numpy as np


class PageAllocator:
    """Hands out pages of a pool. Invariant: every page is either free or held, never both, never twice."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = np.arange(num_pages, dtype=np.int32)
        self._count = num_pages
        self._held = np.zeros(num_pages, bool)

    @property
    def num_free(self) -> int:
        return self._count

    def allocate(self, n: int) -> np.ndarray:
        """``[n]`` int32 page ids.

        Raises:
          ValueError: when fewer than ``n`` pages are free; nothing is taken then.
        """
        if n > self._count:
            raise ValueError(f"{n} pages asked for, {self._count} of {self.num_pages} are free")
        pages = self._free[self._count - n : self._count].copy()
        self._count -= n
        self._held[pages] = True
        return pages

    def free(self, pages: np.ndarray) -> None:
        """Gives pages back.

        Raises:
          ValueError: when a page is not held (a double free).
        """
        if not self._held[pages].all() or len(np.unique(pages)) != len(pages):
            raise ValueError(f"pages {pages[~self._held[pages]].tolist()} are not held")
        self._held[pages] = False
        self._free[self._count : self._count + len(pages)] = pages
        self._count += len(pages)
