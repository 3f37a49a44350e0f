"""Filling the more masks at once, the surer all of them are (Fast-dLLM)."""

from __future__ import annotations

import jax.numpy as jnp

from diffulex_jax.rules.base import Rule, stateless
from diffulex_jax.state import DecodeState, Prediction
from pallas_kernels.remask import decision


def factor() -> Rule:
    """Fills the n surest masks of a block, n the largest number for which they are sure enough to be filled together.

    The surest is always filled. The n-th is, for n >= 2, if all before it are and its probability is at least 1 - f / (n + 1), f being
    ``confidence_factor``. A block's last mask is filled where only it fails, as in the authors' code (Fast-dLLM, arXiv 2505.22618).
    Ties go to the lower position.
    """

    def update(prediction: Prediction, state: DecodeState) -> DecodeState:
        open_ = state.masked & state.editable
        prob = jnp.where(open_, prediction.prob, -1.0)
        rank, masks = decision.confidence_rank(prob), open_.sum(-1, keepdims=True)
        enough = 1 - state.settings.confidence_factor[:, None, None] / (rank + 2)
        fails = open_ & (rank > 0) & (prob < enough)
        first = jnp.where(fails, rank, masks).min(-1, keepdims=True)
        take = open_ & (rank < jnp.where(first == masks - 1, masks, first))
        return state.fill(take, prediction.token, prediction.prob)

    return stateless(update)
