"""A request as one row of the decode state: packed on the host, placed into a slot on the device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from diffulex_jax.rules.base import Rule
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.state import RUNNING, DecodeState, Dims, Merge, Pending, Settings


Array = jax.Array | np.ndarray


class Request(struct.PyTreeNode):
    """What the host hands over to start a request; NumPy arrays.

    Attributes:
      sequence: ``[T]`` int32, the prompt at its positions.
      given: ``[T]`` bool, positions of ``sequence`` that the caller fixed.
      page_table: ``[P]`` int32, pages of its blocks in order; the number of pages in the pool where none.
      prompt_len, limit: int32, generated positions are ``[prompt_len, limit)``.
      seed: int32 of the request's random key.
      settings: scalars.
    """

    sequence: np.ndarray
    given: np.ndarray
    page_table: np.ndarray
    prompt_len: np.ndarray
    limit: np.ndarray
    seed: np.ndarray
    settings: Settings


def make_request(dims: Dims, *, no_page: int, prompt: np.ndarray, params: SamplingParams, pages: np.ndarray) -> Request:
    """Packs a validated request.

    Args:
      dims: the engine's sizes.
      no_page: the page number that means none.
      prompt: ``[n]`` int32, 1 <= n < T.
      params: the request's settings.
      pages: int32 pages of its blocks, in order.
    """
    sequence = np.zeros(dims.positions, np.int32)
    sequence[: len(prompt)] = prompt
    table = np.full(dims.pages_per_slot, no_page, np.int32)
    table[: len(pages)] = pages
    return Request(
        sequence=sequence,
        given=np.arange(dims.positions) < len(prompt),
        page_table=table,
        prompt_len=np.asarray(len(prompt), np.int32),
        limit=np.asarray(len(prompt) + params.max_tokens, np.int32),
        seed=np.asarray(params.seed, np.int32),
        settings=_settings(params),
    )


def admit(dims: Dims, rule: Rule, mask_id: int, state: DecodeState, slot: jax.Array, request: Request) -> DecodeState:
    """``state`` with a request in slot ``slot``, before its first denoise step.

    Its window starts at the last, partly filled block of the prompt; whole prompt blocks are expected in the pool.
    """
    one = Dims(slots=1, window=dims.window, block=dims.block, pages_per_slot=dims.pages_per_slot, merge_top_k=dims.merge_top_k)
    start = (request.prompt_len // dims.block * dims.block)[None]
    sequence, given = request.sequence[None], request.given[None]
    tokens, masked = given_blocks(sequence, given, start, dims.window, dims.block, mask_id)
    row = empty_state(one, rule, mask_id=mask_id, no_page=0).replace(
        tokens=tokens,
        masked=masked,
        frozen=~masked,
        active=jnp.arange(dims.window)[None] < 1,
        start=start,
        written_upto=start,
        sequence=sequence,
        given=given,
        page_table=request.page_table[None],
        prompt_len=request.prompt_len[None],
        limit=request.limit[None],
        live=jnp.ones(1, bool),
        key=jax.random.key_data(jax.random.key(request.seed))[None],
        settings=jax.tree.map(lambda a: a[None], request.settings),
    )
    return jax.tree.map(lambda a, r: a.at[slot].set(r[0].astype(a.dtype)), state, row)


def release(state: DecodeState, slot: jax.Array) -> DecodeState:
    """``state`` with slot ``slot`` free: its row does nothing from here on."""
    return state.replace(live=state.live.at[slot].set(False))


def _settings(params: SamplingParams) -> Settings:
    def value(name: str) -> Any:
        raw = getattr(params, name)
        if raw is None:  # max_nfe: no limit
            raw = np.iinfo(np.int32).max
        kind = np.bool_ if isinstance(raw, bool) else np.float32 if isinstance(raw, float) else np.int32
        return np.asarray(raw, kind)

    return Settings(**{name: value(name) for name in Settings.__dataclass_fields__})


def empty_state(dims: Dims, rule: Rule, *, mask_id: int, no_page: int) -> DecodeState:
    """A state whose slots are all free."""
    s, k, b, m = dims.slots, dims.window, dims.block, dims.merge_top_k

    def zeros(dtype: type, *shape: int) -> jax.Array:
        return jnp.zeros((s, *shape), dtype)

    def merge(*shape: int) -> Merge:
        return Merge(ids=zeros(jnp.int32, *shape, m), probs=zeros(jnp.float32, *shape, m), soft=zeros(jnp.bool_, *shape))

    return DecodeState(
        tokens=jnp.full((s, k, b), mask_id, jnp.int32),
        masked=jnp.ones((s, k, b), bool),
        frozen=zeros(jnp.bool_, k, b),
        confidence=zeros(jnp.float32, k, b),
        active=zeros(jnp.bool_, k),
        hold=zeros(jnp.bool_, k),
        steps=zeros(jnp.int32, k),
        merge=merge(k, b),
        pending=Pending(tokens=zeros(jnp.int32, b), merge=merge(b), live=zeros(jnp.bool_)),
        start=zeros(jnp.int32),
        written_upto=zeros(jnp.int32),
        sequence=jnp.full((s, dims.positions), mask_id, jnp.int32),
        given=zeros(jnp.bool_, dims.positions),
        page_table=jnp.full((s, dims.pages_per_slot), no_page, jnp.int32),
        prompt_len=zeros(jnp.int32),
        limit=zeros(jnp.int32),
        status=jnp.full((s,), RUNNING, jnp.int32),
        live=zeros(jnp.bool_),
        length=zeros(jnp.int32),
        nfe=zeros(jnp.int32),
        revised=zeros(jnp.int32),
        remasked=zeros(jnp.int32),
        key=jnp.broadcast_to(jax.random.key_data(jax.random.key(0)), (s, 2)),
        settings=jax.tree.map(lambda a: jnp.broadcast_to(a, (s,)), _settings(SamplingParams())),
        rule=rule.init(dims),
    )


def given_blocks(
    sequence: Array, given: Array, start: Array, count: int, block: int, mask_id: int
) -> tuple[jax.Array, jax.Array]:
    """The ``count`` blocks from ``start`` (``[S]``) on: what the caller fixed, masks elsewhere.

    Returns:
      ``(tokens [S, count, B] int32, masked [S, count, B] bool)``.
    """
    at = start[:, None] + jnp.arange(count * block)
    inside = at < sequence.shape[1]
    at = jnp.minimum(at, sequence.shape[1] - 1)
    known = jnp.take_along_axis(given, at, 1) & inside
    tokens = jnp.where(known, jnp.take_along_axis(sequence, at, 1), mask_id)
    shape = (len(sequence), count, block)
    return tokens.reshape(shape), ~known.reshape(shape)
