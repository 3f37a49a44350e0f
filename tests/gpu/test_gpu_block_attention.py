"""The attention kernel on a Hopper GPU against plain jnp in float32. What must not be read is NaN."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_attention


LAYERS = 2


def make(rng, prefix, lanes, *, before=None, block=32, kv=4, group=4, head=128, dtype=jnp.bfloat16):
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
    earlier = None if before is None else normal(rows, block, kv, group + 2, head)

    def arguments(heads, pools, earlier):
        floats = [jnp.asarray(a, dtype) for a in (heads, *pools)]
        named = dict(zip(("heads", "pool_k", "pool_v"), floats, strict=True))
        ints = {"layer": jnp.int32(1), "page_table": jnp.asarray(table, jnp.int32), "prefix_len": jnp.asarray(prefix, jnp.int32) * block}
        old = None if earlier is None else (jnp.asarray(earlier, dtype), jnp.asarray(before, bool))
        return named | ints | {"lanes": jnp.asarray(lanes), "before": old}

    def poisoned(a, where):
        return np.where(where.reshape(where.shape + (1,) * (a.ndim - where.ndim)), np.float32(np.nan), a)

    dead = ~np.repeat(lanes, block, 1)
    unseen = np.isin(np.arange(pages), order[sum(prefix) :]) | (np.arange(LAYERS) != 1)[:, None]
    old = None
    if earlier is not None:
        old = poisoned(earlier, ~np.asarray(before, bool))
        old[..., :group, :] = np.nan
    bad = arguments(poisoned(heads, dead), [poisoned(p, unseen) for p in pools], old)
    return arguments(heads, pools, earlier), bad


@functools.partial(jax.jit, static_argnames=("backend",))
def attend(options, backend):
    return block_attention.block_attention(**options, backend=backend)


CASES = {
    "one short row": ([4], [[1]], None),
    "no prefix": ([0, 0], [[1, 1], [1, 0]], None),
    "ragged prefixes": ([0, 3, 65, 64], [[1, 1]] * 4, None),
    "dead lanes": ([1, 0, 9, 4, 2], [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1], [1, 0, 0, 0]], None),
    "a block before": ([4, 2, 33], [[1, 1], [1, 0], [0, 1]], [1, 0, 1]),
    "long": ([300], [[1]], [1]),
    "many rows": ([5, 3, 9, 0, 7, 1, 2, 4, 6] * 2, [[1, 1]] * 18, None),
}


SHAPES = [{"block": 16}, {"block": 64, "kv": 2}, {"kv": 1, "group": 8, "head": 64}]


@pytest.mark.parametrize(
    "case,shape", [(c, {}) for c in CASES] + [(c, s) for c in ("dead lanes", "a block before") for s in SHAPES], ids=str
)
def test_as_the_reference(rng, relative_error, case, shape):
    prefix, lanes, before = CASES[case]
    clean, bad = make(rng, prefix, lanes, before=before, **shape)
    got = attend(bad, "gpu")
    exact = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, clean)
    with jax.default_matmul_precision("highest"):
        want = attend(exact, "reference")
    alive = np.repeat(np.asarray(lanes, bool), clean["pool_k"].shape[2], 1)
    assert relative_error(got[alive], want[alive]) < 5e-3
    assert (got[~alive] == 0).all()


def test_a_row_depends_neither_on_the_others_nor_on_a_block_that_is_not_there(rng):
    _, options = make(rng, [5, 40, 0], [[1, 1], [1, 0], [1, 1]], before=[0, 1, 0])
    together = attend(options, "gpu")
    for row in (0, 2):
        alone = {n: a[row : row + 1] if n not in ("pool_k", "pool_v", "layer", "before") else a for n, a in options.items()}
        np.testing.assert_array_equal(attend(alone | {"before": None}, "gpu")[0], together[row])


def test_float32_is_the_reference(rng):
    clean, _ = make(rng, [4, 2], [[1, 1], [1, 0]], dtype=jnp.float32)
    np.testing.assert_array_equal(attend(clean, "gpu"), attend(clean, "reference"))


def test_a_scan_over_layers_reads_each_layer_and_blocks_are_written_in_place(rng):
    clean, _ = make(rng, [4, 2], [[1], [1]])
    pages = jnp.asarray([clean["pool_k"].shape[1] - 1, 10**6])
    keys = block_attention.split_heads(clean["heads"])[1]

    @functools.partial(jax.jit, static_argnames=("backend",), donate_argnames=("pool_k", "pool_v"))
    def layers(pool_k, pool_v, options, backend):
        options = {n: a for n, a in options.items() if n not in ("pool_k", "pool_v", "layer", "heads")}

        def layer(heads, i):
            out = block_attention.block_attention(heads, pool_k=pool_k, pool_v=pool_v, layer=i, **options, backend=backend)
            return heads.at[..., :-2, :].set(out), out

        out = jax.lax.scan(layer, clean["heads"], jnp.arange(LAYERS))[1]
        fresh = jnp.broadcast_to(keys, (LAYERS, *keys.shape))
        return out, block_attention.write_blocks(pool_k, fresh, pages, backend=backend), pool_v

    pools = [clean[n] for n in ("pool_k", "pool_v")]
    memory = layers.lower(*pools, clean, "gpu").compile().memory_analysis()
    assert memory.alias_size_in_bytes == 2 * pools[0].nbytes
    before = pools[0]
    (got, pool, _), (want, _, _) = (layers(*(p + 0 for p in pools), clean, b) for b in ("gpu", "reference"))
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=0.03)
    np.testing.assert_array_equal(pool[:, -1], jnp.broadcast_to(keys[0], pool[:, -1].shape))
    np.testing.assert_array_equal(pool[:, :-1], before[:, :-1])
