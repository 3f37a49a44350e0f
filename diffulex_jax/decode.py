"""The decode step and the loop around it: pure functions of parameters, pool and state.

``predict -> rule.update -> finish`` is one denoise step, then the window advances; ``denoise`` runs many on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.config import ModelConfig
from diffulex_jax.models import llada2
from diffulex_jax.parallel.mesh import first_index, shared_by
from diffulex_jax.rules.base import Rule
from diffulex_jax.state import DecodeState, Dims, KVPool, Merge, Prediction, StepReport, Trace
from diffulex_jax.window import advance, count_step, finish, seen, settled_positions, write_window
from pallas_kernels import Kernels, block_attention, grouped_matmul, prediction, token_merge
from pallas_kernels.target import anywhere


class Program(NamedTuple):
    """Everything static about a decode step.

    Attributes:
      config, dims, rule, kernels: the network, the state's sizes, what is made of a prediction, and by which backends.
      attention: what a prompt sees of itself while it is prefilled: its blocks before and its own (``"block_causal"``), or all of it
        (``"prefix_full"``, D2F). Generated blocks see the cached prefix and the window's blocks up to their own under both.
      draws, confidence: see ``strategies.Strategy``.
      greedy: whoever launches this knows that no row samples. A GPU then has one question less to ask the host at every step.
    """

    config: ModelConfig
    dims: Dims
    rule: Rule
    kernels: Kernels
    attention: str = "block_causal"
    draws: str = "position"
    confidence: str = "model"
    greedy: bool = False

    @property
    def block_budget(self) -> int:
        """Forwards after which a block is filled by force, whatever the rules say: every block ends."""
        return 4 * self.dims.block


def denoise(
    program: Program,
    params: llada2.Params,
    pool: KVPool,
    state: DecodeState,
    page_table: jax.Array,
    known: jax.Array,
    *,
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
      page_table: ``[S, P]`` int32, page of each block of each slot; N (one past the pool) where none was given yet.
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
        starved = (state.live & state.ready & (_page_of(state.start, page_table, state) >= pool.k.shape[1])).any()
        going, halt = anywhere(jnp.stack([state.live.any(), starved | (stop_on_finish & finished)]))
        return (i < max_steps) & going & ~halt

    def body(carry: Carry, writes: bool | None = None) -> Carry:
        i, pool, state, trace = carry
        before = advance(program.dims, program.rule, program.config.mask_token_id, state)
        pool, after = step(program, params, pool, before, page_table, writes)
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
    # For every branch a GPU waits for the host. Steps in a loop of their kind ask it one thing each: whether to go on.
    apart = program.kernels.host_drives_loops
    run = (lambda carry: alike(alike(carry, True), False)) if apart else body
    _, pool, state, trace = lax.while_loop(go_on, run, (jnp.int32(0), pool, state, trace))
    state = state.replace(sequence=write_window(state))
    return pool, state, report(state, known, (steps + program.dims.window) * program.dims.block), trace


def _page_of(position: jax.Array, page_table: jax.Array, state: DecodeState) -> jax.Array:
    """``[S]`` int32: the page of each row's block at ``position`` ``[S]``."""
    return jnp.take_along_axis(page_table, jnp.maximum(position // state.tokens.shape[-1], 0)[:, None], 1)[:, 0]


def prefill(
    program: Program,
    params: llada2.Params,
    pool: KVPool,
    tokens: jax.Array,
    count: jax.Array,
    start: jax.Array,
    length: jax.Array,
    page_table: jax.Array,
) -> KVPool:
    """Writes the KV of whole prompt blocks of one request.

    Args:
      program: the static part. Where its attention is ``"prefix_full"`` the whole prompt must be given at once.
      params: model parameters.
      pool: the KV pool; donate it.
      tokens: ``[C, B]`` int32, C the chunk's compiled size.
      count: int32 scalar, how many of the C blocks are whole prompt blocks to be written.
      start: int32 scalar, absolute position of the chunk; everything before it is in the pool.
      length: int32 scalar, tokens of the prompt.
      page_table: ``[P]`` int32, the request's pages.
    """
    blocks, block = tokens.shape
    written = jnp.arange(blocks) < count
    positions = start + jnp.arange(blocks * block, dtype=jnp.int32)
    full = program.attention == "prefix_full"
    visible = (positions < length)[None] if full else None
    lanes = start + jnp.arange(blocks) * block < length if full else written
    keys = block_attention.Keys(pool.k, pool.v, page_table[None], start[None], lanes[None])

    def attend(layer: jax.Array, heads: jax.Array) -> tuple[jax.Array, Any]:
        out = _attention(program)(heads, keys, layer=layer, visible=visible)
        return out, tuple(a[0].reshape(blocks, block, *a.shape[2:]) for a in block_attention.split_heads(heads)[1:])

    x = llada2.embed(params, tokens.reshape(1, -1))
    _, (k, v) = _hidden(program, params)(x, positions[None], attend, valid=jnp.repeat(lanes, block)[None])
    pages = jnp.where(written, lax.dynamic_slice_in_dim(jnp.pad(page_table, (0, blocks)), start // block, blocks), pool.k.shape[1])
    return _write(program, pool, k, v, pages)


def _attention(program: Program) -> Callable[..., jax.Array]:
    return functools.partial(block_attention.block_attention, block=program.dims.block, backend=program.kernels.block_attention)


def _hidden(program: Program, params: llada2.Params) -> Callable[..., tuple[jax.Array, Any]]:
    experts = functools.partial(grouped_matmul.expert_mlp, backend=program.kernels.grouped_matmul)
    if shared_by("expert") and "moe" in params:
        experts = functools.partial(experts, first_expert=first_index("expert", params["moe"]["experts_down"].shape[1]))
    kernels = program.kernels.for_layers(params["embed"].dtype, shared=any(map(shared_by, ("expert", "mlp", "kv_heads"))))
    return functools.partial(llada2.hidden, params, program.config, experts=experts, streamed=not kernels.rows_apart)


def _write(program: Program, pool: KVPool, k: jax.Array, v: jax.Array, pages: jax.Array) -> KVPool:
    write = functools.partial(block_attention.write_blocks, backend=program.kernels.block_attention)
    offsets = jnp.zeros_like(pages)  # a page is a block
    return KVPool(write(pool.k, k, pages, offsets), write(pool.v, v, pages, offsets))


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


def step(
    program: Program, params: llada2.Params, pool: KVPool, state: DecodeState, page_table: jax.Array, writes: bool | None = None
) -> tuple[KVPool, DecodeState]:
    """One forward, and what the rules and the finish test make of it. The window has not moved on yet. ``writes``: see :func:`predict`."""
    prediction, pool, state = predict(program, params, pool, state, page_table, writes)
    with jax.named_scope("rules"):
        before = state
        state = state.replace(steps=state.steps + state.active, hold=jnp.zeros_like(state.hold))
        state, rule_state = program.rule.update(prediction, state, state.rule)
        state = _end_overdue_blocks(program, prediction, state.replace(rule=rule_state))
        # Rules say what is masked; that masked positions read as the mask id is kept here, for every rule.
        state = state.replace(tokens=jnp.where(state.masked, program.config.mask_token_id, state.tokens))
        # A row whose prediction is not a number has nothing to go on with; the others never see it.
        broken = (~jnp.isfinite(prediction.prob) & before.editable).any((1, 2))
        return pool, finish(count_step(before, state), broken)


def predict(
    program: Program, params: llada2.Params, pool: KVPool, state: DecodeState, page_table: jax.Array, writes: bool | None = None
) -> tuple[Prediction, KVPool, DecodeState]:
    """One forward over the window, which also writes the KV of the pending block where there is one.

    The forward is wider (pending block and window) only in steps where some row has a pending block. What it says about the
    window does not depend on that, to the bit: see ``llada2.hidden`` and ``block_attention``. ``writes`` says, where it is known
    when the program is traced, whether some row has one.
    """
    config = program.config
    slots, window, block = state.tokens.shape
    width = window * block

    def embed(tokens: jax.Array, merge: Merge) -> jax.Array:
        if program.rule.merge is None:
            return llada2.embed(params, tokens)
        return token_merge.merge(
            params["embed"],
            tokens,
            config.mask_token_id,
            merge.ids,
            merge.probs,
            merge.soft,
            spec=program.rule.merge,
            backend=program.kernels.token_merge,
        )

    live, active = state.pending.live & state.live, state.active & state.live[:, None]
    x = embed(state.tokens, state.merge).reshape(slots, width, -1)
    positions = state.positions.reshape(slots, width)
    valid = jnp.repeat(active, block, 1)
    hidden = _hidden(program, params)
    attention, keys = _attention(program), block_attention.Keys(pool.k, pool.v, page_table, state.written_upto, active)

    def with_pending(pool: KVPool) -> tuple[jax.Array, KVPool]:
        def attend(layer: jax.Array, heads: jax.Array, before: jax.Array | None = None) -> tuple[jax.Array, Any]:
            lanes, pending = (live[:, None], None) if before is None else (active, (before, live))
            out = attention(heads, keys._replace(lanes=lanes), layer=layer, pending=pending)
            return out, block_attention.split_heads(heads)[1:]

        both = jnp.concatenate([embed(state.pending.tokens, state.pending.merge), x], 1)
        at = jnp.concatenate([positions[:, :1] - block + jnp.arange(block), positions], 1)
        mask = jnp.concatenate([jnp.repeat(live[:, None], block, 1), valid], 1)
        h, (k, v) = hidden(both, at, attend, leading=block, valid=mask)
        pages = jnp.where(live, _page_of(state.start - block, page_table, state), pool.k.shape[1])
        return h[:, block:], _write(program, pool, k, v, pages)

    def window_only(pool: KVPool) -> tuple[jax.Array, KVPool]:
        def attend(layer: jax.Array, heads: jax.Array) -> tuple[jax.Array, Any]:
            return attention(heads, keys, layer=layer), ()

        return hidden(x, positions, attend, valid=valid)[0], pool

    if writes is None:
        h, pool = lax.cond(anywhere(live.any()), with_pending, window_only, pool)
    else:
        h, pool = (with_pending if writes else window_only)(pool)
    state = state.replace(
        written_upto=jnp.where(live, state.start, state.written_upto),
        pending=state.pending.replace(live=jnp.zeros_like(live)),
    )
    with jax.named_scope("prediction"):
        return _reduce(program, params, h, state), pool, state


def _reduce(program: Program, params: llada2.Params, h: jax.Array, state: DecodeState) -> Prediction:
    shape, s = state.tokens.shape, state.settings
    per_position = shape[1] * shape[2]

    def rows(a: jax.Array) -> jax.Array:
        return jnp.repeat(a, per_position)

    # A draw belongs to a position, and unless the strategy says so not to a step: while the distribution stays, so does the sample, and
    # edit rules settle. After a re-mask the request draws anew; the same noise would choose the doubted token again.
    def sampling() -> prediction.Sampling:
        keys = jax.random.wrap_key_data(jnp.repeat(state.key, per_position, 0))
        draws = jax.vmap(jax.random.fold_in)(keys, state.positions.reshape(-1))
        draws = jax.vmap(jax.random.fold_in)(draws, rows(state.nfe if program.draws == "step" else state.remasked))
        return prediction.Sampling(draws, rows(jnp.where(state.live, s.temperature, 0)), rows(s.top_p), rows(s.top_k))

    early = (state.positions - state.prompt_len[:, None, None] < s.min_tokens[:, None, None]).reshape(-1)
    left = jnp.concatenate([jnp.full_like(state.tokens[..., :1], -1), state.tokens[..., :-1]], -1)
    best = prediction.predict_from_hidden(
        h.reshape(-1, h.shape[-1]),
        params["lm_head"],
        state.tokens.reshape(-1),
        forbidden_id=program.config.mask_token_id,
        sampling=None if program.greedy else sampling(),
        penalized=left.reshape(-1),
        penalty=rows(s.penalty_lambda),
        banned=jnp.where(early[:, None], jnp.repeat(s.stop_ids, per_position, 0), -1),
        top_k=program.dims.candidates,
        tempered=program.confidence == "tempered",
        entropy=program.rule.entropy,
        vocab_axes=shared_by("vocab"),
        backend=program.kernels.prediction,
    )
    return Prediction(
        token=best.token.reshape(shape),
        prob=best.prob.reshape(shape),
        current_prob=best.current_prob.reshape(shape),
        top_ids=best.top_ids.reshape(*shape, -1),
        top_probs=best.top_probs.reshape(*shape, -1),
        masked=state.masked,
        entropy=None if best.entropy is None else best.entropy.reshape(shape),
    )


def _end_overdue_blocks(program: Program, prediction: Prediction, state: DecodeState) -> DecodeState:
    """Fills the masks of blocks that spent their budget, and lets go of them: no rule can keep a block open for ever."""
    budget = program.block_budget + state.settings.max_post_edit_steps
    over = state.active & (state.steps >= budget[:, None])
    state = state.fill(state.masked & over[..., None], prediction.token, prediction.prob)
    return state.replace(hold=state.hold & ~over, merge=state.merge.replace(soft=state.merge.soft & ~over[..., None]))
