"""The forward of a denoise step: what speaks of each row's window, and the pending block in front of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.decode.forward import Rows, Written, forward, forward_through_pool, pages_written, write
from diffulex_jax.decode.program import Program
from diffulex_jax.decode.prompts import Prompts, prompt_rows
from diffulex_jax.models.base import Params
from diffulex_jax.state import DecodeState, KVPool, Merge
from pallas_kernels import token_merge
from pallas_kernels.block_attention import Keys
from pallas_kernels.target import anywhere


def window_forward(
    program: Program, params: Params, pool: KVPool, state: DecodeState, *, page_table: jax.Array, count: int | None
) -> tuple[jax.Array, KVPool, DecodeState]:
    """Hidden states ``[S, K B, D]`` that speak of the window; the same forward writes the KV of the pending block where there is one.

    ``count``: so many rows have one, at the most; see ``denoise_step.step``.
    """
    if program.dims.commit_alone:
        return forward_pending_or_window(program, params, pool, state, page_table=page_table)
    if count and count < program.dims.slots:
        return _forward_through_pool(program, params, pool, state, page_table=page_table, count=count)
    return _forward_pending_and_window(program, params, pool, state, page_table=page_table, count=count)


def _forward_pending_and_window(
    program: Program, params: Params, pool: KVPool, state: DecodeState, *, page_table: jax.Array, count: int | None
) -> tuple[jax.Array, KVPool, DecodeState]:
    """As :func:`window_forward`. Only in steps where some row has a pending block does it go through the network: with the window, or,
    where ``kernels.pending_apart``, ahead of it.

    Where ``dims.carried``, the output at a position speaks of the next one. Then that of the last position before the window is kept, from
    the forward that wrote it.
    """
    slots, window, block = state.tokens.shape
    embed = functools.partial(_embed, program, params)
    live, active = state.pending.live & state.live, state.active & state.live[:, None]
    after = _committed(state, live)
    x = embed(state.tokens, state.merge).reshape(slots, window * block, -1)
    positions = state.positions.reshape(slots, -1)
    at = positions[:, :1] - block + jnp.arange(block)

    def written(pool: KVPool, kv: tuple[jax.Array, jax.Array]) -> KVPool:
        return write(program, pool, *kv, page_table=page_table, start=state.start - block, where=live)

    def last_of(hidden: jax.Array) -> jax.Array:
        last = hidden[:, block - 1, : program.dims.carried].astype(jnp.float32)
        return jnp.where(live[:, None], last, state.carried)

    def pending_only(pool: KVPool) -> tuple[jax.Array, KVPool]:
        keys = Keys(pool.k, pool.v, page_table, state.written_upto, live[:, None])
        hidden, kv = forward(program, params, embed(state.pending.tokens, state.pending.merge), at, keys=keys, keep=True)
        return last_of(hidden), written(pool, kv)

    def window_only(carried: jax.Array, pool: KVPool) -> tuple[jax.Array, jax.Array, KVPool]:
        keys = Keys(pool.k, pool.v, page_table, after.written_upto, active)
        return forward(program, params, x, positions, keys=keys)[0], carried, pool

    def together(pool: KVPool) -> tuple[jax.Array, jax.Array, KVPool]:
        keys = Keys(pool.k, pool.v, page_table, state.written_upto, active)
        both = jnp.concatenate([embed(state.pending.tokens, state.pending.merge), x], 1)
        hidden, kv = forward(program, params, both, jnp.concatenate([at, positions], 1), keys=keys, pending=live, keep=True)
        return hidden[:, block:], last_of(hidden), written(pool, kv)

    def either(then: Callable[..., Any], otherwise: Callable[..., Any]) -> Any:
        """By whether some row has a pending block; without one, ``after`` has written as much as ``state``."""
        if count is None:
            return lax.cond(anywhere(live.any()), then, otherwise, pool)
        return (then if count else otherwise)(pool)

    if program.kernels.pending_apart:
        hidden, carried, pool = window_only(*either(pending_only, lambda pool: (state.carried, pool)))
    else:
        hidden, carried, pool = either(together, functools.partial(window_only, state.carried))
    if program.dims.carried:
        hidden = jnp.concatenate([carried[:, None].astype(hidden.dtype), hidden[:, :-1]], 1)
    return hidden, pool, after.replace(carried=carried)


def forward_pending_or_window(
    program: Program, params: Params, pool: KVPool, state: DecodeState, *, page_table: jax.Array
) -> tuple[jax.Array, KVPool, DecodeState]:
    """As :func:`window_forward`, where ``dims.commit_alone``: a row with a pending block feeds that in place of its window.

    The output at a position speaks of the next one, so the hidden state of each position of the window is that of the one before it.
    For a row that commits, that is the last of the pending block for the first position; what it has for the others means nothing.
    In the other rows it is the first position's that means nothing: it was decided before. Where ``dims.sub_block_cache``, the keys and
    values of windows are kept too, until the block is committed.
    """
    slots, window, block = state.tokens.shape
    commits = state.pending.live & state.live

    def fed(pending: jax.Array, own: jax.Array) -> jax.Array:
        here = commits.reshape(-1, *[1] * (pending.ndim - 1))
        return own.at[:, 0].set(jnp.where(here, pending, own[:, 0]))

    merge = jax.tree.map(fed, state.pending.merge, state.merge)
    x = _embed(program, params, fed(state.pending.tokens, state.tokens), merge).reshape(slots, window * block, -1)
    lanes = jnp.where(commits[:, None], jnp.arange(window) == 0, state.active & state.live[:, None])
    positions = state.positions.reshape(slots, -1)
    at = positions - block * commits[:, None]
    keys = Keys(pool.k, pool.v, page_table, state.written_upto, lanes)
    hidden, (k, v) = forward(program, params, x, at, keys=keys, keep=True)
    k, v = k[:, :, :block], v[:, :, :block]
    kept = state.live if program.dims.sub_block_cache else commits
    pool = write(program, pool, k, v, page_table=page_table, start=at[:, 0], where=kept)
    before = jnp.clip(positions - 1 - at[:, :1], 0, window * block - 1)
    return jnp.take_along_axis(hidden, before[..., None], 1), pool, _committed(state, commits)


def forward_beside_prompts(
    program: Program, params: Params, pool: KVPool, state: DecodeState, *, page_table: jax.Array, prompts: Prompts
) -> tuple[jax.Array, KVPool, DecodeState]:
    """As :func:`window_forward` for a program that ``mixes``, and the KV of prompts is written: weights are read once for both."""
    return _forward_through_pool(program, params, pool, state, page_table=page_table, prompts=prompts)


def _forward_through_pool(
    program: Program,
    params: Params,
    pool: KVPool,
    state: DecodeState,
    *,
    page_table: jax.Array,
    count: int | None = None,
    prompts: Prompts | None = None,
) -> tuple[jax.Array, KVPool, DecodeState]:
    """Pending blocks are written as prompts are, so that a window finds in the pool what lies before it, be it of this forward.

    ``count``: rows that have a pending block, at the most; None for all.
    """
    slots, window, block = state.tokens.shape
    live, active = state.pending.live & state.live, state.active & state.live[:, None]
    after, positions = _committed(state, live), state.positions.reshape(slots, -1)
    rows = jnp.arange(slots) if count is None else jnp.nonzero(live, size=count, fill_value=slots)[0]

    def of_rows(tree: Any) -> Any:
        return tree if count is None else jax.tree.map(lambda a: jnp.take(a, rows, 0, mode="clip"), tree)

    tokens, merge, table, begins, end, there = of_rows(
        (state.pending.tokens, state.pending.merge, page_table, positions[:, 0] - block, state.written_upto, live)
    )
    there &= rows < slots
    pending = Rows(
        _embed(program, params, tokens, merge),
        begins[:, None] + jnp.arange(block),
        Keys(pool.k, pool.v, table, end, there[:, None]),
        written=Written(pages_written(program, pool, table, begins, there), begins),
    )
    x = _embed(program, params, state.tokens, state.merge).reshape(slots, window * block, -1)
    windows = Rows(x, positions, Keys(pool.k, pool.v, page_table, after.written_upto, active))
    kinds = [pending, windows] if prompts is None else [prompt_rows(program, params, pool, prompts), pending, windows]
    (*_, hidden), pool = forward_through_pool(program, params, pool, kinds)
    return hidden, pool, after


def _committed(state: DecodeState, rows: jax.Array) -> DecodeState:
    """``state`` once the pending blocks of ``rows`` have their KV in the pool."""
    written = jnp.where(rows, state.start, state.written_upto)
    return state.replace(written_upto=written, pending=state.pending.replace(live=jnp.zeros_like(rows)))


def _embed(program: Program, params: Params, tokens: jax.Array, merge: Merge) -> jax.Array:
    """``[..., D]``: what goes into the network for ``tokens``."""
    if program.rule.merge is None:
        return params["embed"][tokens]
    return token_merge.merge(
        params["embed"],
        tokens,
        mask_id=program.dims.mask_id,
        ids=merge.ids,
        probs=merge.probs,
        soft=merge.soft,
        spec=program.rule.merge,
        backend=program.kernels.token_merge,
    )
