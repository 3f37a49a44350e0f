"""Filling masks by confidence (LLaDA2.0)."""

from __future__ import annotations

import jax.numpy as jnp

from diffulex_jax.rules.base import Rule, stateless
from diffulex_jax.rules.blocks import may_force
from diffulex_jax.state import DecodeState, Prediction
from pallas_kernels.remask import decision


def threshold() -> Rule:
    """Fills every mask whose prediction is above ``accept_threshold`` (strictly), and never fewer than ``num_to_transfer``.

    Where fewer are above it, the ``num_to_transfer`` most confident masks of the block are filled instead; ties go to the
    lower position. A look-ahead block is forced so only once its predecessor is semi-complete. LLaDA2.0's rule, and the
    mask-to-token half of LLaDA2.1 (arXiv 2602.08676).
    """

    def update(prediction: Prediction, state: DecodeState) -> DecodeState:
        take = decision.accept(
            prediction.prob,
            state.masked & state.editable,
            threshold=state.settings.accept_threshold[:, None, None],
            least=jnp.where(may_force(state), state.settings.num_to_transfer[:, None], 0)[..., None],
        )
        return state.fill(take, prediction.token, prediction.prob)

    return stateless(update)
