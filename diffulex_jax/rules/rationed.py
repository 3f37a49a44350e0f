"""Filling sure masks within a ration that carries over (Fast-dLLM on Dream)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffulex_jax.rules.base import Rule
from diffulex_jax.state import DecodeState, Dims, Prediction
from pallas_kernels.remask import decision


def rationed() -> Rule:
    """Fills masks whose prediction is at ``accept_threshold`` or above, within the step's ration, and the surest in any case.

    A step's ration is ``num_to_transfer``, or where ``denoising_steps`` is S > 0 its share of the m masks that a block begins with:
    floor(m / S), and one more while i < m mod S for step i < S, counted from 0. What a step leaves of its ration the next may fill; after
    S steps nothing is added. Fast-dLLM's ``confidence_threshold`` without a cache (arXiv 2505.22618), whose S divides m. Ties go to the
    lower position.
    """

    def init(dims: Dims) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((dims.slots, dims.window), jnp.int32), jnp.zeros((dims.slots, dims.window), jnp.int32)

    def update(
        prediction: Prediction, state: DecodeState, kept: tuple[jax.Array, jax.Array]
    ) -> tuple[DecodeState, tuple[jax.Array, jax.Array]]:
        open_, s, step = state.masked & state.editable, state.settings, state.steps - 1  # the step that runs is counted already
        masks, left = jnp.where(step == 0, open_.sum(-1), kept[0]), kept[1]
        steps = s.denoising_steps[:, None]
        of = jnp.maximum(steps, 1)
        share = jnp.where(step < steps, masks // of + (step < masks % of), 0)
        ration = jnp.minimum(jnp.where(steps > 0, share, s.num_to_transfer[:, None]) + left, open_.sum(-1))
        rank = decision.confidence_rank(jnp.where(open_, prediction.prob, -1.0))
        sure = (prediction.prob >= s.accept_threshold[:, None, None]) | (rank == 0)
        take = open_ & sure & (rank < ration[..., None])
        return state.fill(take, prediction.token, prediction.prob), (masks, ration - take.sum(-1, dtype=jnp.int32))

    return Rule(init, update, one_block=True)
