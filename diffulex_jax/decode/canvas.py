"""Passes of the network over whole canvases, prompt and masks included, in which every position sees all others (LLaDA)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.decode.program import Program
from diffulex_jax.models.base import Params
from diffulex_jax.models.ops import At, Ops, machine_ops
from diffulex_jax.state import DecodeState, KVPool
from pallas_kernels.block_attention import canvas_attention, split_heads
from pallas_kernels.target import anywhere


class Cached(NamedTuple):
    """Keys and values of a canvas from an earlier forward.

    Attributes:
      pool: ``[L, S, T, KV, H]``, page i is the canvas of slot i.
      fresh: ``[S, T]`` bool, positions that a forward makes anew.
    """

    pool: KVPool
    fresh: jax.Array


def canvas_forward(
    program: Program, params: Params, pool: KVPool, state: DecodeState, *, watch: Callable[[Ops], Ops] = lambda ops: ops
) -> tuple[jax.Array, KVPool]:
    """Hidden states ``[S, B, D]`` that speak of the window, each row's canvas being ``[0, limit)``, and the pool.

    How often keys and values are made is the policy's ``cache``: see ``models.attention.AttentionPolicy``. ``watch`` is that of
    ``decode.forward``.
    """
    slots, _, block = state.tokens.shape
    row, at = jnp.arange(slots)[:, None], state.positions.reshape(slots, block)
    tokens = state.sequence.tokens.at[row, at].set(state.tokens.reshape(slots, block), mode="drop")
    hidden = functools.partial(_pass, program, params, state, watch=watch)
    if program.attention.cache == "none":
        return _guided(program, state, tokens, hidden), pool
    return _behind_cache(program, pool, state, functools.partial(hidden, tokens))


def _guided(program: Program, state: DecodeState, tokens: jax.Array, hidden: Callable[..., Any]) -> jax.Array:
    """The window's hidden states from a forward over all of ``tokens [S, T]``.

    Where ``cfg_scale`` is w > 0, a second forward has masks for all that the caller gave, and its hidden states u move the others by
    classifier-free guidance: ``u + (w + 1) (h - u)``. The output matrix is linear, so that is the guidance of LLaDA's logits.
    """
    scale = state.settings.cfg_scale
    (found, _), guided = hidden(tokens), (scale > 0) & state.live

    def guide() -> jax.Array:
        bare = hidden(jnp.where(state.given, program.dims.mask_id, tokens))[0].astype(jnp.float32)
        moved = bare + (scale[:, None, None] + 1) * (found.astype(jnp.float32) - bare)
        return jnp.where(guided[:, None, None], moved.astype(found.dtype), found)

    return lax.cond(anywhere(guided.any()), guide, lambda: found)


def _behind_cache(program: Program, pool: KVPool, state: DecodeState, hidden: Callable[..., Any]) -> tuple[jax.Array, KVPool]:
    """The window's hidden states. The first forward of a block is over the whole canvas, and fills the pool; in a step where no row is
    there, only the positions that others make anew go through the network. Where outputs speak of the next position, those of the first
    forward alone speak of the window's first."""
    total, begin = program.dims.positions, state.start[:, None]
    positions = jnp.arange(total)
    length = jnp.where(state.settings.block_length > 0, state.settings.block_length, program.dims.block)[:, None]
    dual = program.attention.cache == "dual"
    fed = (positions >= begin) & (positions < (begin + length if dual else state.limit[:, None]))
    refresh = state.live & (state.pending.live if program.dims.commit_alone else state.steps[:, 0] == 0)

    def whole(pool: KVPool) -> tuple[jax.Array, KVPool]:
        found, kept = hidden(cached=Cached(pool, fed | refresh[:, None]), keep=True)
        here = refresh[:, None, None, None]
        return found, KVPool(*(jnp.where(here, new, old) for new, old in zip(kept, (pool.k, pool.v), strict=True)))

    def part(pool: KVPool, width: int) -> tuple[jax.Array, KVPool]:
        return hidden(width=width, cached=Cached(pool, fed))[0], pool

    left = jnp.where(state.live, state.limit - state.start, 0).max()
    narrow = functools.partial(part, width=program.dims.block if dual else total)
    for width in (total // 2, total // 4):
        if not dual and width >= program.dims.block:
            # The fewer positions are left to decode, the narrower is the forward behind a cached prefix.
            narrow = functools.partial(_either, left > width, narrow, functools.partial(part, width=width))
    return _either(refresh.any(), whole, narrow, pool)


def _either(here: jax.Array, one: Any, other: Any, pool: KVPool) -> Any:
    """``one(pool)`` where ``here`` holds on any device, else ``other(pool)``."""
    return lax.cond(anywhere(here), one, other, pool)


def _pass(
    program: Program,
    params: Params,
    state: DecodeState,
    tokens: jax.Array,
    *,
    watch: Callable[[Ops], Ops],
    width: int | None = None,
    cached: Cached | None = None,
    keep: bool = False,
) -> tuple[jax.Array, Any]:
    """Hidden states ``[S, B, D]`` that speak of the window, and with ``keep`` the keys and values of all that was fed.

    Args:
      program, params, state: as everywhere.
      tokens: ``[S, T]`` int32, the canvases.
      watch: see :func:`canvas_forward`.
      width: positions to feed of each, from its window on, or from further left where the canvas ends before; default: all.
      cached: keys and values of positions that are not made anew.
      keep: return ``(k, v)``, each ``[L, S, width, KV, H]``.
    """
    slots, total = tokens.shape
    width = width or total
    first = jnp.minimum(state.start, total - width)[:, None]
    row, positions = jnp.arange(slots)[:, None], first + jnp.arange(width, dtype=jnp.int32)
    kernels = program.kernels.for_layers(params["embed"].dtype)

    def attend(at: At, heads: jax.Array) -> tuple[jax.Array, Any]:
        q, *own = split_heads(heads)
        keys = own
        if cached is not None:
            to = jnp.where(cached.fresh[row, positions], positions, total)
            keys = [old[at.layer].at[row, to].set(new, mode="drop") for old, new in zip((cached.pool.k, cached.pool.v), own, strict=True)]
        out = canvas_attention(q, *keys, length=state.limit, backend=kernels.block_attention)
        return out, tuple(own) if keep else ()

    ops = machine_ops(kernels, attend, valid=(positions < state.limit[:, None]) & state.live[:, None])
    hidden, kept = program.model.layers(params, params["embed"][jnp.take_along_axis(tokens, positions, 1)], positions, watch(ops))
    window = state.positions.reshape(slots, -1) - first
    # A prompt has at least one token: there is a position before the window. Where it is not fed, nobody asks for the window's first.
    window = jnp.clip(window - (program.model.spec.predicts == "next"), 0, width - 1)
    return jnp.take_along_axis(hidden, window[..., None], 1), kept
