"""One pass of the network over rows of blocks: of a window, of a pending block in front of it, or of prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffulex_jax.decode.program import Program
from diffulex_jax.models.attention import Where
from diffulex_jax.models.base import Params
from diffulex_jax.models.ops import At, Ops, machine_ops
from diffulex_jax.state import KVPool
from pallas_kernels.block_attention import Keys, block_attention, rounded, split_heads, write_blocks, write_positions


def forward(
    program: Program,
    params: Params,
    x: jax.Array,
    positions: jax.Array,
    *,
    keys: Keys,
    pending: jax.Array | None = None,
    visible: jax.Array | None = None,
    keep: bool = False,
    put: Put | None = None,
    watch: Callable[[Ops], Ops] = lambda ops: ops,
) -> tuple[jax.Array, Any]:
    """All layers and the final norm, over whole blocks.

    Args:
      program: the static part.
      params: model parameters.
      x: ``[R, T, D]`` input embeddings.
      positions: ``[R, T]`` int32 absolute positions.
      keys: what is cached of each row, and which of its blocks exist, those of ``pending`` not counted.
      pending: ``[R]`` bool; given, each row begins with a block that sees the cached prefix and itself, and that the other blocks of the
        row see where ``pending`` holds. What the others give does not depend, to the bit, on whether it was given.
      visible: ``[R, T, T]`` bool, what each query sees of the row's own positions; default: those up to the end of its block.
      keep: return the keys and values of all blocks, or of the pending block where there is one.
      put: given, each layer writes its keys and values by it before it attends, so that what is cached of a row may come from another.
      watch: puts operations of its own around those of the machine, to measure them.

    Returns:
      ``(hidden [R, T, D], (k, v))``, keys and values ``[L, R, kept positions, KV, H]``; an empty tuple where nothing is kept; the pool
      where there is a ``put``.
    """
    block = program.dims.block
    kernels = program.kernels.for_layers(params["embed"].dtype)
    whole = not program.dims.prompt_apart
    attention = functools.partial(block_attention, block=block, whole_blocks=whole, backend=kernels.block_attention)

    def attend(at: At, heads: jax.Array) -> tuple[jax.Array, Any]:
        # Whether what is written is seen from the pool or before it gets there must make no difference: it is rounded first.
        if put is not None:
            pool = put(at.pool, at.layer, *split_heads(heads)[1:])
            heads = rounded(heads, pool.k)
            return attention(heads, keys._replace(pool_k=pool.k, pool_v=pool.v), layer=at.layer, visible=visible), pool
        if pending is None:
            kept = split_heads(heads)[1:] if keep else ()
            return attention(rounded(heads, keys.pool_k) if keep else heads, keys, layer=at.layer, visible=visible), kept
        first, window = heads[:, :block], heads[:, block:]
        kept = split_heads(first)[1:] if keep else ()
        first = rounded(first, keys.pool_k)
        out = attention(first, keys._replace(lanes=pending[:, None]), layer=at.layer)
        outs = [out, attention(window, keys, layer=at.layer, pending=(first, pending))]
        return jnp.concatenate(outs, 1), kept

    lanes = keys.lanes if pending is None else jnp.concatenate([pending[:, None], keys.lanes], 1)
    valid = jnp.repeat(lanes, block, 1)
    if visible is not None:
        valid &= visible.any(1)  # what nobody sees is no token: it must not have a say in the experts of its block
    pool = KVPool(keys.pool_k, keys.pool_v) if put is not None else None
    ops = machine_ops(kernels, attend, pending=0 if pending is None else block, valid=valid, pool=pool)
    return program.model.layers(params, x, positions, watch(ops))


Put = Callable[[KVPool, jax.Array, jax.Array, jax.Array], KVPool]
"""``put(pool, layer, k [R, T, KV, H], v) -> pool``"""


def prefill(
    program: Program,
    params: Params,
    pool: KVPool,
    tokens: jax.Array,
    *,
    start: jax.Array,
    length: jax.Array,
    written: jax.Array,
    page_table: jax.Array,
) -> tuple[KVPool, jax.Array]:
    """Writes the KV of prompt blocks, of any requests.

    A row is a piece of a prompt. It sees what lies before it in the pool, where an earlier forward wrote it, or another row of this one:
    every layer writes the blocks of all rows before it attends. So, to the bit, a row is what it is however prompts are cut and packed,
    as long as its ``start`` and the compiled size are the same.

    Args:
      program: the static part. Where its attention is not chunkable, a row is a whole prompt.
      params: model parameters.
      pool: the KV pool; donate it.
      tokens: ``[R, C, B]`` int32: R rows of C blocks, as compiled.
      start: ``[R]`` int32, position of a row's first token, a multiple of B.
      length: ``[R]`` int32, how many of its tokens exist: whole blocks, but for the last of a whole prompt; 0: no such row.
      written: ``[R, C]`` bool, the blocks to write. Others are there to be seen in their row, or not at all.
      page_table: ``[R, P]`` int32, the pages of each row's request.

    Returns:
      The pool, and ``[R, dims.carried]`` float32, the hidden state of each row's last position.
    """
    rows, blocks, block = tokens.shape
    at = jnp.arange(blocks * block, dtype=jnp.int32)
    lanes, visible = at[::block] < length[:, None], None
    if not program.attention.chunkable:
        where = Where(at // block, at < length[:, None])
        visible = program.attention.mask(where, where) & where.prompt[:, None]
    firsts = (start[:, None] + at[::block]).reshape(-1)
    pages = _pages_written(program, pool, jnp.repeat(page_table, blocks, 0), firsts, written.reshape(-1))

    def put(pool: KVPool, layer: jax.Array, k: jax.Array, v: jax.Array) -> KVPool:
        # The pages of all layers as those of one: then the pool stays where it is.
        layers, count = pool.k.shape[:2]
        here = jnp.where(pages < count, layer * count + pages, layers * count)
        flat = jax.tree.map(lambda a: a.reshape(1, layers * count, *a.shape[2:]), pool)
        k, v = (a.reshape(1, rows * blocks, block, *a.shape[2:]) for a in (k, v))
        written = _write_at(program, flat, k, v, pages=here, start=firsts)
        return jax.tree.map(lambda a: a.reshape(layers, count, *a.shape[2:]), written)

    keys = Keys(pool.k, pool.v, page_table, start, lanes)
    x = params["embed"][tokens.reshape(rows, -1)]
    hidden, pool = forward(program, params, x, start[:, None] + at, keys=keys, visible=visible, put=put)
    last = hidden[jnp.arange(rows), jnp.maximum(length - 1, 0), : program.dims.carried]
    return pool, last.astype(jnp.float32)


def write(
    program: Program, pool: KVPool, k: jax.Array, v: jax.Array, *, page_table: jax.Array, start: jax.Array, where: jax.Array
) -> KVPool:
    """``pool`` with the block ``k, v [L, R, B, KV, H]`` of each row at position ``start [R]`` of its ``page_table [R, P]``, ``where``."""
    return _write_at(program, pool, k, v, pages=_pages_written(program, pool, page_table, start, where), start=start)


def pages_of(program: Program, page_table: jax.Array, start: jax.Array) -> jax.Array:
    """``[R, n]`` int32: the n pages that hold each row's block at position ``start [R]``; n is 1 unless a block is several pages, or, where
    a block may begin anywhere in a page, B: the page of each position."""
    dims = program.dims
    if dims.prompt_apart:
        at = jnp.maximum(start[:, None] + jnp.arange(dims.block), 0) // dims.page
    else:
        at = jnp.maximum(start, 0)[:, None] // dims.page + jnp.arange(max(1, dims.block // dims.page))
    return jnp.take_along_axis(page_table, at, 1, mode="clip")


def _pages_written(program: Program, pool: KVPool, page_table: jax.Array, start: jax.Array, where: jax.Array) -> jax.Array:
    """:func:`pages_of`, one past the pool but ``where [R]``; without the last axis where n is 1."""
    pages = jnp.where(where[:, None], pages_of(program, page_table, start), pool.k.shape[1])
    return pages[:, 0] if pages.shape[1] == 1 else pages


def _write_at(program: Program, pool: KVPool, k: jax.Array, v: jax.Array, *, pages: jax.Array, start: jax.Array) -> KVPool:
    dims = program.dims
    if dims.prompt_apart:
        offsets = (start[:, None] + jnp.arange(dims.block)) % dims.page
        return KVPool(*(write_positions(old, new, pages, offsets) for old, new in ((pool.k, k), (pool.v, v))))
    put = functools.partial(write_blocks, pages=pages, offsets=start % dims.page, backend=program.kernels.block_attention)
    return KVPool(put(pool.k, k), put(pool.v, v))
