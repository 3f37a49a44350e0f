"""One pass of the network over a sub-block of each row's window, beside old keys and values of the rest of it (Fast-dLLM v2).

The pool's pages of the window's block hold what the last forward that saw them left. Pages are as long as a sub-block.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffulex_jax.decode.forward import forward, write
from diffulex_jax.decode.program import Program
from diffulex_jax.models.base import Params
from diffulex_jax.state import DecodeState, KVPool
from pallas_kernels.block_attention import Keys


def current_sub_block(program: Program, state: DecodeState) -> tuple[jax.Array, jax.Array]:
    """The sub-block of each row's window that is filled next: the first with a mask.

    Returns:
      ``(low [S] int32, renew [S] bool)``: its first position, from the window's start, and whether the whole window must go through the
      network, because it never did, or because that position is a mask, which only a position outside the sub-block speaks of.
    """
    size, block = program.dims.sub_block_cache, program.dims.block
    open_ = (state.masked & state.editable)[:, 0]
    low = jnp.where(open_, jnp.arange(block) // size * size, block).min(-1)
    none = low >= block
    low = jnp.where(none, 0, low)
    return low, none | (state.steps[:, 0] == 0) | jnp.take_along_axis(open_, low[:, None], 1)[:, 0]


def forward_sub_block(
    program: Program, params: Params, pool: KVPool, state: DecodeState, low: jax.Array, *, page_table: jax.Array
) -> tuple[jax.Array, KVPool]:
    """Hidden states ``[S, B, D]`` of which those of positions ``low + 1`` to the sub-block's end speak of their positions.

    Keys do not care for their order: the pages of the window's other sub-blocks are read as if all lay before.
    """
    dims, size = program.dims, program.dims.sub_block_cache
    here = program._replace(dims=dataclasses.replace(dims, block=size))
    first, inside = state.start + low, low[:, None] + jnp.arange(size)
    page = jnp.arange(page_table.shape[1])
    others = jnp.take_along_axis(page_table, page + (page >= first[:, None] // size), 1, mode="clip")
    keys = Keys(pool.k, pool.v, others, state.start + dims.block - size, state.active & state.live[:, None])
    x = params["embed"][jnp.take_along_axis(state.tokens[:, 0], inside, 1)]
    hidden, (k, v) = forward(here, params, x, state.start[:, None] + inside, keys=keys, keep=True)
    pool = write(here, pool, k, v, page_table=page_table, start=first, where=state.live)
    before = jnp.clip(jnp.arange(dims.block) - 1 - low[:, None], 0, size - 1)
    return jnp.take_along_axis(hidden, before[..., None], 1), pool
