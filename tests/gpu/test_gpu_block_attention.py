"""The attention kernel on a Hopper GPU against plain jnp in float32. What must not be read is NaN."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_attention


LAYERS = 2


def make(rng, prefix, lanes, *, pending=None, block=32, kv=4, group=4, head=128, dtype=jnp.bfloat16):
    """(arguments, poisoned arguments): pages of layer 1 in random order; the poison is in all that no row sees."""
    rows, count, pages = len(prefix), len(lanes[0]), sum(prefix) + 3
    order = rng.permutation(pages)
    table = np.full((rows, max(prefix) + 2), pages)
    for row, (start, n) in enumerate(zip(np.cumsum([0, *prefix]), prefix, strict=False)):
        table[row, :n] = order[start : start + n]
    lanes, width = np.asarray(lanes, bool), count * block

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    heads = normal(rows, width, kv, group + 2, head)
    pools = [normal(LAYERS, pages, block, kv, head) for _ in "kv"]
    unwritten = None if pending is None else normal(rows, block, kv, group + 2, head)

    def arguments(heads, pools, unwritten):
        floats = [jnp.asarray(a, dtype) for a in (heads, *pools)]
        named = dict(zip(("heads", "pool_k", "pool_v"), floats, strict=True))
        ints = {"layer": jnp.int32(1), "page_table": jnp.asarray(table, jnp.int32), "prefix_len": jnp.asarray(prefix, jnp.int32) * block}
        old = None if unwritten is None else (jnp.asarray(unwritten, dtype), jnp.asarray(pending, bool))
        return named | ints | {"lanes": jnp.asarray(lanes), "block": block, "pending": old}

    def poisoned(a, where):
        return np.where(where.reshape(where.shape + (1,) * (a.ndim - where.ndim)), np.float32(np.nan), a)

    dead = ~np.repeat(lanes, block, 1)
    unseen = np.isin(np.arange(pages), order[sum(prefix) :]) | (np.arange(LAYERS) != 1)[:, None]
    old = None
    if unwritten is not None:
        old = poisoned(unwritten, ~np.asarray(pending, bool))
        old[..., :group, :] = np.nan
    bad = arguments(poisoned(heads, dead), [poisoned(p, unseen) for p in pools], old)
    return arguments(heads, pools, unwritten), bad


def attend(options, backend):
    """A jitted ``block_attention`` of what ``make`` makes."""
    arrays = {name: a for name, a in options.items() if name != "block"}
    return _attend(arrays, options["block"], backend)


@functools.partial(jax.jit, static_argnames=("block", "backend", "whole_blocks"))
def _attend(arrays, block, backend, whole_blocks=True):
    keys = block_attention.Keys(*(arrays[name] for name in block_attention.Keys._fields))
    options = {"layer": arrays["layer"], "block": block, "pending": arrays["pending"], "whole_blocks": whole_blocks}
    return block_attention.block_attention(arrays["heads"], keys, **options, backend=backend)


CASES = {
    "one short row": ([4], [[1]], None),
    "no prefix": ([0, 0], [[1, 1], [1, 0]], None),
    "ragged prefixes": ([0, 3, 65, 64], [[1, 1]] * 4, None),
    "dead lanes": ([1, 0, 9, 4, 2], [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1], [1, 0, 0, 0]], None),
    "a pending block": ([4, 2, 33], [[1, 1], [1, 0], [0, 1]], [1, 0, 1]),
    "long": ([300], [[1]], [1]),
    "many rows": ([5, 3, 9, 0, 7, 1, 2, 4, 6] * 2, [[1, 1]] * 18, None),
}


SHAPES = [{"block": 16}, {"block": 64, "kv": 2}, {"kv": 1, "group": 8, "head": 64}]


@pytest.mark.parametrize(
    "case,shape", [(c, {}) for c in CASES] + [(c, s) for c in ("dead lanes", "a pending block") for s in SHAPES], ids=str
)
def test_as_the_reference(rng, relative_error, case, shape):
    prefix, lanes, pending = CASES[case]
    clean, bad = make(rng, prefix, lanes, pending=pending, **shape)
    got = attend(bad, "gpu")
    exact = jax.tree.map(lambda a: a.astype(jnp.float32) if getattr(a, "dtype", None) == jnp.bfloat16 else a, clean)
    with jax.default_matmul_precision("highest"):
        want = attend(exact, "reference")
    alive = np.repeat(np.asarray(lanes, bool), clean["pool_k"].shape[2], 1)
    assert relative_error(got[alive], want[alive]) < 5e-3
    assert (got[~alive] == 0).all()


@pytest.mark.parametrize(
    ("block", "page", "group", "whole_blocks"),
    [(4, 16, 4, True), (8, 16, 4, True), (4, 32, 8, True), (32, 64, 1, True), (32, 64, 7, False), (32, 32, 4, False)],
)
@pytest.mark.parametrize("with_pending", [False, True])
def test_blocks_that_are_no_tile_and_prefixes_that_end_anywhere(rng, relative_error, block, page, group, whole_blocks, with_pending):
    """What lies behind the end of a prefix in its last page is NaN, as is all else that no row sees."""
    kv, head, lanes = 2, 128, np.array([[1, 1], [1, 0], [0, 1], [1, 1]], bool)
    prefix = np.array([0, 5, 16, 33]) * block + (0 if whole_blocks else np.array([3, 0, 1, 7]))
    pages = -(-prefix // page)
    order, table = rng.permutation(pages.sum() + 2), np.full((4, max(pages) + 1), pages.sum() + 2)
    seen = np.zeros((LAYERS, len(order), page), bool)
    for row, (start, n) in enumerate(zip(np.cumsum([0, *pages]), pages, strict=False)):
        table[row, :n] = order[start : start + n]
        at = np.arange(prefix[row])
        seen[1, table[row, at // page], at % page] = True
    pending = np.array([1, 0, 1, 1], bool)
    there = [np.repeat(lanes, block, 1), seen, seen, np.repeat(pending[:, None], block, 1)]
    shapes = [(4, 2 * block, kv, group + 2, head), *[(LAYERS, len(order), page, kv, head)] * 2, (4, block, kv, group + 2, head)]
    drawn = [rng.standard_normal(shape, np.float32) for shape in shapes]

    def run(arrays, dtype, backend):
        heads, pool_k, pool_v, unwritten = (jnp.asarray(a, dtype) for a in arrays)
        ints = {"layer": jnp.int32(1), "page_table": jnp.asarray(table, jnp.int32), "prefix_len": jnp.asarray(prefix, jnp.int32)}
        old = (unwritten, jnp.asarray(pending)) if with_pending else None
        return _attend(
            ints | {"heads": heads, "pool_k": pool_k, "pool_v": pool_v, "lanes": jnp.asarray(lanes), "pending": old},
            block,
            backend,
            whole_blocks,
        )

    bad = [np.where(w.reshape(w.shape + (1,) * (a.ndim - w.ndim)), a, np.nan) for a, w in zip(drawn, there, strict=True)]
    got = run(bad, jnp.bfloat16, "gpu")
    with jax.default_matmul_precision("highest"):
        want = run(drawn, jnp.float32, "reference")
    alive = there[0]
    assert relative_error(got[alive], want[alive]) < 5e-3


def test_a_row_depends_neither_on_the_others_nor_on_a_block_that_is_not_there(rng):
    _, options = make(rng, [5, 40, 0], [[1, 1], [1, 0], [1, 1]], pending=[0, 1, 0])
    together = attend(options, "gpu")
    for row in (0, 2):
        alone = {n: a[row : row + 1] if n not in ("pool_k", "pool_v", "layer", "block", "pending") else a for n, a in options.items()}
        np.testing.assert_array_equal(attend(alone | {"pending": None}, "gpu")[0], together[row])


def test_float32_is_the_reference(rng):
    clean, _ = make(rng, [4, 2], [[1, 1], [1, 0]], dtype=jnp.float32)
    np.testing.assert_array_equal(attend(clean, "gpu"), attend(clean, "reference"))


def test_a_scan_over_layers_reads_each_layer_and_blocks_are_written_in_place(rng):
    clean, _ = make(rng, [4, 2], [[1], [1]])
    pages = jnp.asarray([clean["pool_k"].shape[1] - 1, 10**6])
    own = block_attention.split_heads(clean["heads"])[1]
    table, length, lanes = (clean[n] for n in ("page_table", "prefix_len", "lanes"))

    @functools.partial(jax.jit, static_argnames=("backend",), donate_argnames=("pool_k", "pool_v"))
    def layers(pool_k, pool_v, heads, backend):
        keys = block_attention.Keys(pool_k, pool_v, table, length, lanes)

        def layer(heads, i):
            out = block_attention.block_attention(heads, keys, layer=i, block=32, backend=backend)
            return heads.at[..., :-2, :].set(out), out

        out = jax.lax.scan(layer, heads, jnp.arange(LAYERS))[1]
        fresh = jnp.broadcast_to(own, (LAYERS, *own.shape))
        return out, block_attention.write_blocks(pool_k, fresh, pages, jnp.zeros_like(pages), backend=backend), pool_v

    pools = [clean[n] for n in ("pool_k", "pool_v")]
    memory = layers.lower(*pools, clean["heads"], "gpu").compile().memory_analysis()
    assert memory.alias_size_in_bytes == 2 * pools[0].nbytes
    before = pools[0]
    (got, pool, _), (want, _, _) = (layers(*(p + 0 for p in pools), clean["heads"], b) for b in ("gpu", "reference"))
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=0.03)
    np.testing.assert_array_equal(pool[:, -1], jnp.broadcast_to(own[0], pool[:, -1].shape))
    np.testing.assert_array_equal(pool[:, :-1], before[:, :-1])


@pytest.mark.parametrize("per_page", [2, 4])
def test_pages_of_several_blocks_are_pages_of_one_to_the_bit(rng, per_page):
    """The same cache laid out anew; what no row has is NaN, also in a row's last page."""
    clean, _ = make(rng, [4, 2, 33, 0], [[1, 1], [1, 0], [0, 1], [1, 1]], pending=[1, 0, 1, 1])
    table, length, block = np.asarray(clean["page_table"]), np.asarray(clean["prefix_len"]), clean["block"]
    count = -(-table.shape[1] // per_page)
    wide = rng.permutation(len(table) * count).reshape(len(table), count)
    pools = {}
    for name in ("pool_k", "pool_v"):
        old = np.asarray(clean[name].astype(jnp.float32))
        new = np.full((LAYERS, len(table) * count, per_page, *old.shape[2:]), np.nan, np.float32)
        for row, n in ((r, i) for r in range(len(table)) for i in range(length[r] // block)):
            new[:, wide[row, n // per_page], n % per_page] = old[:, table[row, n]]
        pools[name] = jnp.asarray(new.reshape(LAYERS, len(table) * count, per_page * block, *old.shape[3:]), jnp.bfloat16)
    cached = np.arange(count) * per_page * block < length[:, None]
    options = clean | pools | {"page_table": jnp.asarray(np.where(cached, wide, len(table) * count), jnp.int32)}
    np.testing.assert_array_equal(attend(options, "gpu"), attend(clean, "gpu"))


@pytest.mark.parametrize("block, page", [(32, 16), (4, 8), (4, 4)])
def test_other_blocks_and_pages_take_the_reference(rng, block, page):
    clean, _ = make(rng, [4, 2], [[1, 1], [1, 0]], block=page)
    width = 2 * block
    heads = jnp.tile(clean["heads"], (1, -(-width // clean["heads"].shape[1]), 1, 1, 1))[:, :width]
    options = clean | {"heads": heads, "block": block, "prefix_len": clean["prefix_len"] // block * block}
    np.testing.assert_array_equal(attend(options, "gpu"), attend(options, "reference"))
