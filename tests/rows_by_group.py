"""What ``pallas_kernels.grouped_matmul.gpu_places.place_rows`` is to compute, in plain code."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.grouped_matmul.gpu_kernel import ALIGN, Groups
from pallas_kernels.grouped_matmul.gpu_places import Placed


def place_rows(ids, valid, *, groups, shared, tile_rows):
    """The tokens of rows that are not written are -1."""
    tokens, valid = len(ids), jnp.ones(len(ids), bool) if valid is None else valid
    there = valid[:, None] & (ids >= 0) & (ids < groups)
    of = jnp.where(there, ids, groups).reshape(-1)
    place = jnp.argsort(jnp.argsort(of, stable=True)).reshape(ids.shape)
    size = jnp.bincount(of, length=groups)
    start = jnp.cumsum(size) - size
    if shared:  # the row of every token, valid or not, behind all others
        begin = size.sum()
        start, size = jnp.append(start, begin), jnp.append(size, tokens)
        place = jnp.concatenate([place, begin + jnp.arange(tokens)[:, None]], 1)
        there = jnp.concatenate([there, jnp.ones((tokens, 1), bool)], 1)
    room = -(-place.size // ALIGN) * ALIGN
    token = jnp.full(room, -1).at[jnp.where(there, place, room)].set(jnp.arange(tokens)[:, None], mode="drop")
    tiles = jnp.where(size > 0, -(-(start % ALIGN + size) // tile_rows), 0)
    counted = [a.astype(jnp.int32) for a in (start, size, jnp.cumsum(tiles))]
    row = jnp.where(there & valid[:, None], place, 0).astype(jnp.int32)
    return Placed(token.astype(jnp.int32), row), Groups(*counted)
