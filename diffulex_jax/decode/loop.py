"""The loop of denoise steps on the device: ``predict -> rule.update -> finish``, then the window advances."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.decode.canvas import canvas_forward
from diffulex_jax.decode.forward import forward, pages_of, write
from diffulex_jax.decode.prediction import predict
from diffulex_jax.decode.program import Program
from diffulex_jax.decode.sub_block import current_sub_block, forward_sub_block
from diffulex_jax.decode.window import advance, choose_rows, count_step, finish, seen, settled_positions, write_window
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
        starved = jnp.bool_(False)
        if program.attention.paged:
            # Old keys and values of a window lie in its pages, which it must have before it moves there.
            last = state.start + program.dims.block if program.dims.sub_block_cache else state.start
            none = (pages_of(program, page_table, last) >= pool.k.shape[1]).any(1)
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
    kinds = program.kernels.host_drives_loops and program.attention.paged and not program.dims.commit_alone
    run = (lambda carry: alike(alike(carry, True), False)) if kinds else body
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
    if program.dims.sub_block_cache:
        return _step_of_a_kind(program, params, pool, state, page_table=page_table)
    commits = state.pending.live & state.live
    if program.attention.paged:
        hidden, pool, state = _forward(program, params, pool, state, page_table=page_table, writes=writes)
    else:
        hidden, pool = canvas_forward(program, params, pool, state)
        state = state.replace(pending=state.pending.replace(live=jnp.zeros_like(commits)))
    # Where a commit is alone, no output of this forward speaks of the window's first position, which was decided before.
    fixed = _first(state) if program.dims.commit_alone else jnp.zeros_like(state.frozen)
    return pool, _decide(program, params, hidden, state, commits=commits, fixed=fixed)


def _step_of_a_kind(
    program: Program, params: Params, pool: KVPool, state: DecodeState, *, page_table: jax.Array
) -> tuple[KVPool, DecodeState]:
    """As :func:`step`, where ``dims.sub_block_cache``: a row commits or feeds its whole window, or it feeds one sub-block.

    As long as a row needs the former, those that need the latter wait: what a row does never depends on the others.
    """
    commits = state.pending.live & state.live
    low, renew = current_sub_block(program, state)
    wide = anywhere((state.live & (commits | renew)).any())
    acts = state.live & ((commits | renew) == wide)
    acting = state.replace(live=acts)

    def feed_window(pool: KVPool) -> tuple[KVPool, DecodeState]:
        hidden, pool, after = _forward_pending_or_window(program, params, pool, acting, page_table=page_table)
        return pool, _decide(program, params, hidden, after, commits=commits, fixed=_first(state))

    def feed_sub_block(pool: KVPool) -> tuple[KVPool, DecodeState]:
        hidden, pool = forward_sub_block(program, params, pool, acting, low, page_table=page_table)
        at = jnp.arange(program.dims.block) - low[:, None, None]
        fixed = (at <= 0) | (at >= program.dims.sub_block_cache)
        return pool, _decide(program, params, hidden, acting, commits=jnp.zeros_like(commits), fixed=fixed)

    pool, after = lax.cond(wide, feed_window, feed_sub_block, pool)
    return pool, choose_rows(acts, after, state)


def _decide(
    program: Program, params: Params, hidden: jax.Array, state: DecodeState, *, commits: jax.Array, fixed: jax.Array
) -> DecodeState:
    """What the rules and the finish test make of a forward.

    Args:
      program, params: the static part, and model parameters.
      hidden: ``[S, K B, D]`` hidden states that speak of the window.
      state: as the forward left it.
      commits: ``[S]`` bool, rows that wrote a pending block; what it means where they do so alone, see :func:`_decide_first`.
      fixed: ``[S, K, B]`` bool, positions that no rule may write in this step, because ``hidden`` does not speak of them.
    """
    with jax.named_scope("prediction"):
        greedy = commits & (program.dims.commit_alone and program.attention.paged)
        prediction = predict(program, params, hidden, _without_draws(state, greedy))
    with jax.named_scope("rules"):
        before = state
        state = _apply_rule(program, prediction, before, fixed)
        if program.dims.commit_alone:
            state = choose_rows(commits, _decide_first(prediction, before), state)
        # Rules say what is masked; that masked positions read as the mask id is kept here, for every rule.
        state = state.replace(tokens=jnp.where(state.masked, program.dims.mask_id, state.tokens))
        # A row whose prediction is not a number has nothing to go on with; the others never see it.
        broken = (~jnp.isfinite(prediction.prob) & before.editable).any((1, 2))
        return finish(count_step(before, state), broken)


def _apply_rule(program: Program, prediction: Prediction, state: DecodeState, fixed: jax.Array) -> DecodeState:
    """What the rule makes of a prediction, and the end of blocks that took too long. Nothing that is ``fixed`` changes."""
    given = state.frozen
    state = state.replace(frozen=given | fixed)
    state = state.replace(steps=state.steps + state.active, hold=jnp.zeros_like(state.hold))
    with remask.decided_by(program.kernels.remask):
        state, rule_state = program.rule.update(prediction, state, state.rule)
    return _end_overdue_blocks(program, prediction, state.replace(rule=rule_state)).replace(frozen=given)


def _decide_first(prediction: Prediction, state: DecodeState) -> DecodeState:
    """For a row that commits alone: the first token of its window, unless it is known. No rule has a say, or sees this step.

    Nothing changes that token from here on. A block that begins with other tokens that a rule may change is held open for it.
    """
    first = _first(state)
    unseen = (state.steps == 0) & (state.editable & ~state.masked & ~first).any(-1)
    return state.fill(first & state.masked, prediction.token, prediction.prob).replace(hold=state.hold | unseen)


def _without_draws(state: DecodeState, rows: jax.Array) -> DecodeState:
    """``state`` with greedy ``rows``: the first token of a block is the most probable one at any temperature."""
    return state.replace(settings=state.settings.replace(temperature=jnp.where(rows, 0, state.settings.temperature)))


def _first(state: DecodeState) -> jax.Array:
    """``[S, K, B]`` bool: the first position of the window."""
    return jnp.zeros(state.masked.shape, bool).at[:, 0, 0].set(True)


def _forward(
    program: Program, params: Params, pool: KVPool, state: DecodeState, *, page_table: jax.Array, writes: bool | None
) -> tuple[jax.Array, KVPool, DecodeState]:
    """Hidden states ``[S, K B, D]`` that speak of the window; the same forward writes the KV of the pending block where there is one."""
    if program.dims.commit_alone:
        return _forward_pending_or_window(program, params, pool, state, page_table=page_table)
    return _forward_pending_and_window(program, params, pool, state, page_table=page_table, writes=writes)


def _forward_pending_and_window(
    program: Program, params: Params, pool: KVPool, state: DecodeState, *, page_table: jax.Array, writes: bool | None
) -> tuple[jax.Array, KVPool, DecodeState]:
    """As :func:`_forward`. Only in steps where some row has a pending block does it go through the network: with the window, or, where
    ``kernels.pending_apart``, ahead of it.

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
        if writes is None:
            return lax.cond(anywhere(live.any()), then, otherwise, pool)
        return (then if writes else otherwise)(pool)

    if program.kernels.pending_apart:
        hidden, carried, pool = window_only(*either(pending_only, lambda pool: (state.carried, pool)))
    else:
        hidden, carried, pool = either(together, functools.partial(window_only, state.carried))
    if program.dims.carried:
        hidden = jnp.concatenate([carried[:, None].astype(hidden.dtype), hidden[:, :-1]], 1)
    return hidden, pool, after.replace(carried=carried)


def _forward_pending_or_window(
    program: Program, params: Params, pool: KVPool, state: DecodeState, *, page_table: jax.Array
) -> tuple[jax.Array, KVPool, DecodeState]:
    """As :func:`_forward`, where ``dims.commit_alone``: a row with a pending block feeds that in place of its window.

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
