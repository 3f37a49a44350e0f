"""Attention of a window of blocks over a paged prefix and itself, in plain jnp."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_attention.stored import Stored, held, plain


_PREFIX_TOKENS = 256  # prefix positions attended to at a time; bounds the gathered copy of the pool
_NEVER = -1e30  # a finite mask value keeps fully masked chunks free of NaN


class Keys(NamedTuple):
    """The keys and values that a window of R rows may see, beside its own.

    Attributes:
      pool_k, pool_v: ``[L, N, P, KV, H]``, the paged pool; see ``stored`` for what it may be.
      page_table: ``[R, M]`` int32, the pages of a row's positions; entries at or past N are not read into any result.
      prefix_len: ``[R]`` int32, how many positions from 0 on are cached; the last page need not be full.
      lanes: ``[R, W / B]`` bool, blocks of the window that exist; no other block sees a lane that does not.
    """

    pool_k: Any
    pool_v: Any
    page_table: jax.Array
    prefix_len: jax.Array
    lanes: jax.Array


def split_heads(heads: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries ``[..., KV, G, H]``, keys and values ``[..., KV, H]`` of ``[..., KV, G + 2, H]``."""
    return heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]


def block_attention(
    heads: jax.Array,
    keys: Keys,
    *,
    layer: jax.Array,
    block: int,
    pending: tuple[jax.Array, jax.Array] | None = None,
    visible: jax.Array | None = None,
) -> jax.Array:
    """See the package's ``block_attention``.

    The softmax is accumulated over the window first, then over the pending block, then over prefix chunks up to the
    longest prefix in the batch. A part that a row does not see changes nothing of that row, to the bit, so a row depends
    neither on the others nor on whether a pending block was passed.
    """
    q, k, v = split_heads(heads)
    rows, width, _, _, head = q.shape
    pool_k, pool_v, page_table, prefix_len, lanes = keys
    pages, page = pool_k.shape[1:3]
    q32 = q.astype(jnp.float32) * head**-0.5

    lane = jnp.arange(width) // block
    seen = (lane[None, :] <= lane[:, None]) & (lanes[:, lane][:, None, :] | (lane[None, :] == lane[:, None]))
    if visible is not None:
        seen = jnp.broadcast_to(visible[:, None] if visible.ndim == 2 else visible, (rows, width, width))

    Carry = tuple[jax.Array, jax.Array, jax.Array]

    def attend(carry: Carry, k: jax.Array, v: jax.Array, mask: jax.Array) -> Carry:
        """One online-softmax update; ``mask`` broadcasts against ``[R, KV, G, W, keys]``."""
        peak, total, out = carry
        k, v = k.astype(jnp.float32), v.astype(jnp.float32)
        score = jnp.where(mask, jnp.einsum("rtkgh,rskh->rkgts", q32, k), _NEVER)
        new = jnp.maximum(peak, score.max(-1))
        p = jnp.where(mask, jnp.exp(score - new[..., None]), 0.0)
        scale = jnp.exp(peak - new)
        out = out * scale[..., None] + jnp.einsum("rkgts,rskh->rkgth", p, v)
        return new, total * scale + p.sum(-1), out

    shape = (rows, *q.shape[2:4], width)
    carry = (jnp.full(shape, _NEVER), jnp.zeros(shape), jnp.zeros((*shape, head)))
    carry = attend(carry, k, v, seen[:, None, None])
    if pending is not None:
        unwritten, live = pending
        carry = attend(carry, *split_heads(unwritten)[1:], live[:, None, None, None, None])

    chunk = max(1, min(_PREFIX_TOKENS // page, page_table.shape[1]))
    chunks = -(-page_table.shape[1] // chunk)
    table = jnp.pad(page_table, ((0, 0), (0, chunks * chunk - page_table.shape[1])), constant_values=pages)
    flat = jax.tree.map(lambda p: p.reshape(-1, *p.shape[2:]), (pool_k, pool_v))

    def prefix(i: jax.Array, carry: Carry) -> Carry:
        at = lax.dynamic_slice_in_dim(table, i * chunk, chunk, 1)
        at = layer * pages + jnp.minimum(at, pages - 1)
        gathered = jax.tree.map(lambda p: p[at].reshape(rows, chunk * page, *p.shape[2:]), flat)
        cached_k, cached_v = (plain(stored, q.dtype) for stored in gathered)
        cached = i * chunk * page + jnp.arange(chunk * page) < prefix_len[:, None]
        # Pages that are not read may hold anything, also what is not a number, and zero times that is not zero.
        cached_v = jnp.where(cached[..., None, None], cached_v, 0)
        return attend(carry, cached_k, cached_v, cached[:, None, None, None])

    needed = (prefix_len.max() + chunk * page - 1) // (chunk * page)
    _, total, out = lax.fori_loop(0, needed, prefix, carry)
    return jnp.einsum("rkgth->rtkgh", out / total[..., None]).astype(q.dtype)


def write_blocks(pool: Stored, fresh: jax.Array, pages: jax.Array, offsets: jax.Array) -> Stored:
    """See the package's ``write_blocks``: one scatter, in whatever order the pool lies."""

    def write(pool: jax.Array, fresh: jax.Array) -> jax.Array:
        layers, rows, block, *head = fresh.shape
        page = pool.shape[2]
        if block >= page:
            return pool.at[:, pages.reshape(-1)].set(fresh.reshape(layers, rows * (block // page), page, *head), mode="drop")
        window = (0, *range(2, fresh.ndim))
        where = lax.ScatterDimensionNumbers(update_window_dims=window, inserted_window_dims=(1,), scatter_dims_to_operand_dims=(1, 2))
        at = jnp.stack([pages, offsets], 1)
        return lax.scatter(pool, at, fresh, where, mode=lax.GatherScatterMode.FILL_OR_DROP)

    return jax.tree.map(write, pool, held(fresh, pool))


def write_positions(pool: Stored, fresh: jax.Array, pages: jax.Array, offsets: jax.Array) -> Stored:
    """Writes positions one by one, wherever they lie: blocks that need not begin where a page does, or a multiple of a block into it.

    Args:
      pool: ``[L, N, P, KV, H]``.
      fresh: ``[L, R, B, KV, H]``.
      pages: ``[R, B]`` int32, the page of each position. Nothing is written to pages at or past N.
      offsets: ``[R, B]`` int32, where in its page each lies.
    """
    flat = held(fresh.reshape(fresh.shape[0], -1, *fresh.shape[3:]), pool)
    return jax.tree.map(lambda a, new: a.at[:, pages.reshape(-1), offsets.reshape(-1)].set(new, mode="drop"), pool, flat)
