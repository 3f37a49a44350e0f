"""The step around the rules, played by scripts: when a row ends, and with what; blocks that look ahead."""

from __future__ import annotations

import pytest
from scripted import EOS, play, script

from diffulex_jax import Rule, chain, stateless
from diffulex_jax.rules import threshold, token_merge
from diffulex_jax.strategies import dmax, llada2, llada2_edit


_ = None
# One rule, one compilation of the loop around it.
LLADA2, EDIT, DMAX = llada2(), llada2_edit(), dmax()


# The step around the rules: when a row ends, and with what


def test_a_row_ends_when_its_last_token_is_filled():
    """5 tokens over blocks of 2: the last position of the last block is never waited for."""
    say = script([7], ([0, 1, 2, 3, 4, 5, 6, 6], [0.95] * 6 + [0.1] * 2), max_tokens=5)
    (one,), state = play(LLADA2, say, block=2, pages=4, steps=8)
    assert (one.tokens, one.reason, one.nfe) == ([1, 2, 3, 4, 5], "length", 3)


def test_eos_ends_a_row_once_everything_before_it_is_filled():
    low = ([0, 1, 2, EOS], [0, 0.5, 0.2, 0.95])
    say = script([7], low, max_tokens=3)
    (one,), _state = play(LLADA2, say, block=4, pages=1, steps=8)
    assert one.trace == [[7, _, _, EOS], [7, 1, _, EOS], [7, 1, 2, EOS]]
    assert (one.tokens, one.reason, one.nfe) == ([1, 2], "stop", 3)


def test_eos_waits_for_edits_before_it():
    """The block is held: the token before EOS may still change, and does."""
    say = script([7], ([0, 1, EOS, 3], [0.95] * 4), ([0, 2, EOS, 3], [0.95] * 4), max_tokens=3)
    (one,), _state = play(EDIT, say, block=4, pages=1, steps=8)
    assert (one.tokens, one.reason, one.nfe) == ([2], "stop", 3)


def test_ignore_eos_goes_on():
    say = script([7], ([0, 1, EOS, 3], [0.95] * 4), max_tokens=3, ignore_eos=True)
    (one,), _state = play(LLADA2, say, block=4, pages=1, steps=8)
    assert (one.tokens, one.reason) == ([1, EOS, 3], "length")


def test_eos_in_the_prompt_or_past_the_limit_ends_nothing():
    say = script([EOS], ([0, 1, 2, EOS], [0, 0.95, 0.95, 0.95]), max_tokens=2)
    (one,), _state = play(LLADA2, say, block=4, pages=1, steps=8)
    assert (one.tokens, one.reason) == ([1, 2], "length")


def test_max_nfe_returns_the_contiguous_prefix():
    """Two forwards fill positions 1 and 3; only the first follows the prompt without a gap."""
    say = script([7], ([0, 1, 2, 3], [0, 0.5, 0.1, 0.6]), max_tokens=3, max_nfe=2)
    (one,), _state = play(LLADA2, say, block=4, pages=1, steps=8)
    assert one.trace[-1] == [7, 1, _, 3]
    assert (one.tokens, one.reason, one.nfe) == ([1], "max_nfe", 2)


def test_max_nfe_cuts_before_an_eos():
    say = script([7], ([0, 1, EOS, 3, 4, 5], [0, 0.9, 0.8, 0.7, 0.6, 0.5]), max_tokens=5, max_nfe=1, accept_threshold=0.75)
    held_open = Rule(lambda dims: (), lambda prediction, state, _s: (state.replace(hold=state.active), ()))
    (one,), _state = play(chain(threshold(), held_open), say, block=6, pages=1, steps=8)
    assert one.trace[-1] == [7, 1, EOS, _, _, _]
    assert (one.tokens, one.reason) == ([1], "max_nfe")


def test_a_block_no_rule_ever_fills_ends_all_the_same():
    """4 forwards a position and the post-edit budget; then what the model says is written."""
    idle = stateless(lambda prediction, state: state)
    say = script([7, 7], ([0, 0, 1, 2], [0.1] * 4), max_tokens=2, max_post_edit_steps=3)
    (one,), _state = play(idle, say, block=2, pages=2, steps=20)
    assert (one.tokens, one.reason, one.nfe) == ([1, 2], "length", 4 * 2 + 3)


def test_a_block_held_for_ever_ends_all_the_same():
    stubborn = chain(threshold(), Rule(lambda dims: (), lambda prediction, state, _s: (state.replace(hold=state.active), ())))
    say = script([7, 7], ([0, 0, 1, 2], [0.95] * 4), max_tokens=2, max_post_edit_steps=0)
    (one,), _state = play(stubborn, say, block=2, pages=2, steps=20)
    assert (one.tokens, one.reason, one.nfe) == ([1, 2], "length", 8)


def test_a_block_ended_by_force_is_committed_hard():
    """Its tokens were still soft when the budget ran out."""
    stubborn = chain(threshold(), stateless(lambda prediction, state: state.replace(hold=state.active)), token_merge())
    say = script([7, 7], ([0, 0, 1, 2, 3, 4], [0.95] * 6), max_tokens=4, max_post_edit_steps=0)
    for steps, still_open in ((7, True), (8, False)):
        _played, state = play(stubborn, say, block=2, pages=3, steps=steps)
        assert state.merge.soft.tolist() == [[[still_open, still_open]]]
        assert state.hold.tolist() == [[still_open]]


def test_remask_ends_with_a_model_that_doubts_everything():
    """Each step fills one position and doubts the other, until both have been masked again twice."""
    say = script([7, 7], ([0, 0, 1, 2], [0.1] * 4), max_tokens=2, remask_threshold=1.0)
    (one,), _state = play(LLADA2, say, block=2, pages=2, steps=40)
    assert one.trace == [[1, _], [_, 2], [1, _], [_, 2], [1, _], [1, 2]]
    assert (one.tokens, one.reason, one.remasked) == ([1, 2], "length", 4)


def test_rows_that_have_ended_stay_as_they_are():
    """The first row's edits would go on for ever; its budget is spent long before the second row ends."""
    restless = [([0, 0, t, t], [0.95] * 4) for t in range(8)]
    slow = script([7, 7], ([0, 0, 1, 2], [0.1] * 4), max_tokens=2)
    quick = script([7, 7], *restless, max_tokens=2, edit_threshold=0.0, max_post_edit_steps=1)
    (first, second), _state = play(EDIT, quick, slow, block=2, pages=2, steps=8)
    (alone,), _state = play(EDIT, quick, block=2, pages=2, steps=8)
    assert first == alone
    assert (first.tokens, first.nfe, first.revised) == ([1, 1], 2, 2)
    assert second.nfe > first.nfe


def test_a_batch_does_not_end_a_block_together():
    """DMax's own code waits for all rows; here a sure row spends one forward a block, next to one that takes two."""
    sure = script([7, 7], ([0, 0, 1, 2, 3, 4], [0.95] * 6), max_tokens=4)
    unsure = script([7, 7], ([0, 0, 1, 2, 3, 4], [0.6] * 6), max_tokens=4, accept_threshold=0.5)
    (a, b), _state = play(DMAX, sure, unsure, block=2, pages=3, steps=8)
    assert (a.tokens, a.nfe) == ([1, 2, 3, 4], 2)
    assert (b.tokens, b.nfe) == ([1, 2, 3, 4], 4)


# Look-ahead: a window of two blocks of two


def ahead(probs: list[float], **settings) -> list[list[int | None]]:
    """The window after each of three steps; positions 2..5 are generated, their predictions always the same."""
    say = script([7, 7], ([0, 0, 1, 2, 3, 4], [0, 0, *probs]), max_tokens=4, **settings)
    (one,), _state = play(LLADA2, say, block=2, pages=3, window=2, steps=3)
    return one.trace


def test_look_ahead_starts_when_the_block_has_come_far_enough():
    """Sure of everything in the second block: it is filled the step after the first is half filled, or else after it is full."""
    probs = [0.5, 0.4, 0.95, 0.95]
    assert ahead(probs, add_block_threshold=0.5)[:2] == [[1, _, _, _], [1, 2, 3, 4]]
    assert ahead(probs, add_block_threshold=0.6) == [[1, _, _, _], [1, 2, _, _], [3, 4, _, _]]


def test_a_block_ahead_is_not_forced_before_its_predecessor_is_nearly_done():
    """Sure of nothing: the first block, half filled, gets its second token; the next one a token only if half is enough."""
    probs = [0.5, 0.4, 0.5, 0.4]
    assert ahead(probs, add_block_threshold=0.5, semi_complete_threshold=0.5) == [[1, _, _, _], [1, 2, 3, _], [3, 4, _, _]]
    assert ahead(probs, add_block_threshold=0.5, semi_complete_threshold=0.6) == [[1, _, _, _], [1, 2, _, _], [3, _, _, _]]


@pytest.mark.parametrize(("stability", "want"), [(0.5, [5, 2, 3, 4]), (0.6, [5, 2, _, _])])
def test_look_ahead_waits_for_a_block_whose_tokens_still_change(stability, want):
    """The second step fills the first block and changes one of its two tokens."""
    unsure, sure = [0, 0, 0.5, 0.4, 0.95, 0.95], [0, 0, 0.6, 0.5, 0.95, 0.95]
    steps = ([0, 0, 1, 2, 3, 4], unsure), ([0, 0, 5, 2, 3, 4], sure)
    say = script([7, 7], *steps, max_tokens=4, edit_threshold=0.55, add_block_threshold=1.0, token_stability_threshold=stability)
    (one,), _state = play(EDIT, say, block=2, pages=3, window=2, steps=3)
    assert one.trace == [[1, _, _, _], [5, 2, _, _], want]
