"""Pools that hold keys and values in another form than the activations': what is written, what is read, and how near it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention import KV_FORMS, Keys, Scaled, block_attention, rounded, vector_bytes, write_blocks, write_positions
from pallas_kernels.block_attention.stored import empty, held, kv_dtype, plain


attention = jax.jit(block_attention, static_argnames=("block", "backend"))
WORST = {"bfloat16": 2**-8, "fp8": 2**-4, "int8": 1 / 127}  # of a number; of int8 of the largest of its vector, and its scale's rounding


@pytest.mark.parametrize("form", KV_FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_held_is_near_and_follows_from_a_vector_alone(form, dtype):
    x = jax.random.normal(jax.random.key(0), (5, 3, 16), dtype).at[1, 1].multiply(90).at[2].set(0)
    pool = empty((2, 3, 16), form, dtype)
    seen = np.asarray(plain(held(x, pool), dtype), np.float32)
    of = np.abs(np.asarray(x, np.float32))
    most = of.max(-1, keepdims=True) if form == "int8" else of + 2**-6  # below which the steps of fp8 are equal
    assert (np.abs(seen - np.asarray(x, np.float32)) <= WORST[form] * most).all()
    alone = jnp.stack([plain(held(row, pool), dtype) for row in x])
    jitted = jax.jit(lambda x: plain(held(x, pool), dtype))(x)
    for other in (alone, jitted):
        np.testing.assert_array_equal(np.asarray(other, np.float32), seen)


def test_numbers_by_hand():
    pool = empty((4,), "int8", jnp.float32)
    got = held(jnp.array([-127.0, 63.4, 0.0, 1.0]), pool)
    assert got.values.tolist() == [-127, 63, 0, 1] and float(got.scales) == 1
    assert plain(held(jnp.array([1e6, -1e6, 3.1, 0.0]), empty((4,), "fp8", jnp.float32)), jnp.float32).tolist() == [448, -448, 3, 0]
    assert np.isnan(plain(held(jnp.array([1.0, np.nan, 0.0, 0.0]), pool), jnp.float32)).all()  # not a number that nobody notices
    assert [vector_bytes(128, form, jnp.float32) for form in (None, *KV_FORMS)] == [512, 256, 128, 130]


@pytest.mark.sweep_but("int8-4-8")
@pytest.mark.parametrize("form, block, page", [("bfloat16", 4, 4), ("fp8", 8, 4), ("int8", 4, 8)])
def test_blocks_are_read_as_they_were_written(form, block, page):
    """Attention over a pool of a form is attention over what the pool stands for, and a window sees a block alike before it is written."""
    rng = np.random.default_rng(block + page)
    heads = jnp.asarray(rng.standard_normal((2, block, 2, 5, 16)), jnp.float32)
    past = jnp.asarray(rng.standard_normal((2, 2, block, 2, 5, 16)), jnp.float32)
    pool = [empty((3, 8, page, 2, 16), form, jnp.float32) for _ in range(2)]
    span = max(block, page)
    table = jnp.arange(2 * (2 * span // page), dtype=jnp.int32).reshape(2, -1)

    def write(pool, which, part):
        fresh = jnp.stack([jnp.zeros_like(past[which, ..., part, :]), past[which, ..., part, :], jnp.zeros_like(past[which, ..., part, :])])
        first = which * block
        at = table[:, first // page : first // page + max(1, block // page)]
        return write_blocks(pool, fresh, at if block > page else at[:, 0], jnp.full(2, first % page), backend="tpu" if form else None)

    for which in range(2):
        pool = [write(held_in, which, part) for held_in, part in zip(pool, (-2, -1), strict=True)]
    lanes = jnp.ones((2, 1), bool)
    options = {"layer": jnp.int32(1), "block": block}
    full = jnp.full(2, 2 * block)
    for backend in ("reference", "gpu", "tpu"):
        got = attention(heads, Keys(*pool, table, full, lanes), **options, backend=backend)
        meant = [plain(p, jnp.float32) for p in pool]
        want = attention(heads, Keys(*meant, table, full, lanes), **options, backend="reference")
        np.testing.assert_array_equal(got, want)
    waiting = rounded(past[1], pool[0])
    before = attention(heads, Keys(*pool, table, full - block, lanes), **options, pending=(waiting, jnp.ones(2, bool)))
    np.testing.assert_allclose(before, got, rtol=1e-5, atol=1e-6)
    unrounded = attention(heads, Keys(*pool, table, full - block, lanes), **options, pending=(past[1], jnp.ones(2, bool)))
    assert np.abs(unrounded - got).max() > 1e-4


@pytest.mark.sweep_but("int8")
@pytest.mark.parametrize("form", KV_FORMS)
def test_positions_are_written_like_blocks(form):
    fresh = jax.random.normal(jax.random.key(1), (2, 1, 4, 2, 16))
    pool = empty((2, 3, 4, 2, 16), form, jnp.float32)
    by_block = jax.jit(write_blocks)(pool, fresh, np.array([1]), np.array([0]))
    by_position = jax.jit(write_positions)(pool, fresh, np.full((1, 4), 1), np.arange(4)[None])
    jax.tree.map(np.testing.assert_array_equal, by_block, by_position)
    assert isinstance(by_block, Scaled) == (form == "int8") and by_block.dtype == kv_dtype(form, jnp.float32)
