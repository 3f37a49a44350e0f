"""Which page belongs to whom, and which pages hold a known prefix: host bookkeeping of the KV pool.

A page is free (contents mean nothing), held (reference count above 0), or cached (count 0, contents known by a digest, taken
back least recently used first). Held pages may be known by a digest too; then others can share them.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import os
from collections.abc import Sequence

import numpy as np


# Drawn anew by every process: nobody outside can compute digests, and so look for two prefixes of one digest, which would share KV.
_SECRET = os.urandom(32)


def chain_digest(parent: bytes, tokens: np.ndarray) -> bytes:
    """Digest (16 bytes) of a block in its context: of everything before it (``parent``) and its own tokens (int32). It is a message
    authentication code (BLAKE2b with a key of this process), so equal digests mean equal prefixes whatever clients send."""
    return hashlib.blake2b(parent + np.ascontiguousarray(tokens, np.int32).tobytes(), key=_SECRET, digest_size=16).digest()


class PagePool:
    """Hands out pages of a pool with reference counts, and finds pages by digest.

    Its ``num_pages`` pages are numbered from ``first`` on: several may share the numbers of one array of pages.
    """

    def __init__(self, num_pages: int, *, first: int = 0, prefix_cache: bool = True):
        self.num_pages = num_pages
        self.prefix_cache = prefix_cache
        self._free = list(range(first + num_pages - 1, first - 1, -1))
        self._references = np.zeros(first + num_pages, np.int64)
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # cached pages, least recently used first
        self.hits = self.queries = 0

    @property
    def num_available(self) -> int:
        """Pages that :meth:`allocate` could hand out."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    def allocate(self, n: int) -> list[int]:
        """``n`` pages with count 1; cached pages are forgotten for it once no free ones are left.

        Raises:
          ValueError: when fewer are available; nothing is taken then.
        """
        if n > self.num_available:
            raise ValueError(f"{n} pages asked for, {self.num_available} of {self.num_pages} are available")
        pages = []
        for _ in range(n):
            if not self._free:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._digest_of.pop(page)]
                self._free.append(page)
            pages.append(self._free.pop())
        self._references[pages] = 1
        return pages

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix of ``digests``, each held once more."""
        pages: list[int] = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._idle.pop(page, None)
            self._references[page] += 1
            pages.append(page)
        self.queries += len(digests)
        self.hits += len(pages)
        return pages

    def count_known(self, digests: Sequence[bytes]) -> int:
        """How many pages :meth:`match` would give; nothing is held or counted."""
        return sum(1 for _ in itertools.takewhile(self._page_of.__contains__, digests))

    def publish(self, page: int, digest: bytes) -> None:
        """Makes a held page findable. Call it only after the step that wrote the page.

        Raises:
          ValueError: when nobody holds the page.
        """
        if not self._references[page]:
            raise ValueError(f"page {page} is not held")
        if self.prefix_cache and digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest], self._digest_of[page] = page, digest

    def forget(self) -> None:
        """Forgets what all pages hold: no prefix is found until it is published anew."""
        self._free += reversed(self._idle)
        for known in (self._idle, self._digest_of, self._page_of):
            known.clear()

    def release(self, pages: Sequence[int]) -> None:
        """Gives one reference of each page back.

        Raises:
          ValueError: when a page is not held; nothing is given back then.
        """
        unheld = [page for page, count in collections.Counter(pages).items() if self._references[page] < count]
        if unheld:
            raise ValueError(f"pages {unheld} are not held")
        for page in reversed(pages):  # the end of a prefix is forgotten before its beginning
            self._references[page] -= 1
            if not self._references[page]:
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)
