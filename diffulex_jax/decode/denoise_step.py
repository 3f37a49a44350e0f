"""One denoise step: a forward, and what the rules and the finish test make of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.decode.canvas import canvas_forward
from diffulex_jax.decode.prediction import predict
from diffulex_jax.decode.program import Program
from diffulex_jax.decode.prompts import Prompts
from diffulex_jax.decode.sub_block import current_sub_block, forward_sub_block
from diffulex_jax.decode.window import choose_rows, count_step, finish
from diffulex_jax.decode.window_forward import forward_beside_prompts, forward_pending_or_window, window_forward
from diffulex_jax.models.base import Params
from diffulex_jax.state import DecodeState, KVPool, Prediction
from pallas_kernels import remask
from pallas_kernels.target import anywhere


def step(
    program: Program,
    params: Params,
    pool: KVPool,
    state: DecodeState,
    *,
    page_table: jax.Array,
    pending: int | None = None,
) -> tuple[KVPool, DecodeState]:
    """One forward, and what the rules and the finish test make of it. The window has not moved on yet.

    ``pending`` says, where it is known when the program is traced, how many rows have a pending block, at the most: none, all, or the
    ``Program.few_pending``.
    """
    if program.dims.sub_block_cache:
        return _step_of_a_kind(program, params, pool, state, page_table=page_table)
    commits = state.pending.live & state.live
    if program.attention.paged:
        hidden, pool, state = window_forward(program, params, pool, state, page_table=page_table, count=pending)
    else:
        hidden, pool = canvas_forward(program, params, pool, state)
        state = state.replace(pending=state.pending.replace(live=jnp.zeros_like(commits)))
    # Where a commit is alone, no output of this forward speaks of the window's first position, which was decided before.
    fixed = _first(state) if program.dims.commit_alone else jnp.zeros_like(state.frozen)
    return pool, _decide(program, params, hidden, state, commits=commits, fixed=fixed)


def step_beside_prompts(
    program: Program, params: Params, pool: KVPool, state: DecodeState, *, page_table: jax.Array, prompts: Prompts
) -> tuple[KVPool, DecodeState]:
    """As :func:`step`, with prompts in the same forward; see ``loop.mixed_step``."""
    commits = state.pending.live & state.live
    hidden, pool, state = forward_beside_prompts(program, params, pool, state, page_table=page_table, prompts=prompts)
    return pool, _decide(program, params, hidden, state, commits=commits, fixed=jnp.zeros_like(state.frozen))


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
        hidden, pool, after = forward_pending_or_window(program, params, pool, acting, page_table=page_table)
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


def _end_overdue_blocks(program: Program, prediction: Prediction, state: DecodeState) -> DecodeState:
    """Fills the masks of blocks that spent their budget, and lets go of them: no rule can keep a block open for ever."""
    budget = program.block_budget + state.settings.max_post_edit_steps
    over = state.active & (state.steps >= budget[:, None])
    state = state.fill(state.masked & over[..., None], prediction.token, prediction.prob)
    return state.replace(hold=state.hold & ~over, merge=state.merge.replace(soft=state.merge.soft & ~over[..., None]))
