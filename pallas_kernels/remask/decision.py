"""What a step does with a prediction: fill masks, revise filled tokens, mask doubtful ones again. In plain jnp.

The only place of this arithmetic: the decoding rules call its pieces one by one, :func:`decide` and the kernels all of them.
The pieces broadcast: thresholds and counts that belong to a block have a last axis of size 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Decision(NamedTuple):
    """What became of the window.

    Attributes:
      tokens: ``[S, K, B]`` int32; where ``masked``, the token that stood there.
      masked: ``[S, K, B]`` bool.
      confidence: ``[S, K, B]`` float32, probability of a token when it was last written; 0 where masked again.
      accepted, revised, remasked: ``[S]`` int32, masks that were filled, filled tokens that changed, that were masked again.
    """

    tokens: jax.Array
    masked: jax.Array
    confidence: jax.Array
    accepted: jax.Array
    revised: jax.Array
    remasked: jax.Array


def accept(
    prob: jax.Array,
    open_: jax.Array,
    *,
    threshold: jax.Array,
    least: jax.Array,
    rank: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """``[..., B]`` bool: the open masks to fill (mask-to-token, arXiv 2602.08676).

    All whose ``prob`` is above ``threshold`` (strictly); where those are fewer than ``least``, the ``least`` most probable of the
    block instead, ties to the lower position.

    Args:
      prob: ``[..., B]`` float32, probability of the predicted token.
      open_: ``[..., B]`` bool, masks that may be filled.
      threshold: ``[..., 1]`` float32.
      least: ``[..., 1]`` int32; 0 forces nothing.
      rank: stands in for :func:`confidence_rank` where that cannot be compiled.
    """
    above = open_ & (prob > threshold)
    least = jnp.minimum(least, open_.sum(-1, keepdims=True, dtype=jnp.int32))
    best = open_ & ((rank or confidence_rank)(jnp.where(open_, prob, -1.0)) < least)
    enough = above.sum(-1, keepdims=True, dtype=jnp.int32) >= least
    return (above & enough) | (best & ~enough)


def revise(token: jax.Array, prob: jax.Array, tokens: jax.Array, filled: jax.Array, *, threshold: jax.Array) -> jax.Array:
    """``[..., B]`` bool: filled positions whose token in ``tokens`` gives way to ``token`` (token-to-token, arXiv 2602.08676).

    They disagree, and ``prob``, the probability of ``token``, is above ``threshold`` (strictly).
    """
    return filled & (token != tokens) & (prob > threshold)


def doubt(prob: jax.Array, filled: jax.Array, *, threshold: jax.Array, times: jax.Array, at_most: int) -> jax.Array:
    """``[..., B]`` bool: filled positions to mask again.

    ``prob``, the probability of the token that stands there, is below ``threshold``, and the position was masked again fewer than
    ``at_most`` times; ``times`` ``[..., B]`` int32 says how often.
    """
    return filled & (prob < threshold) & (times < at_most)


def confidence_rank(confidence: jax.Array) -> jax.Array:
    """``[..., B]`` float -> ``[..., B]`` int32: 0 for the largest of the last axis, ties in order of position."""
    before = jnp.tril(jnp.ones(confidence.shape[-1:] * 2, bool), -1)
    mine, other = confidence[..., :, None], confidence[..., None, :]
    return ((other > mine) | ((other == mine) & before)).sum(-1, dtype=jnp.int32)


def decide(*arrays: jax.Array, at_most: int) -> Decision:
    """See ``remask.decide``; arrays as in :func:`settle`: eight ``[S, K, B]``, then four that broadcast against ``[S, K, 1]``."""
    tokens, masked, _, editable = arrays[:4]
    new, masks, confidence = settle(*arrays, at_most=at_most)
    counts = (e.sum((1, 2), dtype=jnp.int32) for e in events(tokens, masked, editable, new, masks))
    return Decision(new, masks, confidence, *counts)


def settle(
    tokens: jax.Array,
    masked: jax.Array,
    confidence: jax.Array,
    editable: jax.Array,
    times: jax.Array,
    token: jax.Array,
    prob: jax.Array,
    current_prob: jax.Array,
    accept_threshold: jax.Array,
    edit_threshold: jax.Array,
    remask_threshold: jax.Array,
    least: jax.Array,
    *,
    at_most: int,
    rank: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """:func:`accept`, :func:`revise` and :func:`doubt` at once, on ``[..., B]``: the new tokens, masks and confidences."""
    filled = editable & ~masked
    take = accept(prob, masked & editable, threshold=accept_threshold, least=least, rank=rank)
    write = take | revise(token, prob, tokens, filled, threshold=edit_threshold)
    new = jnp.where(write, token, tokens)
    now = jnp.where(new == token, prob, current_prob)
    again = doubt(now, filled, threshold=remask_threshold, times=times, at_most=at_most)
    return new, (masked & ~take) | again, jnp.where(again, 0.0, jnp.where(write, prob, confidence))


def events(
    tokens: jax.Array, masked: jax.Array, editable: jax.Array, new: jax.Array, masks: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``[..., B]`` bool each: accepted, revised and masked again, from what stood there before and (``new``, ``masks``) after."""
    filled = editable & ~masked
    return editable & masked & ~masks, filled & ~masks & (new != tokens), filled & masks
