"""How many pages an engine makes for the memory that its device says is left."""

from __future__ import annotations

import pytest

from diffulex_jax.engine.pool_size import default_num_pages


GIB = 2**30
PAGE = 2**20


class Device:
    def __init__(self, **stats):
        self._stats = {name: int(size * GIB) for name, size in stats.items()}

    def memory_stats(self):
        return self._stats

    def __str__(self):
        return "device 0"


def pages(device, *, needed=10**6, share=1.0):
    return default_num_pages(device, PAGE, needed=needed, share=share)


def test_a_cpu_has_what_all_slots_need():
    assert pages(Device(), needed=7) == 7


@pytest.mark.parametrize("held", [{}, {"pool_bytes": 60}])
def test_what_is_left_less_a_tenth_of_all_becomes_pages(held):
    device = Device(bytes_limit=60, bytes_in_use=30, **held)
    assert pages(device) == 24 * GIB // PAGE
    assert pages(device, share=0.5) == 12 * GIB // PAGE
    assert pages(device, needed=3) == 24


def test_what_an_allocator_holds_in_pieces_is_no_room_for_a_pool():
    """With ``XLA_PYTHON_CLIENT_PREALLOCATE=false`` a pool as large as all that is unused could not be made."""
    assert pages(Device(bytes_limit=60, bytes_in_use=30, pool_bytes=44)) == 10 * GIB // PAGE


@pytest.mark.parametrize("taken", [30.0, 31.3, 33.33, 50.0])
def test_starts_with_a_little_more_or_less_taken_mostly_make_the_same_pool(taken):
    found = [pages(Device(bytes_limit=60, bytes_in_use=taken + i / 1000)) for i in range(10)]
    assert len(set(found)) <= 2  # and without, each start its own
    fits = int((0.9 * 60 - taken) * GIB) // PAGE
    assert fits * 31 / 32 <= found[0] <= fits


def test_a_full_device_says_what_is_taken():
    with pytest.raises(ValueError, match=r"no KV page fits: 55\.0 of 60\.0 GiB are taken on device 0"):
        pages(Device(bytes_limit=60, bytes_in_use=30, pool_bytes=55))
