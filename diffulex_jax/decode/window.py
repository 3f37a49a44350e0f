"""The window between two forwards: what a step did to it, which rows are done, and how it moves on. All pure."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffulex_jax.request_state import given_blocks
from diffulex_jax.rules.base import Rule
from diffulex_jax.rules.blocks import activate, stability
from diffulex_jax.state import ERROR, LENGTH, MAX_NFE, RUNNING, STOP, Canvas, DecodeState, Dims, Pending, Trace


WARM_UP_BLOCKS = 4  # the pace of a row is not judged before as many forwards as these blocks have tokens


def count_step(before: DecodeState, after: DecodeState) -> DecodeState:
    """Counts the forward, and what the rules did to tokens that were filled before it."""
    did = seen(before, after)
    revised, remasked = (a.sum((1, 2), dtype=jnp.int32) * after.live for a in (did.revised, did.remasked))
    nfe = after.nfe + after.live
    now = nfe[:, None, None]
    accepted = before.editable & before.masked & ~after.masked
    return after.replace(
        nfe=nfe,
        revised=after.revised + revised,
        remasked=after.remasked + remasked,
        first_step=jnp.where(accepted & (after.first_step == 0), now, after.first_step),
        last_step=jnp.where(accepted | did.revised, now, after.last_step),
        stable=stability(after, did.revised | did.remasked),
    )


def seen(before: DecodeState, after: DecodeState) -> Trace:
    """What one step did to the window."""
    filled = before.editable & ~before.masked
    return Trace(
        start=after.start,
        live=before.live & (after.nfe > before.nfe),
        tokens=after.tokens,
        masked=after.masked,
        confidence=after.confidence,
        revised=filled & ~after.masked & (after.tokens != before.tokens),
        remasked=filled & after.masked,
    )


def settled_positions(state: DecodeState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``[S, K B]`` each: absolute positions of the window, which are undecoded, and which can no longer change."""
    slots, _, block = state.tokens.shape
    masked = (state.masked | ~(state.active[..., None] & state.inside)).reshape(slots, -1)
    return state.positions.reshape(slots, -1), masked, ~masked & jnp.repeat(~state.hold, block, 1)


def finish(state: DecodeState, broken: jax.Array) -> DecodeState:
    """Ends rows whose output can no longer change, whose NFE is spent, or which are too slow; marks settled first blocks as ready to move.

    A row ends at a stop token with everything before it settled, or with all its tokens settled; or because it is ``broken``
    (``[S]`` bool), and then with what was settled before this window.
    """
    position, masked, settled = settled_positions(state)
    generated = position >= state.prompt_len[:, None]
    wanted = generated & (position < state.limit[:, None])
    tokens = state.tokens.reshape(position.shape)
    given = state.frozen.reshape(position.shape)
    stops = (tokens[..., None] == state.settings.stop_ids[:, None]).any(-1) & wanted & ~masked & ~given
    end = state.start + position.shape[1]

    def first(where: jax.Array) -> jax.Array:
        return jnp.where(where, position, jnp.minimum(end, state.limit)[:, None]).min(1)

    first_open, first_stop = first(wanted & ~settled), first(stops)
    stop = stops.any(1) & (first_stop < first_open)
    length = first_open >= state.limit
    filled = jnp.maximum(state.start - state.prompt_len, 0) + (wanted & ~masked).sum(1)
    slow = filled < state.settings.min_tokens_per_forward * state.nfe
    spent = (state.nfe >= state.settings.max_nfe) | (slow & (state.nfe >= WARM_UP_BLOCKS * state.tokens.shape[-1]))
    status = jnp.select([broken, stop, length, spent], [ERROR, STOP, LENGTH, MAX_NFE], RUNNING)
    # A row cut off by its NFE budget or its pace returns the contiguous filled prefix, itself cut before a stop token.
    cut = jnp.minimum(first(wanted & masked), first_stop)
    upto = jnp.select([broken, stop, length], [jnp.clip(state.start, state.prompt_len, state.limit), first_stop, state.limit], cut)
    return state.replace(
        status=jnp.where(state.live, status, state.status).astype(jnp.int32),
        length=jnp.where(state.live, upto, state.length).astype(jnp.int32),
        live=state.live & (status == RUNNING),
        ready=state.active[:, 0] & ~(state.masked & state.inside)[:, 0].any(-1) & ~state.hold[:, 0],
    )


def advance(dims: Dims, rule: Rule, state: DecodeState) -> DecodeState:
    """Moves rows whose first block is ready one block on, and starts look-ahead blocks.

    The block that leaves becomes pending; a new one enters at the window's end. On a whole canvas it becomes pending only where
    ``dims.commit_alone``, and the next block begins where this one ended.
    """
    go, commits = state.live & state.ready, dims.commit_alone or not dims.whole_canvas
    length = state.settings.block_length
    start = state.start + (jnp.where(length > 0, length, dims.block) if dims.whole_canvas else dims.block)
    tokens, masked, frozen = given_blocks(dims, state, start + (dims.window - 1) * dims.block, 1)

    def rolled(array: jax.Array, last: Any) -> jax.Array:
        return jnp.concatenate([array[:, 1:], jnp.broadcast_to(last, array[:, :1].shape).astype(array.dtype)], 1)

    fresh = rule.init(dims)
    shifted = state.replace(
        tokens=rolled(state.tokens, tokens),
        masked=rolled(state.masked, masked),
        frozen=rolled(state.frozen, frozen),
        confidence=rolled(state.confidence, 0.0),
        first_step=rolled(state.first_step, 0),
        last_step=rolled(state.last_step, 0),
        active=rolled(state.active, False),
        hold=rolled(state.hold, False),
        stable=rolled(state.stable, True),
        ready=jnp.zeros_like(state.ready),
        steps=rolled(state.steps, 0),
        merge=jax.tree.map(lambda a: rolled(a, 0), state.merge),
        rule=jax.tree.map(lambda a, f: rolled(a, f[:, :1]) if f.ndim > 1 else a, state.rule, fresh),
        pending=Pending(state.tokens[:, 0], jax.tree.map(lambda a: a[:, 0], state.merge), state.active[:, 0] & commits),
        start=start,
    )
    return activate(choose_rows(go, shifted, state).replace(sequence=write_window(state, go)))


def choose_rows(rows: jax.Array, new: DecodeState, old: DecodeState) -> DecodeState:
    """``new`` in ``rows`` (``[S]`` bool), ``old`` in the others."""
    return jax.tree.map(lambda n, o: jnp.where(rows.reshape(-1, *[1] * (o.ndim - 1)), n, o), new, old)


def write_window(state: DecodeState, rows: jax.Array | None = None) -> Canvas:
    """``sequence`` with what the window knows at its positions; of ``rows`` ``[S]`` alone where given."""
    slots = state.tokens.shape[0]
    row, at = jnp.arange(slots)[:, None], state.positions.reshape(slots, -1)
    if rows is not None:
        at = jnp.where(rows[:, None], at, state.sequence.tokens.shape[1])
    return jax.tree.map(lambda s, w: s.at[row, at].set(w.reshape(slots, -1), mode="drop"), state.sequence, state.window)
