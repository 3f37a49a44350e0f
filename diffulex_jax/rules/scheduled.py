"""Filling a block's masks on a schedule (LLaDA)."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from diffulex_jax.rules.base import Rule
from diffulex_jax.rules.blocks import draws
from diffulex_jax.state import DecodeState, Dims, Prediction
from pallas_kernels.remask import decision


Order = Literal["confidence", "random"]


def scheduled(*, order: Order = "confidence") -> Rule:
    """Fills the step's share of a block's masks: LLaDA's remasking (arXiv 2502.09992), which masks the others again.

    Where ``denoising_steps`` is S, the m masks that a block begins with are shared out over S steps: step i, counted from 0, fills
    floor(m / S), and one more while i < m mod S; a step always fills one. Where it is 0, every step fills ``num_to_transfer``.

    Args:
      order: ``"confidence"``: the most probable predictions first, ties in order of position. ``"random"``: by a draw for each position
        and step.

    Raises:
      ValueError: for another ``order``.
    """
    if order not in get_args(Order):
        raise ValueError(f"order={order!r} must be 'confidence' or 'random'")

    def init(dims: Dims) -> jax.Array:
        return jnp.zeros((dims.slots, dims.window), jnp.int32)

    def update(prediction: Prediction, state: DecodeState, masks: jax.Array) -> tuple[DecodeState, jax.Array]:
        open_, s = state.masked & state.editable, state.settings
        masks = jnp.where(state.steps == 1, open_.sum(-1), masks)
        steps = jnp.maximum(s.denoising_steps, 1)[:, None]
        share = jnp.maximum(masks // steps + (state.steps - 1 < masks % steps), 1)  # the step that runs is counted already
        count = jnp.where(s.denoising_steps[:, None] > 0, share, s.num_to_transfer[:, None])
        score = prediction.prob if order == "confidence" else draws(state, jax.random.uniform)
        take = open_ & (decision.confidence_rank(jnp.where(open_, score, -1.0)) < count[..., None])
        return state.fill(take, prediction.token, prediction.prob), masks

    return Rule(init, update)
