"""Attention and the write of blocks: the TPU kernels, simulated, against plain jnp."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention import reference, tpu


LAYERS, PAGES, BLOCK, HEAD = 2, 11, 4, 8
PREFIX = np.array([0, 20, 8, 12])  # ragged: none, all five pages, two, three
LANES = np.array([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]], bool)  # all but one, one in the middle missing, none, all


def make(seed=0, *, kv=2, group=3, blocks=3, dtype=jnp.float32):
    """Arguments of ``block_attention`` for four rows."""
    rng = np.random.default_rng(seed)
    rows, width, places = len(PREFIX), blocks * BLOCK, 5

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    table = np.stack([rng.permutation(PAGES)[:places] for _ in range(rows)])
    arrays = {
        "pool_k": normal(LAYERS, PAGES, BLOCK, kv, HEAD),
        "pool_v": normal(LAYERS, PAGES, BLOCK, kv, HEAD),
        "page_table": jnp.asarray(np.where(np.arange(places) * BLOCK < PREFIX[:, None], table, PAGES), jnp.int32),
        "prefix_len": jnp.asarray(PREFIX, jnp.int32),
        "lanes": jnp.asarray(LANES[:, :blocks]),
    }
    heads = normal(rows, width, kv, group + 2, HEAD)
    before = normal(rows, BLOCK, kv, group + 2, HEAD), jnp.array([True, False, True, True])
    return heads, arrays, before


@functools.partial(jax.jit, static_argnames=("function", "interpret", "prefix_tokens"))
def call(function, *args, **options):
    return function(*args, **options)


def live(arrays):
    return np.repeat(np.asarray(arrays["lanes"]), BLOCK, 1)


@pytest.mark.parametrize("prefix_tokens, with_before", [(8, True), (256, False)])
def test_attention(interpret, prefix_tokens, with_before):
    heads, arrays, before = make()
    options = arrays | {"layer": jnp.int32(1), "before": before if with_before else None}
    want = call(reference.block_attention, heads, **options)
    got = call(tpu.block_attention, heads, prefix_tokens=prefix_tokens, interpret=interpret, **options)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got[live(arrays)], want[live(arrays)], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[~live(arrays)], 0)


@pytest.mark.parametrize("kv, group, blocks", [(1, 4, 2)])
def test_other_shapes_and_bfloat16(interpret, kv, group, blocks):
    heads, arrays, before = make(1, kv=kv, group=group, blocks=blocks, dtype=jnp.bfloat16)
    options = arrays | {"layer": jnp.int32(0), "before": before}
    want = call(reference.block_attention, heads, **options)
    got = call(tpu.block_attention, heads, prefix_tokens=12, interpret=interpret, **options)
    wanted, given = (np.asarray(a, np.float32)[live(arrays)] for a in (want, got))
    np.testing.assert_allclose(given, wanted, rtol=2e-2, atol=2e-2)


def poisoned(arrays):
    """``arrays`` with NaN in every page that no row has: where a table names none, the last is read, and another layer's all."""
    unused = np.setdiff1d(np.arange(PAGES), np.asarray(arrays["page_table"]))
    pools = {name: arrays[name].at[:, unused].set(jnp.nan).at[0].set(jnp.nan) for name in ("pool_k", "pool_v")}
    return arrays | pools, PAGES - 1 in unused


def test_what_lies_past_a_prefix_is_never_read_into_a_result(interpret):
    heads, arrays, before = make(2)
    arrays["page_table"] = jnp.where(arrays["page_table"] == PAGES - 1, 0, arrays["page_table"])
    options = {"layer": jnp.int32(1), "before": before}
    bad, last = poisoned(arrays)
    assert last
    for function, more in ((tpu.block_attention, {"prefix_tokens": 8, "interpret": interpret}), (reference.block_attention, {})):
        clean = call(function, heads, **arrays, **options, **more)
        np.testing.assert_array_equal(call(function, heads, **bad, **options, **more), clean)


def test_written_blocks_and_no_others(interpret):
    _, arrays, _ = make(3)
    fresh = jnp.asarray(np.random.default_rng(0).standard_normal((LAYERS, 4, BLOCK, 2, HEAD)), jnp.float32)
    pages = jnp.array([4, PAGES, 0, PAGES + 3], jnp.int32)
    want = arrays["pool_k"].at[:, jnp.array([4, 0])].set(fresh[:, jnp.array([0, 2])])
    np.testing.assert_array_equal(call(reference.write_blocks, arrays["pool_k"], fresh, pages), want)
    np.testing.assert_array_equal(call(tpu.write_blocks, arrays["pool_k"], fresh, pages, interpret=interpret), want)
