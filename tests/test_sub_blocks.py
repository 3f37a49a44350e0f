"""Sub-blocks: which masks a rule is offered (Fast-dLLM v2)."""

from __future__ import annotations

import pytest
from scripted import block_of, held, shown, update

from diffulex_jax.rules import edit, in_sub_blocks, threshold
from diffulex_jax.rules.base import chain


_ = None
RULE = in_sub_blocks(threshold())


@pytest.mark.parametrize(
    ("tokens", "size", "probs", "want"),
    [
        ([_, _, _, _], 2, [0.1, 0.3, 0.95, 0.95], [_, 2, _, _]),  # what lies behind is not filled, however sure
        ([_, _, _, _], 2, [0.95, 0.95, 0.95, 0.95], [1, 2, _, _]),
        ([7, 8, _, _], 2, [0.1, 0.1, 0.2, 0.3], [7, 8, _, 4]),  # the first two are filled: on to the next two
        ([7, _, _, _], 2, [0.1, 0.2, 0.95, 0.3], [7, 2, _, _]),
        ([_, _, _, _], 0, [0.1, 0.3, 0.95, 0.95], [_, _, 3, 4]),  # the whole block
        ([_, _, _, _], 9, [0.1, 0.3, 0.95, 0.95], [_, _, 3, 4]),
        ([7, 8, 9, _, _], 3, [0.1, 0.1, 0.1, 0.3, 0.2], [7, 8, 9, 4, _]),  # the last one is short
    ],
)
def test_only_the_first_sub_block_with_masks_is_filled(tokens, size, probs, want):
    state = block_of(RULE, tokens, accept_threshold=0.9, sub_block=size)
    assert shown(update(RULE, state, range(1, len(tokens) + 1), probs)) == want


def test_positions_are_as_fixed_afterwards_as_before():
    state = block_of(RULE, [_, _, _, _], accept_threshold=0.9, sub_block=2)
    assert not update(RULE, state, [1, 2, 3, 4], [0.95] * 4).frozen.any()


def test_filled_tokens_are_edited_wherever_they_are():
    rule = in_sub_blocks(chain(threshold(), edit()))
    state = block_of(rule, [7, _, 8, _], accept_threshold=0.9, edit_threshold=0.5, sub_block=2)
    state = update(rule, state, [1, 2, 3, 4], [0.95] * 4)
    assert shown(state) == [1, 2, 3, _]
    assert held(state)
