"""Filling a block sub-block by sub-block (Fast-dLLM v2)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from diffulex_jax.rules.base import Rule
from diffulex_jax.state import DecodeState, Prediction


def in_sub_blocks(rule: Rule) -> Rule:
    """Lets ``rule`` fill only the masks of the first sub-block that has any; every position is predicted all the same.

    Sub-blocks are runs of ``sub_block`` positions from the start of a block on; where that is 0 there is one, the whole block.
    Fast-dLLM v2's small blocks (arXiv 2509.26328).
    """

    def update(prediction: Prediction, state: DecodeState, rule_state: Any) -> tuple[DecodeState, Any]:
        given, block = state.frozen, state.tokens.shape[-1]
        size = jnp.where(state.settings.sub_block > 0, state.settings.sub_block, block)
        number = jnp.arange(block) // size[:, None, None]
        current = jnp.where(state.masked & state.editable, number, block).min(-1, keepdims=True)
        later = state.masked & (number > current)
        state, rule_state = rule.update(prediction, state.replace(frozen=given | later), rule_state)
        return state.replace(frozen=given), rule_state

    return rule._replace(update=update)
