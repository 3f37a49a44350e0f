"""LLaDA2.2's editing: positions deleted and inserted, in blocks one can follow by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import MASK, block_of, held, shown

from diffulex_jax.rules import levenshtein
from diffulex_jax.state import Prediction


_ = None
DELETE, SPLIT = 13, 12
RULE = levenshtein(delete_id=DELETE, split_id=SPLIT)
OTHERS = (DELETE, 1, 2)  # candidates after the first: what stands in for a special token is 1


@jax.jit
def _update(token, prob, state):
    ids = jnp.concatenate([token[..., None], jnp.broadcast_to(jnp.array(OTHERS), (*token.shape, 3))], -1)
    probs = jnp.concatenate([prob[..., None], jnp.broadcast_to(jnp.array([0.3, 0.2, 0.1]), (*token.shape, 3))], -1)
    prediction = Prediction(token=token, prob=prob, current_prob=prob, top_ids=ids, top_probs=probs, masked=state.masked)
    state = state.replace(steps=state.steps + state.active, hold=jnp.zeros_like(state.hold))
    state, kept = RULE.update(prediction, state, state.rule)
    return state.replace(rule=kept, tokens=jnp.where(state.masked, MASK, state.tokens))


def step(state, tokens, probs=0.9):
    probs = [probs] * len(tokens) if isinstance(probs, float) else probs
    return _update(jnp.array([[tokens]], jnp.int32), jnp.array([[probs]], jnp.float32), state)


def block(tokens, *, frozen=0, **settings):
    return block_of(RULE, tokens, frozen=frozen, **({"accept_threshold": 0.5, "edit_threshold": 0.5} | settings))


def test_it_fills_and_revises_as_llada2_edit_does():
    assert shown(step(block([5, _, _, 8]), [6, 7, 9, 8], [0.9, 0.9, 0.4, 0.9])) == [6, 7, _, 8]


def test_delete_drops_a_position_and_what_follows_moves_up():
    state = step(block([5, 6, 7, 8]), [5, DELETE, 7, 8])
    assert shown(state) == [5, 7, 8, _]
    assert held(state)


def test_split_opens_a_mask_before_the_token_and_the_block_keeps_its_length():
    assert shown(step(block([5, 6, 7, 8]), [5, SPLIT, 7, 8])) == [5, _, 6, 7]


def test_both_at_once_leave_the_length_as_it_was():
    assert shown(step(block([5, 6, 7, 8]), [DELETE, 6, SPLIT, 8])) == [6, _, 7, 8]


def test_a_mask_can_be_deleted_and_split():
    assert shown(step(block([5, _, 7, 8]), [5, DELETE, 7, 8])) == [5, 7, 8, _]
    assert shown(step(block([5, _, 7, 8]), [5, SPLIT, 7, 8])) == [5, _, _, 7]


def test_an_unsure_edit_is_not_made():
    assert shown(step(block([5, 6, 7, 8]), [5, DELETE, SPLIT, 9], [0.9, 0.5, 0.4, 0.5])) == [5, 6, 7, 8]


def test_confidence_and_step_maps_move_with_their_tokens():
    state = block([5, 6, 7, 8])
    state = state.replace(first_step=jnp.array([[[1, 2, 3, 4]]]), confidence=jnp.array([[[0.1, 0.2, 0.3, 0.4]]]))
    state = step(state, [5, DELETE, 7, 8])
    assert state.first_step[0, 0].tolist() == [1, 3, 4, 0]
    np.testing.assert_allclose(state.confidence[0, 0], [0.1, 0.3, 0.4, 0])


def test_fixed_positions_neither_go_nor_move():
    """Prompt first, and a pinned token in the middle: in front of it the best ordinary token is written instead."""
    state = block([5, 6, _, _], frozen=2)
    assert shown(step(state, [DELETE, SPLIT, DELETE, 9])) == [5, 6, 9, _]
    pinned = block([5, 6, 7, 8], edit_threshold=0.1).replace(frozen=jnp.array([[[False, False, True, False]]]))
    assert shown(step(pinned, [DELETE, 6, DELETE, 8])) == [1, 6, 7, 8]


def test_as_many_masks_as_edits_brought_in_are_filled_in_the_next_step_whatever_their_probability():
    state = step(block([5, 6, 7, 8]), [DELETE, DELETE, 7, 8])
    assert shown(state) == [7, 8, _, _]
    assert shown(step(state, [7, 8, 3, 4], 0.1)) == [7, 8, 3, 4]


def test_one_original_mask_a_step_at_the_least():
    assert shown(step(block([5, _, _, _]), [5, 6, 7, 8], [0.9, 0.1, 0.3, 0.2])) == [5, _, 7, _]


def test_a_block_ends_after_a_step_without_masks_that_changes_nothing():
    state = step(block([5, _]), [5, 6])
    assert held(state)
    state = step(state, [5, 6])
    assert (shown(state), held(state)) == ([5, 6], False)


@pytest.mark.parametrize("budget", [1, 4])
def test_the_last_step_fills_all_masks_and_writes_no_special_token(budget):
    """A model that deletes for ever: ``budget`` steps may, and the last of them writes what is ordinary."""
    state = block([5, 6], edit_threshold=0.1, max_post_edit_steps=budget)
    for i in range(budget - 1):
        state = step(state, [DELETE, DELETE] if i % 2 == 0 else [5, 6])
        assert held(state)
    state = step(state, [DELETE, DELETE])
    assert (shown(state), held(state)) == ([1, 1], False)


def test_masks_that_never_go_end_the_block_after_three_times_its_length():
    state = block([_, _], accept_threshold=2.0, max_post_edit_steps=99)
    for i in range(6):
        assert i == 0 or held(state)
        state = step(state, [SPLIT, SPLIT])  # every step opens as many masks as it fills
    assert (shown(state), held(state)) == ([1, 1], False)


def test_going_round_in_a_circle_takes_the_second_choice_at_the_least_confident_change():
    state = block([5, 6])
    state = step(state, [7, 8])
    state = step(state, [5, 6])
    assert shown(state) == [5, 6]
    state = step(state, [7, 8], [0.9, 0.6])  # as it was after the first step
    assert shown(state) == [7, 1]


def test_ids_are_checked():
    with pytest.raises(ValueError, match="delete_id=3 and split_id=3"):
        levenshtein(delete_id=3, split_id=3)
