"""Filling, revising, deleting and inserting within a block (LLaDA2.2's Levenshtein editing)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffulex_jax.rules.base import Rule
from diffulex_jax.rules.blocks import may_force
from diffulex_jax.state import DecodeState, Dims, Prediction
from pallas_kernels.remask import decision


_SEEN = 64  # block contents remembered by the loop guard


class LevenshteinState(NamedTuple):
    """What the rule keeps of each block.

    Attributes:
      original: ``[S, K, B]`` bool, masks the block began with; they move with their neighbours.
      initial: ``[S, K]`` int32, how many those were.
      post_steps: ``[S, K]`` int32, steps in a row without one.
      seen: ``[S, K, 64]`` uint32, hashes of the block's last contents; 0 where there is none yet.
    """

    original: jax.Array
    initial: jax.Array
    post_steps: jax.Array
    seen: jax.Array


def levenshtein(*, delete_id: int = 156930, split_id: int = 156931) -> Rule:
    """Lets the model drop a position (``delete_id``) or open one before it (``split_id``), beside filling and revising.

    Masks above ``accept_threshold`` are filled, and filled tokens that differ from a prediction above ``edit_threshold``
    revised; where one of the two special tokens is to be written, the position is deleted, or a mask inserted before what
    stands there. What follows moves, the block is cut or padded with masks to its length. In each step at least one of the
    masks the block began with is filled (all of them after B steps), and as many as edits brought in. A block ends when a
    step without masks changes nothing; at the latest once ``max_post_edit_steps`` steps in a row saw no original mask, or
    after 3 B steps: that step fills every mask, with the best token that is not special. A step that would lead back to
    contents the block had before writes the second choice at its least confident change instead (the authors resample one at
    random). Positions up to the last fixed one of a block are neither deleted nor moved; there the best ordinary token is
    written.

    Raises:
      ValueError: when the two ids are equal or negative.
    """
    if delete_id == split_id or min(delete_id, split_id) < 0:
        raise ValueError(f"delete_id={delete_id} and split_id={split_id} must be two different token ids")

    def init(dims: Dims) -> LevenshteinState:
        blocks = (dims.slots, dims.window)
        counts = jnp.zeros(blocks, jnp.int32)
        return LevenshteinState(jnp.zeros((*blocks, dims.block), bool), counts, counts, jnp.zeros((*blocks, _SEEN), jnp.uint32))

    def special(token: jax.Array) -> jax.Array:
        return (token == delete_id) | (token == split_id)

    def update(prediction: Prediction, state: DecodeState, kept: LevenshteinState) -> tuple[DecodeState, LevenshteinState]:
        block, s, editable = state.tokens.shape[-1], state.settings, state.editable
        open_ = state.masked & editable
        original = jnp.where((state.steps == 1)[..., None], open_, kept.original & open_)
        initial = jnp.where(state.steps == 1, open_.sum(-1), kept.initial)
        left = original.any(-1)
        post_steps = jnp.where(left, 0, kept.post_steps + state.active)
        final = state.active & ((~left & (post_steps >= s.max_post_edit_steps[:, None])) | (state.steps >= 3 * block))

        # Where nothing may move, and in the last step everywhere, the best ordinary candidate stands in for a special token.
        movable = editable & (jnp.cumsum(state.frozen[..., ::-1], -1)[..., ::-1] == 0)
        ordinary, ordinary_prob = _first(prediction, ~special(prediction.top_ids))
        replaced = special(prediction.token) & ~(movable & ~final[..., None])
        token = jnp.where(replaced, ordinary, prediction.token)
        prob = jnp.where(replaced, ordinary_prob, prediction.prob)

        due = jnp.where(state.steps > block, original.sum(-1), (state.steps <= initial)) + (open_ & ~original).sum(-1)
        least = jnp.where(may_force(state), due, 0)[..., None]
        take = decision.accept(prob, open_, threshold=s.accept_threshold[:, None, None], least=least) | (open_ & final[..., None])
        filled = editable & ~state.masked
        revise = decision.revise(token, prob, state.tokens, filled, threshold=s.edit_threshold[:, None, None])
        write = take | revise

        def written(token: jax.Array, prob: jax.Array) -> tuple[DecodeState, jax.Array]:
            delete, split = (write & (token == id_) for id_ in (delete_id, split_id))
            return _moved(state.fill(write & ~delete & ~split, token, prob), original & ~take, delete, split)

        after, _ = written(token, prob)
        # The second choice, where the first would go round in a circle.
        looped = (kept.seen == _digest(after)[..., None]).any(-1) & write.any(-1) & ~final
        other, other_prob = _first(prediction, ~special(prediction.top_ids) & (prediction.top_ids != token[..., None]))
        doubted = write & (decision.confidence_rank(jnp.where(write, -prob, -jnp.inf)) == 0) & looped[..., None]
        after, original = written(jnp.where(doubted, other, token), jnp.where(doubted, other_prob, prob))

        settled = ~open_.any(-1) & ~revise.any(-1)
        after = after.replace(hold=after.hold | (state.active & (after.masked.any(-1) | ~(settled | final))))
        at = jnp.arange(_SEEN) == (state.steps % _SEEN)[..., None]
        seen = jnp.where(at, _digest(after)[..., None], kept.seen)
        return after, LevenshteinState(original, initial, post_steps, seen)

    return Rule(init, update, candidates=4, moves=True)  # two special tokens, an ordinary one, and a second choice


def _first(prediction: Prediction, allowed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Id and probability ``[S, K, B]`` of each position's best candidate among the ``allowed`` ``[S, K, B, C]``."""
    at = jnp.argmax(allowed, -1, keepdims=True)
    ids, probs = (jnp.take_along_axis(a, at, -1)[..., 0] for a in (prediction.top_ids, prediction.top_probs))
    return ids, probs


def _moved(state: DecodeState, original: jax.Array, delete: jax.Array, split: jax.Array) -> tuple[DecodeState, jax.Array]:
    """``state`` and ``original`` with positions deleted, and a mask opened before each position of ``split``."""
    size = 1 - delete.astype(jnp.int32) + split
    to = jnp.cumsum(size, -1) - size + split
    comes = (to[..., None, :] == jnp.arange(to.shape[-1])[:, None]) & ~delete[..., None, :]  # [S, K, to, from]
    source, kept = comes.argmax(-1), comes.any(-1)

    def move(array: jax.Array, opened: Any) -> jax.Array:
        return jnp.where(kept, jnp.take_along_axis(array, source, -1), opened)

    state = state.replace(
        tokens=move(state.tokens, 0),  # masked positions read as the mask id whatever stands here
        masked=move(state.masked, True),
        confidence=move(state.confidence, 0.0),
        first_step=move(state.first_step, 0),
        last_step=move(state.last_step, 0),
    )
    return state, move(original, False)


def _digest(state: DecodeState) -> jax.Array:
    """``[S, K]`` uint32, never 0: a hash of each block's contents."""
    content = jnp.where(state.masked, 0, state.tokens + 1).astype(jnp.uint32)
    powers = jnp.uint32(0x9E3779B1) ** jnp.arange(1, content.shape[-1] + 1, dtype=jnp.uint32)
    mixed = ((content ^ (content >> 15)) * powers).sum(-1, dtype=jnp.uint32)
    return mixed | 1
