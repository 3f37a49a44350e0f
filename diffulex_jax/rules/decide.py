"""Filling, revising and masking again in one decision (LLaDA2.0, LLaDA2.1): what a TPU runs as one kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffulex_jax.rules.base import Rule
from diffulex_jax.rules.blocks import quota
from diffulex_jax.state import DecodeState, Dims, Prediction
from pallas_kernels import remask as kernel


def decide(*, edit: bool = True, max_per_position: int = 2) -> Rule:
    """Does what ``chain(threshold(), edit(), remask())`` does, to the bit, in one operation. Put it first in a chain.

    Args:
      edit: whether filled tokens are revised; without, it is ``chain(threshold(), remask())``.
      max_per_position: how often a position may be masked again.

    Raises:
      ValueError: when ``max_per_position`` is negative.
    """
    if max_per_position < 0:
        raise ValueError(f"max_per_position={max_per_position} must not be negative")

    def init(dims: Dims) -> tuple[jax.Array, jax.Array]:
        blocks = (dims.slots, dims.window)
        return jnp.zeros(blocks, jnp.int32), jnp.zeros((*blocks, dims.block), jnp.int32)

    def update(
        prediction: Prediction, state: DecodeState, kept: tuple[jax.Array, jax.Array]
    ) -> tuple[DecodeState, tuple[jax.Array, jax.Array]]:
        (post_steps, times), s, editable = kept, state.settings, state.editable
        decision = kernel.decide(
            state.tokens,
            state.masked,
            state.confidence,
            editable,
            token=prediction.token,
            prob=prediction.prob,
            current_prob=prediction.current_prob,
            times=times,
            accept_threshold=s.accept_threshold,
            edit_threshold=s.edit_threshold if edit else jnp.full_like(s.edit_threshold, jnp.inf),
            remask_threshold=s.remask_threshold,
            least=quota(state),
            max_per_position=max_per_position,
        )
        filled = editable & ~state.masked
        # While a block has masks, its filled tokens may yet be masked again.
        hold = (s.remask_threshold[:, None] > 0) & decision.masked.any(-1)
        if edit:
            # As in the rule ``edit``, which does not know of positions that are masked again in the same step.
            complete = ~(state.masked & editable).any(-1)
            post_steps = post_steps + (complete & state.active)
            stable = complete & ~(filled & (decision.tokens != state.tokens)).any(-1)
            spent = post_steps >= s.max_post_edit_steps[:, None]
            hold |= (state.masked & decision.masked).any(-1) | ~(stable | spent)
        times = times + (filled & decision.masked)
        state = state.replace(
            tokens=decision.tokens,
            masked=decision.masked,
            confidence=decision.confidence,
            hold=state.hold | (hold & state.active),
        )
        return state, (post_steps, times)

    return Rule(init, update)
