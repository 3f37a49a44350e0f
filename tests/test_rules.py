"""The decoding rules on blocks small enough to check in one's head. None stands for a masked position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import block_of, held, play, script, shown, update

from diffulex_jax import Rule, chain, stateless
from diffulex_jax.rules import edit, remask, soft_parallel, threshold, token_merge
from diffulex_jax.strategies import dmax, llada2, llada2_edit
from pallas_kernels.token_merge import MergeSpec, merge


_ = None
# One rule, one compilation of the loop around it.
LLADA2, EDIT, DMAX = llada2(), llada2_edit(), dmax()


# threshold: LLaDA2.0


def test_threshold_fills_what_is_above_it():
    state = block_of(threshold(), [_, _, _, _], accept_threshold=0.9)
    assert shown(update(threshold(), state, [1, 2, 3, 4], [0.95, 0.2, 0.91, 0.3])) == [1, _, 3, _]


def test_threshold_itself_is_not_above():
    state = block_of(threshold(), [_, _], accept_threshold=0.5)
    assert shown(update(threshold(), state, [1, 2], [0.5, 0.75])) == [_, 2]


def test_threshold_fills_the_best_where_none_is_above():
    state = block_of(threshold(), [_, _, _], accept_threshold=0.9)
    assert shown(update(threshold(), state, [1, 2, 3], [0.1, 0.3, 0.2])) == [_, 2, _]


def test_threshold_ties_go_to_the_lower_position():
    state = block_of(threshold(), [_, _, _], accept_threshold=0.9)
    assert shown(update(threshold(), state, [1, 2, 3], [0.1, 0.3, 0.3])) == [_, 2, _]


@pytest.mark.parametrize(
    ("least", "probs", "want"),
    [
        (2, [0.2, 0.5, 0.4, 0.1], [_, 2, 3, _]),  # none above: the best two
        (2, [0.2, 0.95, 0.4, 0.1], [_, 2, 3, _]),  # one above is too few: the best two
        (2, [0.95, 0.95, 0.92, 0.1], [1, 2, 3, _]),  # three above are enough: all of them
        (9, [0.2, 0.5, 0.4, 0.1], [1, 2, 3, 4]),  # no more than there are
    ],
)
def test_num_to_transfer(least, probs, want):
    state = block_of(threshold(), [_, _, _, _], accept_threshold=0.9, num_to_transfer=least)
    assert shown(update(threshold(), state, [1, 2, 3, 4], probs)) == want


def test_threshold_counts_masks_only():
    """A sure prediction for a filled position is no reason to leave the masks alone."""
    state = block_of(threshold(), [7, _, _], accept_threshold=0.9)
    assert shown(update(threshold(), state, [1, 2, 3], [0.99, 0.2, 0.3])) == [7, _, 3]


def test_threshold_keeps_what_it_filled():
    state = block_of(threshold(), [7, _], accept_threshold=0.9)
    state = update(threshold(), state, [1, 2], [0.99, 0.95])
    assert shown(state) == [7, 2]
    assert not held(state)
    np.testing.assert_allclose(state.confidence[0, 0], [0, 0.95])


# edit: LLaDA2.1


@pytest.mark.parametrize(("above", "want"), [(0.5, [1, 6, 7]), (0.0, [1, 2, 3])])
def test_edit_replaces_what_the_model_doubts(above, want):
    """At threshold 0 (speed mode) every disagreement is applied; a probability at the threshold is not above it."""
    state = block_of(edit(), [5, 6, 7], edit_threshold=above)
    assert shown(update(edit(), state, [1, 2, 3], [0.75, 0.5, 0.25])) == want


def test_edit_never_touches_the_prompt():
    state = block_of(llada2_edit(), [5, 6, 7, _], frozen=2, edit_threshold=0.0, accept_threshold=0.0)
    assert shown(update(llada2_edit(), state, [1, 2, 3, 4], [0.9, 0.9, 0.9, 0.9])) == [5, 6, 3, 4]


def test_edit_and_threshold_write_in_the_same_step():
    state = block_of(llada2_edit(), [5, _, _], accept_threshold=0.7, edit_threshold=0.5)
    state = update(llada2_edit(), state, [1, 2, 3], [0.6, 0.8, 0.6])
    assert shown(state) == [1, 2, _]


def test_edit_holds_a_block_until_a_step_that_began_without_masks_changes_nothing():
    rule = llada2_edit()
    state = block_of(rule, [5, _], accept_threshold=0.5, edit_threshold=0.5)
    state = update(rule, state, [5, 6], [0.9, 0.9])
    assert (shown(state), held(state)) == ([5, 6], True)  # it began with a mask
    state = update(rule, state, [7, 6], [0.9, 0.9])
    assert (shown(state), held(state)) == ([7, 6], True)  # it changed a token
    state = update(rule, state, [7, 8], [0.9, 0.4])
    assert (shown(state), held(state)) == ([7, 6], False)


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_edit_lets_go_after_max_post_edit_steps(budget):
    """A model that never makes up its mind: one step fills the mask, ``budget`` more may edit."""
    rule = llada2_edit()
    state = block_of(rule, [_], accept_threshold=0.5, edit_threshold=0.0, max_post_edit_steps=budget)
    for step in range(budget):
        state = update(rule, state, [step], [0.9])
        assert held(state)
    state = update(rule, state, [budget], [0.9])
    assert (shown(state), held(state)) == ([budget], False)


def test_the_post_edit_budget_is_counted_in_forwards():
    """LLaDA2.1 runs no forward past its budget: 1 to fill both masks, 2 to edit, and the third edit never happens."""
    say = script([7, 7], *[([0, 0, t, t], [0.95] * 4) for t in (1, 2, 3, 4)], max_tokens=2, max_post_edit_steps=2)
    (one,), _state = play(EDIT, say, block=2, pages=2, steps=8)
    assert (one.tokens, one.nfe, one.revised) == ([3, 3], 3, 4)


# soft_parallel: DMax


def test_prefix_rule():
    """Left to right up to the first unsure mask (position 3); the filled position in between is passed over."""
    state = block_of(soft_parallel(), [_, 7, _, _, _], accept_threshold=0.5)
    state = update(soft_parallel(), state, [1, 7, 3, 4, 5], [0.9, 0.9, 0.6, 0.4, 0.99])
    assert shown(state) == [1, 7, 3, _, _]


def test_prefix_rule_accepts_at_the_threshold():
    state = block_of(soft_parallel(), [_, _], accept_threshold=0.5)
    assert shown(update(soft_parallel(), state, [1, 2], [0.5, 0.25])) == [1, _]
    state = block_of(soft_parallel(), [_, _], accept_threshold=0.5)
    assert shown(update(soft_parallel(), state, [1, 2], [0.5, 0.5])) == [1, 2]


def test_prefix_rule_takes_the_leftmost_where_it_is_unsure():
    state = block_of(soft_parallel(), [7, _, _], accept_threshold=0.5)
    assert shown(update(soft_parallel(), state, [7, 2, 3], [0.9, 0.1, 0.9])) == [7, 2, _]


def test_dmax_rewrites_every_generated_token_whatever_the_probability():
    state = block_of(soft_parallel(), [5, 6, _], frozen=1, accept_threshold=0.5)
    assert shown(update(soft_parallel(), state, [1, 2, 3], [0.01, 0.01, 0.9])) == [5, 2, 3]


@pytest.mark.parametrize(
    ("tokens", "probs", "still_open"),
    [
        ([1, 2], [0.9, 0.9], False),  # all sure (at the threshold counts), and the last tokens are written
        ([1, 2], [0.9, 0.8], True),
        ([5, 6], [0.1, 0.1], False),  # nothing changed
    ],
)
def test_dmax_stop(tokens, probs, still_open):
    state = block_of(soft_parallel(), [5, 6], settle_threshold=0.9)
    state = update(soft_parallel(), state, tokens, probs)
    assert shown(state) == tokens
    assert held(state) == still_open


def test_dmax_asks_the_prompt_for_no_confidence():
    state = block_of(soft_parallel(), [5, _], frozen=1, accept_threshold=0.5)
    assert not held(update(soft_parallel(), state, [1, 2], [0.1, 0.95]))


def test_dmax_never_ends_a_block_with_masks_left():
    """All are sure, but one is below the (unusual) acceptance threshold."""
    state = block_of(soft_parallel(), [_, _], accept_threshold=0.97)
    state = update(soft_parallel(), state, [1, 2], [0.98, 0.95])
    assert (shown(state), held(state)) == ([1, _], True)


def test_dmax_gives_a_block_as_many_steps_as_it_has_positions():
    state = block_of(soft_parallel(), [_, _], accept_threshold=0.5)
    state = update(soft_parallel(), state, [1, 1], [0.6, 0.6])
    assert held(state)
    state = update(soft_parallel(), state, [2, 2], [0.6, 0.6])
    assert (shown(state), held(state)) == ([2, 2], False)


@pytest.mark.parametrize(("settle_on", "still_open"), [("generated", True), ("masked", False)])
def test_the_fast_path_takes_filled_tokens_for_certain(settle_on, still_open):
    rule = soft_parallel(settle_on=settle_on)
    state = block_of(rule, [5, _], accept_threshold=0.5)
    assert held(update(rule, state, [1, 2], [0.1, 0.95])) == still_open


def test_settle_on_is_checked():
    with pytest.raises(ValueError, match="settle_on='prompt' must be 'generated' or 'masked'"):
        soft_parallel(settle_on="prompt")


# token_merge: which positions are soft, and what soft means

TABLE = jnp.array([[3.0, 4.0], [4.0, 3.0], [0.0, 2.0]])  # norms 5, 5, 2; the last is the mask's
MASK_ROW = 2


def soft(rule: Rule, state) -> list[bool]:
    return state.merge.soft[0, 0].tolist()


def test_filled_generated_positions_are_soft():
    rule = dmax()
    state = block_of(rule, [5, 6, _, _], frozen=1, accept_threshold=0.5)
    state = update(rule, state, [1, 2, 3, 4], [0.6, 0.6, 0.6, 0.1])
    assert shown(state) == [5, 2, 3, _]
    assert soft(rule, state) == [False, True, True, False]
    assert state.merge.ids[0, 0, :, 0].tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(state.merge.probs[0, 0, :, 0], [0.6, 0.6, 0.6, 0.1])


def test_the_fast_path_softens_new_tokens_only():
    rule = dmax(mode="fast")
    state = block_of(rule, [5, _, _], accept_threshold=0.5)
    assert soft(rule, update(rule, state, [1, 2, 3], [0.6, 0.6, 0.1])) == [False, True, False]


@pytest.mark.parametrize(("commit_soft", "want"), [(False, [False, False]), (True, [True, True])])
def test_a_finished_block_is_committed_hard_unless_asked_otherwise(commit_soft, want):
    rule = chain(soft_parallel(), token_merge(commit_soft=commit_soft))
    state = update(rule, block_of(rule, [5, _], accept_threshold=0.5), [5, 2], [0.95, 0.95])
    assert not held(state)
    assert soft(rule, state) == want


def embedding(ids, probs, *, token=0, soft=True, **spec):
    spec = MergeSpec(top_k=len(ids), **spec)
    return np.asarray(
        merge(
            TABLE,
            jnp.array([token]),
            mask_id=MASK_ROW,
            ids=jnp.array([ids]),
            probs=jnp.array([probs]),
            soft=jnp.array([soft]),
            spec=spec,
        )[0]
    )


def test_hybrid_embedding():
    """Half [3, 4], half the mask [0, 2]: direction [1.5, 3], norm 0.5 * 5 + 0.5 * 2."""
    e = embedding([0], [0.5])
    np.testing.assert_allclose(np.linalg.norm(e), 3.5, rtol=1e-5)
    np.testing.assert_allclose(e[1] / e[0], 2.0, rtol=1e-6)


def test_hybrid_embedding_of_two_candidates():
    """0.5 [3, 4] + 0.25 [4, 3] + 0.25 [0, 2]: the rest of the mass goes to the mask, not back to the candidates."""
    h = np.array([2.5, 3.25])
    e = embedding([0, 1], [0.5, 0.25])
    np.testing.assert_allclose(e / np.linalg.norm(e), h / np.linalg.norm(h), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(e), 0.5 * 5 + 0.25 * 5 + 0.25 * 2, rtol=1e-5)
    np.testing.assert_allclose(embedding([0, 1], [0.5, 0.25], renormalize=False), h, rtol=1e-6)


def test_iter_smooth_embedding():
    np.testing.assert_allclose(embedding([1], [0.5], mode="iter_smooth_topk", weight=0.5), [3 + 0.25 * 4, 4 + 0.25 * 3], rtol=1e-6)


def test_hard_positions_keep_their_embedding():
    np.testing.assert_array_equal(embedding([0], [0.5], token=1, soft=False), [4, 3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "mean"}, "merge mode 'mean' must be 'dmax_topk' or 'iter_smooth_topk'"),
        ({"top_k": 0}, "merge top_k=0 must be at least 1"),
        ({"weight": 0.5}, "merge weight=0.5 is read by mode 'iter_smooth_topk' only"),
        ({"mode": "iter_smooth_topk", "renormalize": False}, "merge renormalize=False is read by mode 'dmax_topk' only"),
        ({"mode": "iter_smooth_topk", "weight": float("nan")}, "merge weight=nan must be positive and finite"),
    ],
)
def test_token_merge_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        token_merge(**settings)


# remask


def test_remask_is_off_by_default():
    state = block_of(remask(), [5, 6])
    assert shown(update(remask(), state, [5, 6], [0.0, 0.0])) == [5, 6]


def test_remask_doubts_the_token_that_stands_there():
    """Position 0 is itself predicted, at 0.4; position 1 is not, and has 0.1 although the prediction has 0.8; position 2 is sure."""
    state = block_of(remask(), [5, 6, 7], remask_threshold=0.3)
    state = update(remask(), state, [5, 1, 7], [0.4, 0.8, 0.9], current=[0.4, 0.1, 0.9])
    assert (shown(state), held(state)) == ([5, _, 7], True)


def test_remask_leaves_the_threshold_itself_and_the_prompt_alone():
    state = block_of(remask(), [5, 6, 7], frozen=1, remask_threshold=0.25)
    assert shown(update(remask(), state, [5, 6, 7], [0.1, 0.25, 0.2])) == [5, 6, _]


def test_remask_does_not_judge_what_this_step_filled():
    rule = llada2()
    state = block_of(rule, [_, 6], remask_threshold=0.9)
    assert shown(update(rule, state, [1, 6], [0.2, 0.2])) == [1, _]


def test_remask_masks_a_position_so_many_times_at_most():
    rule = chain(threshold(), remask(max_per_position=2))
    state = block_of(rule, [5], remask_threshold=0.9)
    seen = []
    for _step in range(6):
        state = update(rule, state, [5], [0.1])
        seen.append(shown(state)[0])
    assert seen == [_, 5, _, 5, 5, 5]


def test_remask_zero_times_and_never_negative():
    rule = remask(max_per_position=0)
    assert shown(update(rule, block_of(rule, [5], remask_threshold=0.9), [5], [0.1])) == [5]
    with pytest.raises(ValueError, match="max_per_position=-1 must not be negative"):
        remask(max_per_position=-1)


def test_a_masked_position_reads_as_the_mask_again():
    """What the next forward sees there is the mask, not the doubted token."""
    say = script([7], ([0, 1, 2, 3], [0, 0.95, 0.95, 0.2]), ([0, 1, 2, 3], [0, 0.1, 0.95, 0.95]), max_tokens=3, remask_threshold=0.3)
    (one,), state = play(LLADA2, say, block=4, pages=1, steps=2)
    assert one.trace == [[7, 1, 2, _], [7, _, 2, 3]]
    assert state.tokens[0, 0].tolist() == [7, 15, 2, 3]
    assert (one.remasked, one.revised) == (1, 0)


# chain, and rules of one's own


def fills(position: int, token: int) -> Rule:
    """Writes one position, whatever the model says."""
    return stateless(lambda prediction, state: state.fill(jnp.arange(state.tokens.shape[-1]) == position, jnp.int32(token), jnp.float32(1)))


def test_chain_applies_rules_in_order():
    for rule, want in ((chain(fills(0, 1), fills(0, 2)), [2, _]), (chain(fills(0, 2), fills(0, 1)), [1, _])):
        assert shown(update(rule, block_of(rule, [_, _]), [9, 9], [0.5, 0.5])) == want


@pytest.mark.parametrize("rules", [(threshold(), edit()), (soft_parallel(), remask()), (threshold(), edit(), remask(), token_merge())])
def test_chain_equals_one_rule_after_the_other(rules):
    tokens, probs, settings = [1, 2, 3, 4], [0.95, 0.6, 0.2, 0.95], {"remask_threshold": 0.3, "accept_threshold": 0.9}
    chained = update(chain(*rules), block_of(chain(*rules), [5, _, 3, _], **settings), tokens, probs)
    one_by_one = state = block_of(chain(*rules), [5, _, 3, _], **settings)
    # The prediction's `masked` is that of the forward, not what an earlier rule left.
    prediction = capture(one_by_one, tokens, probs)
    state = state.replace(steps=state.steps + 1)
    states = []
    for rule, rule_state in zip(rules, state.rule, strict=True):
        state, new = rule.update(prediction, state, rule_state)
        states.append(new)
    state = state.replace(rule=tuple(states))
    jax.tree.map(np.testing.assert_array_equal, chained, state)
    assert shown(chained) != shown(one_by_one)


def capture(state, tokens, probs):
    """The prediction that ``update`` hands to a rule."""
    seen = []
    spy = Rule(lambda dims: (), lambda prediction, state, rule_state: (seen.append(prediction) or state, rule_state))
    update(spy, state, tokens, probs)
    return seen[0]


def test_chain_takes_rules_only_and_one_merge():
    with pytest.raises(TypeError, match="chain takes rules, got <function threshold"):
        chain(threshold)
    with pytest.raises(ValueError, match="only one rule of a chain may merge tokens, got 2"):
        chain(token_merge(), token_merge())
    assert chain(token_merge(top_k=3), threshold()).merge.top_k == 3


def counting() -> Rule:
    """Fills one mask a step, and counts its steps by block (``[S, K]``) and by row (``[S]``)."""

    def update(prediction, state, counts):
        block, row = counts
        state, _none = threshold().update(prediction, state, ())
        return state, (block + state.active, row + 1)

    return Rule(lambda dims: (jnp.zeros((dims.slots, dims.window), jnp.int32), jnp.zeros(dims.slots, jnp.int32)), update)


@pytest.mark.parametrize(("window", "by_block"), [(1, [[1]]), (2, [[1, 0]])])
def test_rule_state_of_blocks_moves_with_the_window(window, by_block):
    """Blocks of 2: two steps fill the first, the third step is the second block's first."""
    say = script([7, 7], ([1] * 8, [0.5] * 8), max_tokens=6, add_block_threshold=1.0)
    _played, state = play(counting(), say, block=2, pages=4, window=window, steps=3)
    block, row = state.rule
    assert block.tolist() == by_block
    assert row.tolist() == [3]
    assert state.start.tolist() == [4]


def test_dmax_has_two_modes():
    with pytest.raises(ValueError, match="dmax mode 'slow' must be 'reference' or 'fast'"):
        dmax(mode="slow")
