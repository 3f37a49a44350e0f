"""DMax's soft parallel decoding: decode left to right while sure, and predict every decoded token anew each step."""

from __future__ import annotations

import jax.numpy as jnp

from diffulex_jax.rules.base import Rule, stateless
from diffulex_jax.rules.blocks import may_force
from diffulex_jax.state import DecodeState, Prediction


def soft_parallel(*, settle_on: str = "generated") -> Rule:
    """DMax's update (arXiv 2604.08302), without its embeddings: chain ``token_merge`` after it.

    Masks are filled from the left up to the first whose prediction is below ``accept_threshold`` (at the threshold counts as
    sure), at least the leftmost unless the block looks ahead of an unfinished one; filled tokens in between are passed over.
    Every other filled token is replaced by the new prediction, whatever its probability. The block ends when all positions are
    at ``settle_threshold`` or above, when nothing changed, or after B steps. Unlike the authors' code the mask id is never
    predicted, a block never ends with masks left, and a row's block ends by itself, whatever the other rows do.

    Args:
      settle_on: whose confidence ends a block: ``"generated"`` all generated positions (the authors' rule), or ``"masked"`` only those
        that were masked before this step (Diffulex's fast path, which takes filled tokens for certain).

    Raises:
      ValueError: for another ``settle_on``.
    """
    if settle_on not in ("generated", "masked"):
        raise ValueError(f"settle_on={settle_on!r} must be 'generated' or 'masked'")

    def update(prediction: Prediction, state: DecodeState) -> DecodeState:
        open_ = state.masked & state.editable
        unsure = open_ & (prediction.prob < state.settings.accept_threshold[:, None, None])
        run = open_ & (jnp.cumsum(unsure, -1) == 0)
        leftmost = open_ & (jnp.cumsum(open_, -1) == 1) & may_force(state)[..., None]
        take = jnp.where(run.any(-1, keepdims=True), run, leftmost)
        write = take | (state.editable & ~state.masked)
        changed = (write & (prediction.token != state.tokens)) | take
        judged = state.editable if settle_on == "generated" else open_
        settled = (~judged | (prediction.prob >= state.settings.settle_threshold[:, None, None])).all(-1)
        state = state.fill(write, prediction.token, prediction.prob)
        done = settled | ~changed.any(-1) | (state.steps >= state.tokens.shape[-1])
        return state.replace(hold=state.hold | (state.active & (state.masked.any(-1) | ~done)))

    return stateless(update)
