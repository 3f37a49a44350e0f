"""Attention and the write of blocks: the TPU kernels, simulated, against plain jnp."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_attention import Keys, block_attention, reference, tpu


LAYERS, PAGES, BLOCK, HEAD = 2, 11, 4, 8
PREFIX = np.array([0, 20, 8, 12])  # ragged: none, all five pages, two, three
LANES = np.array([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]], bool)  # all but one, one in the middle missing, none, all


def make(seed=0, *, kv=2, group=3, blocks=3, dtype=jnp.float32):
    """``(heads, keys, pending)`` of ``block_attention`` for four rows."""
    rng = np.random.default_rng(seed)
    rows, width, places = len(PREFIX), blocks * BLOCK, 5

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    table = np.stack([rng.permutation(PAGES)[:places] for _ in range(rows)])
    keys = Keys(
        pool_k=normal(LAYERS, PAGES, BLOCK, kv, HEAD),
        pool_v=normal(LAYERS, PAGES, BLOCK, kv, HEAD),
        page_table=jnp.asarray(np.where(np.arange(places) * BLOCK < PREFIX[:, None], table, PAGES), jnp.int32),
        prefix_len=jnp.asarray(PREFIX, jnp.int32),
        lanes=jnp.asarray(LANES[:, :blocks]),
    )
    heads = normal(rows, width, kv, group + 2, HEAD)
    pending = normal(rows, BLOCK, kv, group + 2, HEAD), jnp.array([True, False, True, True])
    return heads, keys, pending


@functools.partial(jax.jit, static_argnames=("function", "interpret", "prefix_tokens", "block", "backend", "whole_blocks"))
def call(function, *args, **options):
    return function(*args, **options)


def live(keys):
    return np.repeat(np.asarray(keys.lanes), BLOCK, 1)


@pytest.mark.sweep_but("plain-256-False", "simulated-8-True")
@pytest.mark.parametrize("prefix_tokens, with_pending", [(8, True), (256, False)])
def test_attention(interpret, prefix_tokens, with_pending):
    heads, keys, pending = make()
    options = {"layer": jnp.int32(1), "block": BLOCK, "pending": pending if with_pending else None}
    want = call(reference.block_attention, heads, keys, **options)
    got = call(tpu.block_attention, heads, keys, prefix_tokens=prefix_tokens, interpret=interpret, **options)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got[live(keys)], want[live(keys)], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[~live(keys)], 0)


@pytest.mark.sweep_but("simulated-1-4-2")
@pytest.mark.parametrize("kv, group, blocks", [(1, 4, 2)])
def test_other_shapes_and_bfloat16(interpret, kv, group, blocks):
    heads, keys, pending = make(1, kv=kv, group=group, blocks=blocks, dtype=jnp.bfloat16)
    options = {"layer": jnp.int32(0), "block": BLOCK, "pending": pending}
    want = call(reference.block_attention, heads, keys, **options)
    got = call(tpu.block_attention, heads, keys, prefix_tokens=12, interpret=interpret, **options)
    wanted, given = (np.asarray(a, np.float32)[live(keys)] for a in (want, got))
    np.testing.assert_allclose(given, wanted, rtol=2e-2, atol=2e-2)


def poisoned(keys):
    """``keys`` with NaN in every page that no row has: where a table names none, the last is read, and another layer's all."""
    unused = np.setdiff1d(np.arange(PAGES), np.asarray(keys.page_table))
    bad = (pool.at[:, unused].set(jnp.nan).at[0].set(jnp.nan) for pool in keys[:2])
    return Keys(*bad, *keys[2:]), PAGES - 1 in unused


def test_what_lies_past_a_prefix_is_never_read_into_a_result(interpret):
    heads, keys, pending = make(2)
    keys = keys._replace(page_table=jnp.where(keys.page_table == PAGES - 1, 0, keys.page_table))
    options = {"layer": jnp.int32(1), "block": BLOCK, "pending": pending}
    bad, last = poisoned(keys)
    assert last
    for function, more in ((tpu.block_attention, {"prefix_tokens": 8, "interpret": interpret}), (reference.block_attention, {})):
        clean = call(function, heads, keys, **options, **more)
        np.testing.assert_array_equal(call(function, heads, bad, **options, **more), clean)


def in_pages(keys, page, seed):
    """The same cache in pages of another size, in another order; NaN wherever nothing is cached."""
    rng = np.random.default_rng(seed)
    rows, capacity = len(PREFIX), 48
    count = capacity // page
    table = rng.permutation(rows * count + 3)[: rows * count].reshape(rows, count)
    pools = []
    for pool in keys[:2]:
        new = np.full((LAYERS, rows * count + 3, page, *pool.shape[3:]), np.nan, np.float32)
        for row, at in ((r, i) for r in range(rows) for i in range(PREFIX[r])):
            new[:, table[row, at // page], at % page] = pool[:, keys.page_table[row, at // BLOCK], at % BLOCK]
        pools.append(jnp.asarray(new, pool.dtype))
    table = np.where(np.arange(count) * page < PREFIX[:, None], table, rows * count + 3 + rng.integers(0, 2, (rows, count)))
    return keys._replace(pool_k=pools[0], pool_v=pools[1], page_table=jnp.asarray(table, jnp.int32))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_a_page_need_not_be_a_block(seed):
    """The reference, to the bit: half a block, two blocks, and four, of which a row's last page may hold one."""
    heads, keys, pending = make(seed)
    options = {"layer": jnp.int32(1), "block": BLOCK, "pending": pending}
    want = call(reference.block_attention, heads, in_pages(keys, BLOCK, seed), **options)
    np.testing.assert_allclose(want, call(reference.block_attention, heads, keys, **options), rtol=1e-5, atol=1e-6)
    for page in (BLOCK // 2, 2 * BLOCK, 4 * BLOCK):
        np.testing.assert_array_equal(call(reference.block_attention, heads, in_pages(keys, page, seed), **options), want)


@pytest.mark.sweep_but("plain-2", "simulated-8")
@pytest.mark.parametrize("page", [BLOCK // 2, 2 * BLOCK])
def test_the_kernel_reads_pages_that_are_no_blocks(interpret, page):
    heads, keys, pending = make(4)
    options = {"layer": jnp.int32(1), "block": BLOCK, "pending": pending}
    want = call(reference.block_attention, heads, keys, **options)
    got = call(tpu.block_attention, heads, in_pages(keys, page, 4), prefix_tokens=8, interpret=interpret, **options)
    np.testing.assert_allclose(got[live(keys)], want[live(keys)], rtol=1e-5, atol=1e-6)


@pytest.mark.sweep_but("plain")
def test_a_prefix_may_end_within_a_block(interpret):
    """The TPU's kernel takes it as it is; the GPU's is told, and does so for bfloat16 (tests/gpu)."""
    heads, keys, pending = make(6)
    keys = keys._replace(prefix_len=jnp.array([3, 18, 8, 11]))
    options = {"layer": jnp.int32(1), "block": BLOCK, "pending": pending}
    want = call(reference.block_attention, heads, keys, **options)
    got = call(tpu.block_attention, heads, keys, prefix_tokens=8, interpret=interpret, **options)
    np.testing.assert_allclose(got[live(keys)], want[live(keys)], rtol=1e-5, atol=1e-6)
    got = call(block_attention, heads, keys, whole_blocks=False, backend="gpu", **options)
    np.testing.assert_allclose(got[live(keys)], want[live(keys)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "gpu", "tpu"])
def test_a_window_may_be_seen_as_any_mask_says(backend):
    """A mask of keys, and one of queries and keys: the same where every query sees the same; whatever the backend, plain XLA."""
    heads, keys, pending = make(5)
    options = {"layer": jnp.int32(1), "block": BLOCK, "pending": pending, "backend": backend}
    seen = functools.partial(call, block_attention, **options)
    visible = np.random.default_rng(5).random((4, 12)) < 0.7
    both = np.broadcast_to(visible[:, None], (4, 12, 12))
    want = seen(heads, keys, visible=visible)
    np.testing.assert_array_equal(seen(heads, keys, visible=both), want)
    causal = np.broadcast_to(np.tri(12, dtype=bool), (4, 12, 12))
    got = np.asarray(seen(heads, keys, visible=causal))
    cut = seen(heads[:, :8], keys._replace(lanes=keys.lanes[:, :2]), visible=causal[:, :8, :8])
    np.testing.assert_allclose(got[:, :8], cut, rtol=1e-5, atol=1e-6)
    assert np.abs(got[:, :11] - np.asarray(seen(heads, keys, visible=np.ones((4, 12), bool)))[:, :11]).max() > 1e-3


def test_a_block_that_fits_neither_window_nor_pages_is_named():
    heads, keys, _ = make(6)
    for block, lanes in ((5, 3), (3, 4), (6, 3)):
        with pytest.raises(ValueError, match=f"block={block} fits neither a window of 12 in .* blocks, nor pages of 4"):
            block_attention(heads, keys._replace(lanes=jnp.ones((4, lanes), bool)), layer=jnp.int32(0), block=block)


def written(pool, fresh, pages, offsets):
    """Block by block, position by position."""
    pool, (block, page) = np.array(pool), (fresh.shape[2], pool.shape[2])
    pages = np.asarray(pages).reshape(len(offsets), -1)
    for row, i in np.ndindex(len(offsets), block):
        at = i + (int(offsets[row]) if block < page else 0)
        if pages[row, at // page] < pool.shape[1]:
            pool[:, pages[row, at // page], at % page] = fresh[:, row, i]
    return pool


@pytest.mark.parametrize("page", [BLOCK // 2, BLOCK, 2 * BLOCK, 4 * BLOCK])
def test_written_blocks_and_no_others(interpret, page):
    rng = np.random.default_rng(page)
    pool, fresh = (jnp.asarray(rng.standard_normal((LAYERS, n, size, 2, HEAD)), jnp.float32) for n, size in ((PAGES, page), (4, BLOCK)))
    parts = max(1, BLOCK // page)
    pages = np.where(np.array([1, 0, 1, 0], bool)[:, None], rng.permutation(PAGES)[: 4 * parts].reshape(4, parts), PAGES + 3)
    pages[2, -1], pages[3] = (PAGES, pages[3]) if parts > 1 else (pages[2, -1], pages[3])
    offsets = jnp.asarray(rng.integers(0, max(1, page // BLOCK), 4) * BLOCK, jnp.int32)
    pages = jnp.asarray(pages if parts > 1 else pages[:, 0], jnp.int32)
    want = written(pool, fresh, pages, offsets)
    assert (want != pool).any()
    np.testing.assert_array_equal(call(reference.write_blocks, pool, fresh, pages, offsets), want)
    np.testing.assert_array_equal(call(tpu.write_blocks, pool, fresh, pages, offsets, interpret=interpret), want)


def test_blocks_of_one_page_are_written_together(interpret):
    pool, fresh = (
        jnp.zeros((LAYERS, 3, 2 * BLOCK, 1, HEAD)),
        jnp.arange(2.0)[None, :, None, None, None] + jnp.ones((LAYERS, 2, BLOCK, 1, HEAD)),
    )
    args = pool, fresh, jnp.array([1, 1]), jnp.array([BLOCK, 0])
    want = written(*args)
    assert (want[0, 1, :, 0, 0] == [2] * BLOCK + [1] * BLOCK).all()
    np.testing.assert_array_equal(call(reference.write_blocks, *args), want)
    np.testing.assert_array_equal(call(tpu.write_blocks, *args, interpret=interpret), want)
