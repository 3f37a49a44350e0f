"""Masking doubtful tokens again."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffulex_jax.rules.base import Rule
from diffulex_jax.state import DecodeState, Dims, Prediction
from pallas_kernels.remask import decision


def remask(*, max_per_position: int = 2) -> Rule:
    """Masks a filled token again where the current prediction gives it less than ``remask_threshold``; 0 turns it off.

    Only tokens that were already filled in this forward's input are judged. A position is masked again at most
    ``max_per_position`` times, so every block ends.

    Raises:
      ValueError: when ``max_per_position`` is negative.
    """
    if max_per_position < 0:
        raise ValueError(f"max_per_position={max_per_position} must not be negative")

    def init(dims: Dims) -> jax.Array:
        return jnp.zeros((dims.slots, dims.window, dims.block), jnp.int32)

    def update(prediction: Prediction, state: DecodeState, count: jax.Array) -> tuple[DecodeState, jax.Array]:
        limit = state.settings.remask_threshold[:, None, None]
        prob = jnp.where(state.tokens == prediction.token, prediction.prob, prediction.current_prob)
        filled = state.editable & ~prediction.masked & ~state.masked
        doubt = decision.doubt(prob, filled, threshold=limit, times=count, at_most=max_per_position)
        masked = state.masked | doubt
        # While a block has masks, its filled tokens may yet be masked again.
        hold = state.hold | ((limit[..., 0] > 0) & masked.any(-1) & state.active)
        state = state.replace(masked=masked, hold=hold, confidence=jnp.where(doubt, 0.0, state.confidence))
        return state, count + doubt

    return Rule(init, update)
