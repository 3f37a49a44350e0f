"""What several rules need: a block's progress and quota, when look-ahead blocks start and may be forced on, and random draws."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffulex_jax.state import DecodeState


_APART = 0x5EED  # keeps draws of an order apart from those of tokens, which have the same key


def progress(state: DecodeState) -> jax.Array:
    """``[S, K]`` float32: filled share of each block, prompt positions included."""
    return 1.0 - state.masked.mean(-1, dtype=jnp.float32)


def may_force(state: DecodeState) -> jax.Array:
    """``[S, K]`` bool: blocks that fill their best mask even when none is sure.

    These are the first block, and those whose predecessor is semi-complete (MBD-LMs, Algorithm 5): forcing a token that
    far ahead of an unfinished block would be a guess about a guess.
    """
    before = progress(state)[:, :-1] >= state.settings.semi_complete_threshold[:, None]
    return jnp.concatenate([jnp.ones_like(state.active[:, :1]), before], 1)


def quota(state: DecodeState) -> jax.Array:
    """``[S, K]`` int32: masks that each block fills at the least in this step; 0 where :func:`may_force` says no.

    Where ``denoising_steps`` is S, a block of B tokens is shared out over S steps: step i, counted from 0, fills floor(B / S),
    and one more while i < B mod S (SDAR's schedule; no step is left without a mask, as S <= B). A block that has masks after
    S steps goes on with floor(B / S). Where it is 0, every step fills ``num_to_transfer``.
    """
    block, s = state.tokens.shape[-1], state.settings
    of = jnp.maximum(s.denoising_steps, 1)[:, None]
    share = block // of + (state.steps - 1 < block % of)  # the step that runs is counted already
    least = jnp.where(s.denoising_steps[:, None] > 0, share, s.num_to_transfer[:, None])
    return jnp.where(may_force(state), least, 0)


def stability(state: DecodeState, changed: jax.Array) -> jax.Array:
    """``[S, K]`` bool: enough of each block's filled tokens kept their value; ``changed`` ``[S, K, B]``: those that did not."""
    filled = jnp.maximum((state.editable & ~state.masked).sum(-1), 1)
    return 1.0 - changed.sum(-1) / filled >= state.settings.token_stability_threshold[:, None]


def activate(state: DecodeState) -> DecodeState:
    """Starts the next look-ahead block of rows whose last active block has come far enough and is stable.

    The first block of a window is always active. No block starts at or past a row's limit.
    """
    ready = state.active & state.stable & (progress(state) >= state.settings.add_block_threshold[:, None])
    follows = jnp.concatenate([jnp.ones_like(ready[:, :1]), ready[:, :-1]], 1)
    inside = state.positions[..., 0] < state.limit[:, None]
    return state.replace(active=state.active | (follows & inside & state.live[:, None]))


def draws(state: DecodeState, sample: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """``[S, K, B]`` float32: ``sample(key)`` for each position and forward, from the request's key (``jax.random.uniform``)."""

    def one(key: jax.Array, position: jax.Array, nfe: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(key)
        for number in (_APART, position, nfe):
            key = jax.random.fold_in(key, number)
        return sample(key)

    of_row = jax.vmap(one, (None, 0, None))
    return jax.vmap(of_row)(state.key, state.positions.reshape(len(state.key), -1), state.nfe).reshape(state.positions.shape)
