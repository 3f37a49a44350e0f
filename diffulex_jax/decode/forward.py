"""One pass of the network over rows of blocks, and what it writes into the pool."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffulex_jax.decode.program import Program
from diffulex_jax.models.base import Params
from diffulex_jax.models.ops import At, Ops, machine_ops
from diffulex_jax.state import KVPool
from pallas_kernels import Kernels
from pallas_kernels.block_attention import Keys, block_attention, rounded, split_heads, write_blocks, write_positions


def forward(
    program: Program,
    params: Params,
    x: jax.Array,
    positions: jax.Array,
    *,
    keys: Keys,
    pending: jax.Array | None = None,
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
      keep: return the keys and values of all blocks, or of the pending block where there is one.
      watch: puts operations of its own around those of the machine, to measure them.

    Returns:
      ``(hidden [R, T, D], (k, v))``, keys and values ``[L, R, kept positions, KV, H]``; an empty tuple where nothing is kept.
    """
    block = program.dims.block
    kernels = program.kernels.for_layers(params["embed"].dtype)
    attention = _attention(program, kernels)
    lanes = keys.lanes if pending is None else jnp.concatenate([pending[:, None], keys.lanes], 1)

    def attend(at: At, heads: jax.Array) -> tuple[jax.Array, Any]:
        # Whether what is written is seen from the pool or before it gets there must make no difference: it is rounded first.
        if pending is None:
            kept = split_heads(heads)[1:] if keep else ()
            return attention(rounded(heads, keys.pool_k) if keep else heads, keys, layer=at.layer), kept
        first, window = heads[:, :block], heads[:, block:]
        kept = split_heads(first)[1:] if keep else ()
        first = rounded(first, keys.pool_k)
        if not kernels.rows_apart:
            return attention(jnp.concatenate([first, window], 1), keys._replace(lanes=lanes), layer=at.layer), kept
        out = attention(first, keys._replace(lanes=pending[:, None]), layer=at.layer)
        outs = [out, attention(window, keys, layer=at.layer, pending=(first, pending))]
        return jnp.concatenate(outs, 1), kept

    ops = machine_ops(kernels, attend, pending=0 if pending is None else block, valid=jnp.repeat(lanes, block, 1))
    return program.model.layers(params, x, positions, watch(ops))


class Rows(NamedTuple):
    """Rows of whole blocks that attend in the same way.

    Attributes:
      x: ``[R, T, D]`` input embeddings.
      positions: ``[R, T]`` int32 absolute positions.
      keys: what is cached of each row, and which of its blocks exist; not its pool, which each layer is given anew.
      visible: ``[R, T, T]`` bool, what each query sees of the row's own positions; None: those up to the end of its block.
      written: the blocks that are written into the pool, as :class:`Written` has them; None: none.
    """

    x: jax.Array
    positions: jax.Array
    keys: Keys
    visible: jax.Array | None = None
    written: Written | None = None


class Written(NamedTuple):
    """Where blocks of rows go: ``pages``, one past the pool for those that are not written, and ``start [R T / B]``, their positions."""

    pages: jax.Array
    start: jax.Array


def forward_through_pool(program: Program, params: Params, pool: KVPool, kinds: Sequence[Rows]) -> tuple[list[jax.Array], KVPool]:
    """All layers and the final norm, over rows of several kinds beside each other.

    Every layer writes keys and values into the pool before any row attends, so that what is cached of a row may come from another.

    Args:
      program, params: the static part, and model parameters.
      pool: the KV pool.
      kinds: at least one. Several go through matmuls as one row.

    Returns:
      Hidden states ``[R, T, D]`` of each kind, and the pool.
    """
    kernels = program.kernels.for_layers(params["embed"].dtype)
    attention = _attention(program, kernels)
    sizes = [rows.x.shape[:2] for rows in kinds]
    ends = list(itertools.accumulate(rows * length for rows, length in sizes))
    groups = [list(group) for _, group in itertools.groupby(range(len(kinds)), lambda i: (sizes[i][1], kinds[i].visible is None))]

    def joined(arrays: Sequence[jax.Array]) -> jax.Array:
        return arrays[0] if len(kinds) == 1 else jnp.concatenate([a.reshape(1, -1, *a.shape[2:]) for a in arrays], 1)

    def parted(a: jax.Array) -> list[jax.Array]:
        if len(sizes) == 1:
            return [a]
        return [part.reshape(*size, *a.shape[2:]) for part, size in zip(jnp.split(a, ends[:-1], 1), sizes, strict=True)]

    writing = {i: rows.written for i, rows in enumerate(kinds) if rows.written is not None}
    written = Written(*map(jnp.concatenate, zip(*writing.values(), strict=True))) if writing else None

    def blocks(heads: jax.Array) -> tuple[jax.Array, ...]:
        """Keys and values, each ``[n, B, KV, H]``."""
        return tuple(a.reshape(-1, program.dims.block, *a.shape[2:]) for a in split_heads(heads)[1:])

    def attend(at: At, heads: jax.Array) -> tuple[jax.Array, KVPool]:
        pool, own = at.pool, parted(heads)
        if written is not None:
            k, v = map(jnp.concatenate, zip(*(blocks(own[i]) for i in writing), strict=True))
            pool = _write_layer(program, pool, at.layer, k, v, written)
            # Whether what is written is seen from the pool or before it gets there must make no difference.
            own = [rounded(of, pool.k) if i in writing else of for i, of in enumerate(own)]
        outs = []
        for group in groups:  # rows of one length attend at once
            keys = Keys(pool.k, pool.v, *map(jnp.concatenate, zip(*(kinds[i].keys[2:] for i in group), strict=True)))
            together = joined([own[i] for i in group]).reshape(len(keys.lanes), -1, *heads.shape[2:])
            outs.append(attention(together, keys, layer=at.layer, visible=kinds[group[0]].visible))
        return joined(outs), pool

    def exists(rows: Rows) -> jax.Array:
        lanes = jnp.repeat(rows.keys.lanes, program.dims.block, 1)
        # What nobody sees is no token: it must not have a say in the experts of its block.
        return lanes if rows.visible is None else lanes & rows.visible.any(1)

    ops = machine_ops(kernels, attend, valid=joined([exists(rows) for rows in kinds]), pool=pool)
    x, positions = joined([rows.x for rows in kinds]), joined([rows.positions for rows in kinds])
    hidden, pool = program.model.layers(params, x, positions, ops)
    return parted(hidden), pool


def _attention(program: Program, kernels: Kernels) -> Callable[..., jax.Array]:
    whole = not program.dims.prompt_apart
    return functools.partial(block_attention, block=program.dims.block, whole_blocks=whole, backend=kernels.block_attention)


def _write_layer(program: Program, pool: KVPool, layer: jax.Array, k: jax.Array, v: jax.Array, written: Written) -> KVPool:
    """``pool`` with blocks ``k, v [n, B, KV, H]`` in one of its layers."""
    # The pages of all layers as those of one: then the pool stays where it is.
    layers, count = pool.k.shape[:2]
    here = jnp.where(written.pages < count, layer * count + written.pages, layers * count)
    flat = jax.tree.map(lambda a: a.reshape(1, layers * count, *a.shape[2:]), pool)
    flat = _write_at(program, flat, k[None], v[None], pages=here, start=written.start)
    return jax.tree.map(lambda a: a.reshape(layers, count, *a.shape[2:]), flat)


def write(
    program: Program, pool: KVPool, k: jax.Array, v: jax.Array, *, page_table: jax.Array, start: jax.Array, where: jax.Array
) -> KVPool:
    """``pool`` with the block ``k, v [L, R, B, KV, H]`` of each row at position ``start [R]`` of its ``page_table [R, P]``, ``where``."""
    return _write_at(program, pool, k, v, pages=pages_written(program, pool, page_table, start, where), start=start)


def pages_of(program: Program, page_table: jax.Array, start: jax.Array) -> jax.Array:
    """``[R, n]`` int32: the n pages that hold each row's block at position ``start [R]``; n is 1 unless a block is several pages, or, where
    a block may begin anywhere in a page, B: the page of each position."""
    dims = program.dims
    if dims.prompt_apart:
        at = jnp.maximum(start[:, None] + jnp.arange(dims.block), 0) // dims.page
    else:
        at = jnp.maximum(start, 0)[:, None] // dims.page + jnp.arange(max(1, dims.block // dims.page))
    return jnp.take_along_axis(page_table, at, 1, mode="clip")


def pages_written(program: Program, pool: KVPool, page_table: jax.Array, start: jax.Array, where: jax.Array) -> jax.Array:
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
