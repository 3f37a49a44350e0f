"""Block attention on TPU: one grid step a row, its cached pages fetched by double-buffered DMA; and the write of blocks in place.

The kernels take keys and values with heads before tokens, ``[..., KV, P, H]``: a head's tokens then fill whole tiles. A pool stored
that way (``POOL_ORDER``) is only looked at differently; one in row-major order would be copied at every call.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_attention.reference import Keys, split_heads


POOL_ORDER = (0, 1, 3, 2, 4)
"""Dimensions of a pool ``[L, N, P, KV, H]`` from major to minor, as the kernels read it."""

SUBLANES = 8
"""Positions of a tile in memory. A copy of a part of one may be compiled, but was never run: the package takes the reference there."""

_PREFIX_TOKENS = 256  # fetched together, while those before are attended to
_NEVER = -1e30  # finite: a row that has seen nothing yet stays free of NaN


def block_attention(
    heads: jax.Array,
    keys: Keys,
    *,
    layer: jax.Array,
    block: int,
    pending: tuple[jax.Array, jax.Array] | None = None,
    prefix_tokens: int = _PREFIX_TOKENS,
    interpret: Any = False,
) -> jax.Array:
    """See the package's ``block_attention``. Lanes that do not exist are skipped and give zeros."""
    q, k, v = split_heads(heads)
    rows, width, kv, group, head = q.shape
    pool_k, pool_v, page_table, prefix_len, lanes = keys
    pages, page = pool_k.shape[1:3]
    count = width // block
    chunk = max(1, min(prefix_tokens // page, page_table.shape[1]))
    table = jnp.minimum(jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % chunk))), pages - 1)

    # A lane's queries of one key/value head stand together: [R, KV, lane, G B, H].
    queries = jnp.einsum("rltkgh->rklgth", q.reshape(rows, count, block, kv, group, head)).reshape(rows, kv, count, -1, head)
    own = [jnp.swapaxes(a, 1, 2) for a in (k, v)]
    unwritten = [] if pending is None else [jnp.swapaxes(a, 1, 2) for a in split_heads(pending[0])[1:]]
    flags = jnp.concatenate([lanes, jnp.zeros((rows, 1), bool) if pending is None else pending[1][:, None]], 1).astype(jnp.int32)
    key_lane = jnp.arange(width, dtype=jnp.int32) // block
    of_keys = jnp.stack([jnp.broadcast_to(key_lane, (rows, width)), lanes[:, key_lane].astype(jnp.int32)], 1)

    def row(a: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, *a.shape[1:]), lambda r, *_: (r, *[0] * (a.ndim - 1)))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    scalars = jnp.asarray(layer, jnp.int32).reshape(1), table, prefix_len, flags
    state = (count, kv, group * block)
    buffer = pltpu.VMEM((2, kv, chunk * page, head), pool_k.dtype)
    out = pl.pallas_call(
        functools.partial(_attend, page=page, chunk=chunk, has_pending=pending is not None),
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(rows,),
            in_specs=[*(row(a) for a in (queries, *own, of_keys, *unwritten)), anywhere, anywhere],
            out_specs=row(queries),
            scratch_shapes=[
                *(pltpu.VMEM((*state, n), jnp.float32) for n in (1, 1, head)),
                buffer,
                buffer,
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=4 * q.size * (width + table.shape[1] * page),
            bytes_accessed=2 * rows * table.shape[1] * page * kv * head * pool_k.dtype.itemsize,
            transcendentals=q.size // head * (width + table.shape[1] * page),
        ),
        name="block_attention",
        interpret=interpret,
    )(*scalars, queries, *own, of_keys, *unwritten, _heads_first(pool_k), _heads_first(pool_v))
    return jnp.einsum("rklgth->rltkgh", out.reshape(rows, kv, count, group, block, head)).reshape(q.shape)


def _heads_first(pool: jax.Array) -> jax.Array:
    return pool.transpose(POOL_ORDER)


def _attend(layer: Any, table: Any, prefix_len: Any, flags: Any, *refs: Any, page: int, chunk: int, has_pending: bool) -> None:
    q_ref, k_ref, v_ref, keys_ref, *unwritten, pool_k, pool_v, out_ref, peak, total, acc, k_buffer, v_buffer, arrived = refs
    r = pl.program_id(0)
    _, kv, count, _, head = q_ref.shape
    tokens, length = chunk * page, prefix_len[r]
    chunks = pl.cdiv(length, tokens)

    def copies(c: Any, slot: Any, act: Any) -> None:
        """Starts or waits for what chunk c has of the prefix; its last pages may not be cached."""
        for i in range(chunk):

            @pl.when(c * tokens + i * page < length)
            def _page(i: int = i) -> None:
                number = table[r, c * chunk + i]
                for n, (pool, buffer) in enumerate(((pool_k, k_buffer), (pool_v, v_buffer))):
                    to = buffer.at[slot, :, pl.ds(i * page, page)]
                    act(pltpu.make_async_copy(pool.at[layer[0], number], to, arrived.at[slot, n]))

    def update(lane: Any, h: int, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> None:
        """One online-softmax update of a lane's queries of head h by ``k, v [n, H]``; ``mask [1, n]``."""
        score = lax.dot_general(q_ref[0, h, lane], k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * head**-0.5
        if mask is not None:
            score = jnp.where(mask, score, _NEVER)
        old = peak[lane, h]
        new = jnp.maximum(old, jnp.max(score, 1, keepdims=True))
        p = jnp.exp(score - new)
        if mask is not None:
            p = jnp.where(mask, p, 0.0)
        scale = jnp.exp(old - new)
        peak[lane, h] = new
        total[lane, h] = total[lane, h] * scale + jnp.sum(p, 1, keepdims=True)
        product = lax.dot_general(p.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        acc[lane, h] = acc[lane, h] * scale + product

    def each_lane(body: Any) -> None:
        def one(lane: jax.Array, _: None) -> None:
            @pl.when(flags[r, lane] != 0)
            def _live() -> None:
                body(lane)

        lax.fori_loop(0, count, one, None)

    alive = flags[r, 0]
    for lane in range(1, count):
        alive += flags[r, lane]
    out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)

    @pl.when(alive != 0)
    def _row() -> None:
        copies(0, 0, lambda copy: copy.start())
        peak[...] = jnp.full(peak.shape, _NEVER, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

        def window(lane: jax.Array) -> None:
            key_lane, live = keys_ref[0, 0:1], keys_ref[0, 1:2] != 0
            for h in range(kv):
                update(lane, h, k_ref[0, h], v_ref[0, h], (key_lane == lane) | (live & (key_lane < lane)))

        each_lane(window)
        if has_pending:

            @pl.when(flags[r, count] != 0)
            def _pending() -> None:
                def all_of_it(lane: jax.Array) -> None:
                    for h in range(kv):
                        update(lane, h, unwritten[0][0, h], unwritten[1][0, h], None)

                each_lane(all_of_it)

        def prefix(c: jax.Array, _: None) -> None:
            slot = lax.rem(c, 2)

            @pl.when(c + 1 < chunks)
            def _next() -> None:
                copies(c + 1, 1 - slot, lambda copy: copy.start())

            copies(c, slot, lambda copy: copy.wait())
            seen = c * tokens + lax.broadcasted_iota(jnp.int32, (1, tokens), 1) < length
            kept = c * tokens + lax.broadcasted_iota(jnp.int32, (tokens, 1), 0) < length

            def chunk_of(lane: jax.Array) -> None:
                for h in range(kv):
                    # Whatever lies in the buffer past the prefix, NaN too, is no value.
                    values = jnp.where(kept, v_buffer[slot, h], 0)
                    update(lane, h, k_buffer[slot, h], values, seen)

            each_lane(chunk_of)

        lax.fori_loop(0, chunks, prefix, None)

        def finish(lane: jax.Array) -> None:
            for h in range(kv):
                out_ref[0, h, lane] = (acc[lane, h] / total[lane, h]).astype(out_ref.dtype)

        each_lane(finish)


def write_blocks(pool: jax.Array, fresh: jax.Array, pages: jax.Array, offsets: jax.Array, *, interpret: Any = False) -> jax.Array:
    """See the package's ``write_blocks``: one DMA a page from ``fresh`` to its place in all layers, all in flight together."""
    fresh = _heads_first(fresh).astype(pool.dtype)
    view = _heads_first(pool)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    written = pl.pallas_call(
        functools.partial(_write, block=fresh.shape[3], page=pool.shape[2]),
        out_shape=jax.ShapeDtypeStruct(view.shape, view.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        input_output_aliases={3: 0},
        name="write_blocks",
        interpret=interpret,
    )(pages.reshape(-1), offsets, fresh, view)
    return written.transpose(POOL_ORDER)  # swaps the same two dimensions back


def _write(pages: Any, offsets: Any, fresh: Any, pool_in: Any, pool: Any, arrived: Any, *, block: int, page: int) -> None:
    del pool_in  # the same memory as `pool`
    parts, size = max(1, block // page), min(block, page)  # of a block: pages, and positions in each

    def each(act: Any) -> None:
        def one(i: jax.Array, _: None) -> None:
            @pl.when((pages[i] >= 0) & (pages[i] < pool.shape[1]))
            def _row() -> None:
                source, to = fresh.at[:, i], pool.at[:, pages[i]]
                if parts > 1:
                    first = pl.multiple_of(lax.rem(i, jnp.int32(parts)) * size, size)
                    source = fresh.at[:, lax.div(i, jnp.int32(parts)), :, pl.ds(first, size)]
                if block < page:
                    to = pool.at[:, pages[i], :, pl.ds(pl.multiple_of(offsets[i], size), size)]
                act(pltpu.make_async_copy(source, to, arrived))

        lax.fori_loop(0, fresh.shape[1] * parts, one, None)

    each(lambda copy: copy.start())
    each(lambda copy: copy.wait())
