"""Filling masks as long as their entropies add up to little (SDAR as JetEngine decodes it)."""

from __future__ import annotations

import jax.numpy as jnp

from diffulex_jax.rules.base import Rule, stateless
from diffulex_jax.rules.blocks import may_force
from diffulex_jax.state import DecodeState, Prediction
from pallas_kernels.remask import decision


def entropy_bounded() -> Rule:
    """Fills a block's masks in order of entropy, the surest first, while their entropies add up to less than ``entropy_bound``.

    Ties go to the lower position. At least one mask is filled; in a look-ahead block only once its predecessor is semi-complete.
    The bound limits how much masks that are filled at once can depend on each other (EB-Sampler, arXiv 2505.24857); the form is
    JetEngine's.
    """

    def update(prediction: Prediction, state: DecodeState) -> DecodeState:
        assert prediction.entropy is not None, "the rule asks for it"
        open_ = state.masked & state.editable
        entropy = jnp.where(open_, prediction.entropy, jnp.inf)
        rank = decision.confidence_rank(-entropy)
        no_later = rank[..., None, :] <= rank[..., :, None]
        total = jnp.where(no_later, entropy[..., None, :], 0.0).sum(-1)
        below = total < state.settings.entropy_bound[:, None, None]
        first = (rank == 0) & may_force(state)[..., None]
        return state.fill(open_ & (below | first), prediction.token, prediction.prob)

    return stateless(update, entropy=True)
