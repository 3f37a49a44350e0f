"""A request as one row of the decode state: packed on the host, placed into a slot on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from diffulex_jax.rules.base import Rule
from diffulex_jax.rules.noise_levels import step_shares
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.state import RUNNING, Canvas, DecodeState, Dims, Merge, Pending, Settings


MAX_STOP_IDS = 8


class Request(struct.PyTreeNode):
    """What the host hands over to start a request; NumPy arrays.

    Attributes:
      sequence: ``[T]`` int32, the prompt, pinned and initial tokens at their positions.
      given: ``[T]`` bool, positions of ``sequence`` that the caller fixed.
      initial: ``[T]`` bool, positions of ``sequence`` that the caller filled to start with.
      prompt_len, limit: int32, generated positions are ``[prompt_len, limit)``.
      carried: ``[Dims.carried]`` float32, the hidden state of the prompt's last position; zeros until prefill gives it.
      seed: ``[2]`` uint32, the upper and lower half of the request's seed: its random key.
      settings: one row.
    """

    sequence: np.ndarray
    given: np.ndarray
    initial: np.ndarray
    prompt_len: np.ndarray
    limit: np.ndarray
    carried: np.ndarray | jax.Array
    seed: np.ndarray
    settings: Settings


class Saved(struct.PyTreeNode):
    """A request taken off the device between two steps; put back, it goes on exactly as it was.

    Attributes:
      row: its row of the decode state, without the slot axis.
      k, v: ``[L, n, page, KV, H]``, the KV of its written pages, as the pool holds it.
    """

    row: DecodeState
    k: Any
    v: Any


def make_request(dims: Dims, *, prompt: np.ndarray, params: SamplingParams, eos_ids: Sequence[int]) -> Request:
    """Packs a validated request.

    Args:
      dims: the engine's sizes.
      prompt: ``[n]`` int32, 1 <= n < T.
      params: the request's settings.
      eos_ids: the model's own stop tokens.
    """
    n = len(prompt)
    sequence = np.full(dims.positions, dims.mask_id, np.int32)
    given, initial = np.arange(dims.positions) < n, np.zeros(dims.positions, bool)
    sequence[:n] = prompt
    for chosen, at in ((params.pinned, given), (params.init_tokens, initial)):
        for offset, token in (chosen or {}).items():
            sequence[n + offset], at[n + offset] = token, True
    return Request(
        sequence=sequence,
        given=given,
        initial=initial & ~given,
        prompt_len=np.asarray(n, np.int32),
        limit=np.asarray(n + params.max_tokens, np.int32),
        carried=np.zeros(dims.carried, np.float32),
        seed=np.array([(params.seed or 0) >> 32, (params.seed or 0) & 0xFFFFFFFF], np.uint32),
        settings=settings_row(params, eos_ids, _step_shares(dims, params.resolve())),
    )


def _step_shares(dims: Dims, params: SamplingParams) -> np.ndarray:
    """``Settings.step_shares`` of a request. After its steps, what is left is filled.

    A step that decides the first token of a block alone, and that no rule sees, is the first of its steps.
    """
    shares = np.ones(dims.noise_steps, np.float32)
    if dims.noise_steps:
        assert params.eps is not None, "resolved"
        tokens = params.max_tokens if dims.one_block else params.block_length or dims.block
        own = step_shares(params.denoising_steps or tokens, params.eps)[int(dims.commit_alone) :]
        shares[: len(own)] = own
    return shares


def settings_row(params: SamplingParams, eos_ids: Sequence[int], step_shares: np.ndarray) -> Settings:
    """The settings of one request as it stands in a row of the state; what is left to the strategy takes its usual value."""
    params = params.resolve()
    stop_ids = ([] if params.ignore_eos else list(eos_ids)) + list(params.stop_token_ids)
    lists = {"stop_ids": stop_ids, "doubted_ids": list(params.doubted_token_ids)}
    row: dict[str, Any] = {name: np.array(ids + [-1] * (MAX_STOP_IDS - len(ids)), np.int32) for name, ids in lists.items()}
    row["step_shares"] = step_shares
    for name in Settings.__dataclass_fields__.keys() - row.keys():
        value = getattr(params, name)
        if value is None:  # max_nfe: no limit
            value = np.iinfo(np.int32).max
        row[name] = np.asarray(value, np.float32 if isinstance(value, float) else np.int32)
    return Settings(**row)


def admit(dims: Dims, rule: Rule, state: DecodeState, slot: jax.Array, request: Request) -> DecodeState:
    """``state`` with a request in slot ``slot``, before its first denoise step; past the last slot: nowhere.

    Its window starts at the last, partly filled block of the prompt; whole prompt blocks are expected in the pool. Where there is no
    such block and ``dims.commit_alone``, the last whole one is pending. Where ``dims.prompt_apart`` the window starts at the prompt's end,
    and all of the prompt is in the pool. On a whole canvas it starts there too, and nothing is in the pool; where ``dims.commit_alone``,
    the whole prompt is pending.
    """
    request = jax.tree.map(lambda a: jnp.asarray(a)[None], request)
    row = empty_state(dataclasses.replace(dims, slots=1), rule)
    length = jnp.asarray(request.prompt_len)
    if dims.whole_canvas:
        start, written, left = length, row.written_upto, row.pending.live | dims.commit_alone
    else:
        start = length if dims.prompt_apart else length // dims.block * dims.block
        left = dims.commit_alone & (length % dims.block == 0)
        written = start - left * dims.block
    last = jnp.take_along_axis(request.sequence, (start - dims.block)[:, None] + jnp.arange(dims.block), 1, mode="clip")
    row = row.replace(
        sequence=row.sequence.replace(tokens=request.sequence),
        given=request.given,
        initial=request.initial,
        active=row.active.at[:, 0].set(True),
        pending=row.pending.replace(tokens=last, live=left),
        start=start,
        written_upto=written,
        carried=request.carried,
        prompt_len=request.prompt_len,
        limit=request.limit,
        live=jnp.ones(1, bool),
        key=request.seed,
        settings=request.settings,
    )
    tokens, masked, frozen = given_blocks(dims, row, start, dims.window)
    return put(state, slot, jax.tree.map(lambda a: a[0], row.replace(tokens=tokens, masked=masked, frozen=frozen)))


def take(state: DecodeState, slot: jax.Array) -> DecodeState:
    """The row in slot ``slot``, without the slot axis."""
    return jax.tree.map(lambda a: a[slot], state)


def put(state: DecodeState, slot: jax.Array, row: DecodeState) -> DecodeState:
    """``state`` with ``row`` (see :func:`take`) in slot ``slot``; past the last slot: nowhere."""
    return jax.tree.map(lambda a, r: a.at[slot].set(r.astype(a.dtype), mode="drop"), state, row)


def release(state: DecodeState, slot: jax.Array) -> DecodeState:
    """``state`` with slot ``slot`` free: its row does nothing from here on."""
    return state.replace(live=state.live.at[slot].set(False))


def empty_state(dims: Dims, rule: Rule) -> DecodeState:
    """A state whose slots are all free."""
    s, k, b, m = dims.slots, dims.window, dims.block, dims.merge_top_k

    def zeros(dtype: type, *shape: int) -> jax.Array:
        return jnp.zeros((s, *shape), dtype)

    def merge(*shape: int) -> Merge:
        return Merge(ids=zeros(jnp.int32, *shape, m), probs=zeros(jnp.float32, *shape, m), soft=zeros(jnp.bool_, *shape))

    def canvas(*shape: int) -> Canvas:
        tokens = jnp.full((s, *shape), dims.mask_id, jnp.int32)
        return Canvas(tokens, zeros(jnp.float32, *shape), zeros(jnp.int32, *shape), zeros(jnp.int32, *shape))

    window = canvas(k, b)
    defaults = settings_row(SamplingParams(), (), np.ones(dims.noise_steps, np.float32))
    return DecodeState(
        tokens=window.tokens,
        masked=jnp.ones((s, k, b), bool),
        frozen=zeros(jnp.bool_, k, b),
        confidence=window.confidence,
        first_step=window.first_step,
        last_step=window.last_step,
        active=zeros(jnp.bool_, k),
        hold=zeros(jnp.bool_, k),
        stable=jnp.ones((s, k), bool),
        ready=zeros(jnp.bool_),
        steps=zeros(jnp.int32, k),
        merge=merge(k, b),
        pending=Pending(tokens=zeros(jnp.int32, b), merge=merge(b), live=zeros(jnp.bool_)),
        start=zeros(jnp.int32),
        written_upto=zeros(jnp.int32),
        carried=zeros(jnp.float32, dims.carried),
        sequence=canvas(dims.positions),
        given=zeros(jnp.bool_, dims.positions),
        initial=zeros(jnp.bool_, dims.positions),
        prompt_len=zeros(jnp.int32),
        limit=zeros(jnp.int32),
        status=jnp.full((s,), RUNNING, jnp.int32),
        live=zeros(jnp.bool_),
        length=zeros(jnp.int32),
        nfe=zeros(jnp.int32),
        revised=zeros(jnp.int32),
        remasked=zeros(jnp.int32),
        key=jnp.broadcast_to(jax.random.key_data(jax.random.key(0)), (s, 2)),
        settings=jax.tree.map(lambda a: jnp.broadcast_to(a, (s, *a.shape)), defaults),
        rule=rule.init(dims),
    )


def given_blocks(dims: Dims, state: DecodeState, start: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ``count`` blocks from ``start`` (``[S]``) on, as a request begins them: what the caller gave, masks elsewhere.

    What is not on a whole canvas is neither masked nor to be written.

    Returns:
      ``(tokens int32, masked bool, frozen bool)``, each ``[S, count, B]``.
    """
    at = start[:, None] + jnp.arange(count * dims.block)
    inside = at < state.given.shape[1]
    at = jnp.minimum(at, state.given.shape[1] - 1)
    frozen = jnp.take_along_axis(state.given, at, 1) & inside
    known = frozen | (jnp.take_along_axis(state.initial, at, 1) & inside)
    tokens = jnp.where(known, jnp.take_along_axis(state.sequence.tokens, at, 1), dims.mask_id)
    if dims.whole_canvas:
        past = start[:, None] + jnp.arange(count * dims.block) >= state.limit[:, None]
        frozen, known = frozen | past, known | past
    tokens, masked, frozen = (a.reshape(-1, count, dims.block) for a in (tokens, ~known, frozen))
    return tokens, masked, frozen
