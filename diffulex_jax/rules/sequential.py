"""Filling masks from left to right (SDAR)."""

from __future__ import annotations

import jax.numpy as jnp

from diffulex_jax.rules.base import Rule, stateless
from diffulex_jax.rules.blocks import quota
from diffulex_jax.state import DecodeState, Prediction


def sequential() -> Rule:
    """Fills the leftmost masks of a block, as many as the step's quota, however sure their predictions are.

    The quota is ``num_to_transfer``, or what ``denoising_steps`` makes of it. A look-ahead block waits until its predecessor is
    semi-complete. SDAR's sequential remasking (arXiv 2510.06303).
    """

    def update(prediction: Prediction, state: DecodeState) -> DecodeState:
        open_ = state.masked & state.editable
        take = open_ & (jnp.cumsum(open_, -1) <= quota(state)[..., None])
        return state.fill(take, prediction.token, prediction.prob)

    return stateless(update)
