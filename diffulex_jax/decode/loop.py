"""The loop of denoise steps on the device: ``predict -> rule.update -> finish``, then the window advances."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.decode.denoise_step import step, step_beside_prompts
from diffulex_jax.decode.forward import pages_of
from diffulex_jax.decode.program import Program
from diffulex_jax.decode.prompts import Prompts
from diffulex_jax.decode.window import advance, seen, settled_positions, write_window
from diffulex_jax.models.base import Params
from diffulex_jax.state import DecodeState, KVPool, StepReport, Trace
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

    def body(carry: Carry, pending: int | None = None) -> Carry:
        i, pool, state, trace = carry
        before = advance(program.dims, program.rule, state)
        pool, after = step(program, params, pool, before, page_table=page_table, pending=pending)
        trace = jax.tree.map(lambda buffer, row: buffer.at[i].set(row), trace, seen(before, after))
        return i + 1, pool, after, trace

    # Where the host drives loops, steps in a loop of their kind ask it one thing each: whether to go on.
    apart = program.kernels.host_drives_loops and program.attention.paged and not program.dims.commit_alone
    few = program.few_pending(params["embed"].dtype) if apart else 0

    def alike(carry: Carry, pending: int) -> Carry:
        """Steps with so many pending blocks at the most, and too many for the next smaller forward, as long as they follow each other."""

        def same(carry: Carry) -> jax.Array:
            state = carry[2]
            count = (state.live & (state.pending.live | state.ready)).sum()
            some, many = anywhere(jnp.stack([count > 0, count > few]))
            return go_on(carry) & (many if pending > few else ~some if pending == 0 else some & ~many)

        return lax.while_loop(same, functools.partial(body, pending=pending), carry)

    def kinds(carry: Carry) -> Carry:
        for pending in (program.dims.slots, few, 0) if few else (program.dims.slots, 0):
            carry = alike(carry, pending)
        return carry

    rows = jax.eval_shape(seen, state, state)
    trace = jax.tree.map(lambda row: jnp.zeros((steps, *row.shape), row.dtype), rows)
    run = kinds if apart else body
    _, pool, state, trace = lax.while_loop(go_on, run, (jnp.int32(0), pool, state, trace))
    return pool, *_reported(program, state, known, steps), trace


def mixed_step(
    program: Program,
    params: Params,
    pool: KVPool,
    state: DecodeState,
    *,
    page_table: jax.Array,
    known: jax.Array,
    prompts: Prompts,
) -> tuple[KVPool, DecodeState, StepReport]:
    """Prefills prompts and makes the next denoise step of every row in one forward (a mixed batch: Sarathi-Serve, arXiv 2403.02310).

    A row may be that of a request whose prompt is among ``prompts``, and then denoises its first block.

    Args:
      program: the static part, which ``mixes``.
      params, prompts: model parameters, and what to write; see ``prompts.prefill``.
      pool, state: the KV pool and the decode state; donate them. Windows may be about to move on, where their rows have the pages for it.
      page_table, known: as for :func:`denoise`.
    """
    state = advance(program.dims, program.rule, state)
    pool, state = step_beside_prompts(program, params, pool, state, page_table=page_table, prompts=prompts)
    return pool, *_reported(program, state, known, 1)


def _reported(program: Program, state: DecodeState, known: jax.Array, steps: int) -> tuple[DecodeState, StepReport]:
    """The state after so many steps with its windows in the sequence, and the report."""
    state = state.replace(sequence=write_window(state))
    return state, report(state, known, (steps + program.dims.window) * program.dims.block)


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
