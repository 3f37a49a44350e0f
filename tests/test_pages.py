"""The page pool: counts, sharing, eviction, over random histories."""

from __future__ import annotations

import collections
import subprocess
import sys

import numpy as np
import pytest

from diffulex_jax.cache.pages import PagePool, chain_digest


def digest(i: int) -> bytes:
    return chain_digest(b"root", np.array([i]))


def test_a_digest_is_a_chain_that_no_other_process_can_compute():
    code = "import numpy; from diffulex_jax.cache.pages import chain_digest; print(chain_digest(b'root', numpy.array([7])).hex())"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert bytes.fromhex(elsewhere.stdout) != digest(7) == digest(7) != digest(8) != chain_digest(b"other", np.array([8]))
    assert len(digest(7)) == 16


def test_pages_come_back_and_are_never_handed_out_twice():
    pool = PagePool(3)
    a, b = pool.allocate(2), pool.allocate(1)
    assert sorted(a + b) == [0, 1, 2]
    with pytest.raises(ValueError, match="1 pages asked for, 0 of 3 are available"):
        pool.allocate(1)
    pool.release(a)
    assert pool.num_available == 2
    with pytest.raises(ValueError, match="not held"):
        pool.release(a)
    assert pool.num_available == 2


def test_only_published_pages_are_found_and_a_match_ends_at_the_first_miss():
    pool = PagePool(4)
    pages = pool.allocate(3)
    assert pool.match([digest(0)]) == []
    pool.publish(pages[0], digest(0))
    pool.publish(pages[2], digest(2))
    assert pool.match([digest(0), digest(1), digest(2)]) == [pages[0]]
    assert (pool.queries, pool.hits) == (4, 1)


def test_shared_pages_stay_until_the_last_holder_lets_go_and_are_then_found_again():
    pool = PagePool(1)
    (page,) = pool.allocate(1)
    pool.publish(page, digest(0))
    assert pool.match([digest(0)]) == [page]
    pool.release([page])
    assert pool.num_available == 0
    pool.release([page])
    assert pool.num_available == 1 and pool.match([digest(0)]) == [page]


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning():
    pool = PagePool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for i, page in enumerate(old + new):
        pool.publish(page, digest(i))
    pool.release(old)
    pool.release(new)
    pool.release(pool.match([digest(0)]))  # used again: now the most recent
    assert pool.allocate(1) == [old[1]]
    assert pool.match([digest(1)]) == []
    assert pool.allocate(2) == [new[1], new[0]]
    assert pool.match([digest(0)]) == [old[0]]


def test_a_page_nobody_holds_cannot_be_published_and_a_switched_off_cache_finds_nothing():
    pool = PagePool(1, prefix_cache=False)
    with pytest.raises(ValueError, match="page 0 is not held"):
        pool.publish(0, digest(0))
    (page,) = pool.allocate(1)
    pool.publish(page, digest(0))
    assert pool.match([digest(0)]) == []


@pytest.mark.sweep
def test_accounts_hold_over_a_million_events():
    """No leak, no double hand-out, and idle holds nothing; against a plain count of holders."""
    rng = np.random.default_rng(0)
    pool, holders, held, events = PagePool(64), collections.Counter(), [], 0
    while events < 1_000_000:
        if not held or (rng.random() < 0.5 and pool.num_available):
            shared = pool.match([digest(int(i)) for i in rng.integers(0, 100, 3)])
            fresh = pool.allocate(int(rng.integers(0, min(4, pool.num_available) + 1)))
            assert all(holders[page] == 0 for page in fresh)
            for page in fresh[: int(rng.integers(0, 3))]:
                pool.publish(page, digest(int(rng.integers(0, 100))))
            holders.update(pages := shared + fresh)
            held.append(pages)
        else:
            pages = held.pop(int(rng.integers(len(held))))
            pool.release(pages)
            holders.subtract(pages)
        events += 1 + len(pages)
        if events % 16 == 0:
            assert pool.num_held == sum(count > 0 for count in holders.values())
    for pages in held:
        pool.release(pages)
    assert pool.num_held == 0 and sorted(pool.allocate(64)) == list(range(64))
