"""Revising filled tokens (LLaDA2.1's token-to-token editing)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffulex_jax.rules.base import Rule
from diffulex_jax.state import DecodeState, Dims, Prediction
from pallas_kernels.remask import decision


def edit() -> Rule:
    """Replaces a filled token by the prediction where they differ and the prediction is above ``edit_threshold`` (strictly).

    A threshold of 0 applies every disagreement (LLaDA2.1's speed mode). A filled block stays open until a step that began
    without masks changes nothing, or ``max_post_edit_steps`` such steps have run (arXiv 2602.08676). Tokens filled earlier in the
    same step agree with the prediction, so chaining after ``threshold`` equals applying both at once.
    """

    def init(dims: Dims) -> jax.Array:
        return jnp.zeros((dims.slots, dims.window), jnp.int32)

    def update(prediction: Prediction, state: DecodeState, post_steps: jax.Array) -> tuple[DecodeState, jax.Array]:
        filled = state.editable & ~prediction.masked
        limit = state.settings.edit_threshold[:, None, None]
        revise = decision.revise(prediction.token, prediction.prob, state.tokens, filled, threshold=limit)
        complete_before = ~(prediction.masked & state.editable).any(-1)
        post_steps = post_steps + (complete_before & state.active)
        state = state.fill(revise, prediction.token, prediction.prob)
        stable = complete_before & ~revise.any(-1)
        spent = post_steps >= state.settings.max_post_edit_steps[:, None]
        open_ = state.masked.any(-1) | ~(stable | spent)
        return state.replace(hold=state.hold | (open_ & state.active)), post_steps

    return Rule(init, update)
