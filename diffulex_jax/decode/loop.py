"""The loop of denoise steps on the device: ``predict -> rule.update -> finish``, then the window advances."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.decode.forward import forward, pages_of, write
from diffulex_jax.decode.prediction import predict
from diffulex_jax.decode.program import Program
from diffulex_jax.decode.window import advance, count_step, finish, seen, settled_positions, write_window
from diffulex_jax.models.base import Params
from diffulex_jax.state import DecodeState, KVPool, Merge, Prediction, StepReport, Trace
from pallas_kernels import remask, token_merge
from pallas_kernels.block_attention import Keys
from pallas_kernels.target import anywhere


def denoise(
    program: Program,
    params: Params,
    pool: KVPool,
    state: DecodeState,
    *,
    page_table: jax.Array,
    known: jax.Array,
    steps: int,
    max_steps: jax.Array,
    stop_on_finish: jax.Array,
) -> tuple[KVPool, DecodeState, StepReport, Trace]:
    """Runs up to ``max_steps`` denoise steps on the device; ends early when no row runs, or one needs a page.

    Args:
      program: the static part.
      params: model parameters.
      pool: the KV pool; donate it.
      state: the decode state; donate it.
      page_table: ``[S, P]`` int32, the pages of each slot's positions; N (one past the pool) where none was given yet.
      known: ``[S]`` int32, position up to which the host knows each row's tokens; the report goes on from there.
      steps: static, the most steps there is room for in the trace and the report.
      max_steps: int32 scalar, at most ``steps``.
      stop_on_finish: bool scalar; True returns as soon as any row finishes, so that its slot can be used again.
    """
    live_before = state.live
    Carry = tuple[jax.Array, KVPool, DecodeState, Trace]

    def go_on(carry: Carry) -> jax.Array:
        i, pool, state, _ = carry
        finished = (live_before & ~state.live).any()
        none = (pages_of(program, page_table, state.start) >= pool.k.shape[1]).any(1)
        starved = (state.live & state.ready & none).any()
        going, halt = anywhere(jnp.stack([state.live.any(), starved | (stop_on_finish & finished)]))
        return (i < max_steps) & going & ~halt

    def body(carry: Carry, writes: bool | None = None) -> Carry:
        i, pool, state, trace = carry
        before = advance(program.dims, program.rule, state)
        pool, after = step(program, params, pool, before, page_table=page_table, writes=writes)
        trace = jax.tree.map(lambda buffer, row: buffer.at[i].set(row), trace, seen(before, after))
        return i + 1, pool, after, trace

    def alike(carry: Carry, writes: bool) -> Carry:
        """Steps that write the KV of pending blocks, or those that do not, as long as they follow each other."""

        def same(carry: Carry) -> jax.Array:
            state = carry[2]
            return go_on(carry) & (anywhere((state.live & (state.pending.live | state.ready)).any()) == writes)

        return lax.while_loop(same, functools.partial(body, writes=writes), carry)

    rows = jax.eval_shape(seen, state, state)
    trace = jax.tree.map(lambda row: jnp.zeros((steps, *row.shape), row.dtype), rows)
    # Where the host drives loops, steps in a loop of their kind ask it one thing each: whether to go on.
    run = (lambda carry: alike(alike(carry, True), False)) if program.kernels.host_drives_loops else body
    _, pool, state, trace = lax.while_loop(go_on, run, (jnp.int32(0), pool, state, trace))
    state = state.replace(sequence=write_window(state))
    return pool, state, report(state, known, (steps + program.dims.window) * program.dims.block), trace


def step(
    program: Program,
    params: Params,
    pool: KVPool,
    state: DecodeState,
    *,
    page_table: jax.Array,
    writes: bool | None = None,
) -> tuple[KVPool, DecodeState]:
    """One forward, and what the rules and the finish test make of it. The window has not moved on yet.

    ``writes`` says, where it is known when the program is traced, whether some row has a pending block.
    """
    hidden, pool, state = _forward(program, params, pool, state, page_table=page_table, writes=writes)
    with jax.named_scope("prediction"):
        prediction = predict(program, params, hidden, state)
    with jax.named_scope("rules"):
        before = state
        state = state.replace(steps=state.steps + state.active, hold=jnp.zeros_like(state.hold))
        with remask.decided_by(program.kernels.remask):
            state, rule_state = program.rule.update(prediction, state, state.rule)
        state = _end_overdue_blocks(program, prediction, state.replace(rule=rule_state))
        # Rules say what is masked; that masked positions read as the mask id is kept here, for every rule.
        state = state.replace(tokens=jnp.where(state.masked, program.dims.mask_id, state.tokens))
        # A row whose prediction is not a number has nothing to go on with; the others never see it.
        broken = (~jnp.isfinite(prediction.prob) & before.editable).any((1, 2))
        return pool, finish(count_step(before, state), broken)


def _forward(
    program: Program, params: Params, pool: KVPool, state: DecodeState, *, page_table: jax.Array, writes: bool | None
) -> tuple[jax.Array, KVPool, DecodeState]:
    """Hidden states ``[S, K B, D]`` of the window; the same forward writes the KV of the pending block where there is one.

    It is wider (pending block and window) only in steps where some row has a pending block.
    """
    slots, window, block = state.tokens.shape

    def embed(tokens: jax.Array, merge: Merge) -> jax.Array:
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

    live, active = state.pending.live & state.live, state.active & state.live[:, None]
    x = embed(state.tokens, state.merge).reshape(slots, window * block, -1)
    positions = state.positions.reshape(slots, -1)

    def with_pending(pool: KVPool) -> tuple[jax.Array, KVPool]:
        keys = Keys(pool.k, pool.v, page_table, state.written_upto, active)
        both = jnp.concatenate([embed(state.pending.tokens, state.pending.merge), x], 1)
        at = jnp.concatenate([positions[:, :1] - block + jnp.arange(block), positions], 1)
        hidden, (k, v) = forward(program, params, both, at, keys=keys, pending=live, keep=True)
        pool = write(program, pool, k, v, page_table=page_table, start=state.start - block, where=live)
        return hidden[:, block:], pool

    def window_only(pool: KVPool) -> tuple[jax.Array, KVPool]:
        keys = Keys(pool.k, pool.v, page_table, state.written_upto, active)
        return forward(program, params, x, positions, keys=keys)[0], pool

    if writes is None:
        hidden, pool = lax.cond(anywhere(live.any()), with_pending, window_only, pool)
    else:
        hidden, pool = (with_pending if writes else window_only)(pool)
    written = jnp.where(live, state.start, state.written_upto)
    return hidden, pool, state.replace(written_upto=written, pending=state.pending.replace(live=jnp.zeros_like(live)))


def _end_overdue_blocks(program: Program, prediction: Prediction, state: DecodeState) -> DecodeState:
    """Fills the masks of blocks that spent their budget, and lets go of them: no rule can keep a block open for ever."""
    budget = program.block_budget + state.settings.max_post_edit_steps
    over = state.active & (state.steps >= budget[:, None])
    state = state.fill(state.masked & over[..., None], prediction.token, prediction.prob)
    return state.replace(hold=state.hold & ~over, merge=state.merge.replace(soft=state.merge.soft & ~over[..., None]))


def report(state: DecodeState, known: jax.Array, count: int) -> StepReport:
    """The few numbers the host reads, and the ``count`` tokens of each row from position ``known`` ``[S]`` on."""
    position, _, settled = settled_positions(state)
    upto = jnp.where(settled | (position < state.prompt_len[:, None]), position[:, -1:] + 1, position).min(1)
    return StepReport(
        status=state.status,
        nfe=state.nfe,
        revised=state.revised,
        remasked=state.remasked,
        written_upto=state.written_upto,
        start=state.start,
        settled_upto=jnp.minimum(upto, state.limit),
        length=state.length,
        tokens=jnp.take_along_axis(state.sequence.tokens, known[:, None] + jnp.arange(count), 1, mode="clip"),
    )
