"""Filling masks by confidence (LLaDA2.0)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffulex_jax.rules.base import Rule, stateless
from diffulex_jax.rules.blocks import may_force
from diffulex_jax.state import DecodeState, Prediction


def threshold() -> Rule:
    """Fills every mask whose prediction is above ``accept_threshold`` (strictly), and never fewer than ``num_to_transfer``.

    Where fewer are above it, the ``num_to_transfer`` most confident masks of the block are filled instead; ties go to the
    lower position. A look-ahead block is forced so only once its predecessor is semi-complete. LLaDA2.0's rule, and the
    mask-to-token half of LLaDA2.1 (arXiv 2602.08676).
    """

    def update(prediction: Prediction, state: DecodeState) -> DecodeState:
        open_ = state.masked & state.editable
        above = open_ & (prediction.prob > state.settings.accept_threshold[:, None, None])
        least = jnp.minimum(state.settings.num_to_transfer[:, None], open_.sum(-1))
        least = jnp.where(may_force(state), least, 0)[..., None]
        best = open_ & (confidence_rank(jnp.where(open_, prediction.prob, -1.0)) < least)
        take = jnp.where(above.sum(-1, keepdims=True) >= least, above, best)
        return state.fill(take, prediction.token, prediction.prob)

    return stateless(update)


def confidence_rank(confidence: jax.Array) -> jax.Array:
    """``[..., B]`` float -> ``[..., B]`` int32: 0 for the largest of the last axis, ties in order of position."""
    before = jnp.tril(jnp.ones(confidence.shape[-1:] * 2, bool), -1)
    mine, other = confidence[..., :, None], confidence[..., None, :]
    return ((other > mine) | ((other == mine) & before)).sum(-1, dtype=jnp.int32)
