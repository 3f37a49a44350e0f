"""One pass of the network over rows of blocks: of a window, of a pending block in front of it, or of a prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffulex_jax.decode.program import Program
from diffulex_jax.models.attention import Where
from diffulex_jax.models.base import Params
from diffulex_jax.models.ops import Ops, machine_ops
from diffulex_jax.state import KVPool
from pallas_kernels.block_attention import Keys, block_attention, split_heads, write_blocks


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
      watch: puts operations of its own around those of the machine, to measure them.
      keep: return the keys and values of all blocks, or of the pending block where there is one.

    Returns:
      ``(hidden [R, T, D], (k, v))``, keys and values ``[L, R, kept positions, KV, H]``; an empty tuple where nothing is kept.
    """
    block = program.dims.block
    kernels = program.kernels.for_layers(params["embed"].dtype)
    attention = functools.partial(block_attention, block=block, backend=kernels.block_attention)

    def attend(layer: jax.Array, heads: jax.Array) -> tuple[jax.Array, Any]:
        if pending is None:
            return attention(heads, keys, layer=layer, visible=visible), split_heads(heads)[1:] if keep else ()
        first, window = heads[:, :block], heads[:, block:]
        out = attention(first, keys._replace(lanes=pending[:, None]), layer=layer)
        outs = [out, attention(window, keys, layer=layer, pending=(first, pending))]
        return jnp.concatenate(outs, 1), split_heads(first)[1:] if keep else ()

    lanes = keys.lanes if pending is None else jnp.concatenate([pending[:, None], keys.lanes], 1)
    valid = jnp.repeat(lanes, block, 1)
    if visible is not None:
        valid &= visible.any(1)  # what nobody sees is no token: it must not have a say in the experts of its block
    ops = machine_ops(kernels, attend, pending=0 if pending is None else block, valid=valid)
    return program.model.layers(params, x, positions, watch(ops))


def prefill(
    program: Program,
    params: Params,
    pool: KVPool,
    tokens: jax.Array,
    *,
    count: jax.Array,
    start: jax.Array,
    length: jax.Array,
    page_table: jax.Array,
) -> KVPool:
    """Writes the KV of whole prompt blocks of one request.

    Args:
      program: the static part. Where its attention is not chunkable the whole prompt must be given at once.
      params: model parameters.
      pool: the KV pool; donate it.
      tokens: ``[C, B]`` int32, C the chunk's compiled size.
      count: int32 scalar, how many of the C blocks are whole prompt blocks to be written.
      start: int32 scalar, absolute position of the chunk; everything before it is in the pool.
      length: int32 scalar, tokens of the prompt.
      page_table: ``[P]`` int32, the request's pages.
    """
    blocks, block = tokens.shape
    firsts = start + jnp.arange(blocks, dtype=jnp.int32) * block
    positions = start + jnp.arange(blocks * block, dtype=jnp.int32)
    written, lanes, visible = jnp.arange(blocks) < count, jnp.arange(blocks) < count, None
    if not program.attention.chunkable:
        lanes = firsts < length
        where = Where(positions // block, positions < length)
        visible = (program.attention.mask(where, where) & where.prompt)[None]
    keys = Keys(pool.k, pool.v, page_table[None], start[None], lanes[None])
    x = params["embed"][tokens.reshape(1, -1)]
    _, (k, v) = forward(program, params, x, positions[None], keys=keys, visible=visible, keep=True)
    k, v = (a.reshape(a.shape[0], blocks, block, *a.shape[3:]) for a in (k, v))
    return write(program, pool, k, v, page_table=jnp.broadcast_to(page_table, (blocks, *page_table.shape)), start=firsts, where=written)


def write(
    program: Program, pool: KVPool, k: jax.Array, v: jax.Array, *, page_table: jax.Array, start: jax.Array, where: jax.Array
) -> KVPool:
    """``pool`` with the block ``k, v [L, R, B, KV, H]`` of each row at position ``start [R]`` of its ``page_table [R, P]``, ``where``."""
    pages = jnp.where(where[:, None], pages_of(program, page_table, start), pool.k.shape[1])
    pages = pages[:, 0] if pages.shape[1] == 1 else pages
    put = functools.partial(write_blocks, pages=pages, offsets=start % program.dims.page, backend=program.kernels.block_attention)
    return KVPool(put(pool.k, k), put(pool.v, v))


def pages_of(program: Program, page_table: jax.Array, start: jax.Array) -> jax.Array:
    """``[R, n]`` int32: the n pages that hold each row's block at position ``start [R]``; n is 1 unless a block is several pages."""
    dims = program.dims
    at = jnp.maximum(start, 0)[:, None] // dims.page + jnp.arange(max(1, dims.block // dims.page))
    return jnp.take_along_axis(page_table, at, 1, mode="clip")
