"""Slots and pages by data shard. Devices that share a slot hold its pages, so a request lives in one shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from diffulex_jax.cache.pages import PagePool


_UNEVEN = 1  # requests; a shard that has a prompt's beginning cached may be ahead of the emptiest by so many


class Shard(NamedTuple):
    """What the devices of one index along the mesh axis ``data`` hold.

    Attributes:
      pages: its part of the pool.
      free_slots: of its slots, those in which nothing runs; the least is used next, so that few requests are in the first ones.
      slots: how many it has.
    """

    pages: PagePool
    free_slots: list[int]
    slots: int

    @property
    def taken(self) -> int:
        """Slots in use."""
        return self.slots - len(self.free_slots)


def make_shards(pools: Sequence[PagePool], slots: int) -> list[Shard]:
    """Gives each pool its share of ``slots``, which their number must divide, in order."""
    each = slots // len(pools)
    return [Shard(pool, list(range(each * (i + 1) - 1, each * i - 1, -1)), each) for i, pool in enumerate(pools)]


def by_preference(shards: Sequence[Shard], digests: Sequence[bytes]) -> list[Shard]:
    """The shards with a free slot, best first: the one that has most of the prompt's pages (``digests``) cached, if it is hardly busier
    than the emptiest; else the emptiest."""
    least = min(shard.taken for shard in shards)

    def preference(shard: Shard) -> tuple[int, ...]:
        cached = shard.pages.count_known(digests) if shard.taken <= least + _UNEVEN else 0
        return -cached, shard.taken, -shard.pages.num_available

    return sorted((shard for shard in shards if shard.free_slots), key=preference)
