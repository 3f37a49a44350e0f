"""Filling masks by confidence (LLaDA2.0, SDAR)."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from diffulex_jax.rules.base import Rule, stateless
from diffulex_jax.rules.blocks import quota
from diffulex_jax.state import DecodeState, Prediction
from pallas_kernels.remask import decision


Fallback = Literal["best", "leftmost"]


def threshold(*, fallback: Fallback = "best", inclusive: bool = False) -> Rule:
    """Fills every mask whose prediction is above ``accept_threshold`` (strictly), and never fewer than the step's quota.

    The quota is ``num_to_transfer``, or what ``denoising_steps`` makes of it. A look-ahead block has one only once its predecessor
    is semi-complete. LLaDA2.0's rule, the mask-to-token half of LLaDA2.1 (arXiv 2602.08676), and SDAR's low-confidence remasking
    (arXiv 2510.06303): dynamic below 1, static from 1 on, where nothing is above the threshold.

    Args:
      fallback: what is filled where fewer than the quota are above the threshold. ``"best"``: as many as the quota, the most
        confident ones; ties go to the lower position. ``"leftmost"``: the masks among as many positions as the quota, from the first
        mask on, whatever else is above the threshold (JetEngine).
      inclusive: a prediction at the threshold counts as above it (Fast-dLLM, arXiv 2505.22618).

    Raises:
      ValueError: for another ``fallback``.
    """
    if fallback not in get_args(Fallback):
        raise ValueError(f"fallback={fallback!r} must be 'best' or 'leftmost'")

    def update(prediction: Prediction, state: DecodeState) -> DecodeState:
        open_, least = state.masked & state.editable, quota(state)[..., None]
        limit = state.settings.accept_threshold[:, None, None]
        if inclusive:
            limit = jnp.nextafter(limit, -jnp.inf)
        if fallback == "best":
            take = decision.accept(prediction.prob, open_, threshold=limit, least=least)
        else:
            sure = open_ & (prediction.prob > limit)
            enough = sure.sum(-1, keepdims=True) >= least
            take = jnp.where(enough, sure, open_ & _next_positions(open_, least))
        return state.fill(take, prediction.token, prediction.prob)

    return stateless(update)


def _next_positions(open_: jax.Array, count: jax.Array) -> jax.Array:
    """``[S, K, B]`` bool: ``count`` ``[S, K, 1]`` positions from the first of ``open_`` on."""
    at, first = jnp.arange(open_.shape[-1]), open_.argmax(-1, keepdims=True)
    return (at >= first) & (at < first + count)
