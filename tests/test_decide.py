"""Filling, revising and masking again in one decision is what the three rules make of it one after the other."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import block_of, play, shown, update
from test_properties import BLOCK, BUDGET, PAGES, requests

from diffulex_jax.rules import chain, decide, edit, remask, threshold
from pallas_kernels import remask as kernel
from pallas_kernels.remask import tpu


_ = None
FUSED = {True: decide(), False: decide(edit=False)}
CHAINS = {True: chain(threshold(), edit(), remask()), False: chain(threshold(), remask())}


@pytest.mark.sweep_but("1-True", "2-False")
@pytest.mark.parametrize("edits", [True, False])
@pytest.mark.parametrize("window", [1, 2])
@settings(max_examples=40)
@given(pair=st.tuples(requests(), requests()))
def test_one_decision_is_three_rules(edits, window, pair):
    """Over whole requests, step by step: tokens, masks, confidence, holds and counts, and what the rules keep of each block."""
    options = {"block": BLOCK, "pages": PAGES, "window": window, "steps": PAGES * BUDGET}
    (got, state), (want, expected) = (play(rules[edits], *pair, **options) for rules in (FUSED, CHAINS))
    assert got == want
    post_steps, times = state.rule
    kept = expected.rule[1:] if edits else (np.zeros_like(post_steps), *expected.rule[1:])
    for a, b in zip(
        jax.tree.leaves((state.replace(rule=()), post_steps, times)), jax.tree.leaves((expected.replace(rule=()), *kept)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("edits", [True, False])
def test_the_kernel_decides_the_same(edits, monkeypatch):
    """One step: a mask that is filled, one that is not sure enough, a token that gives way, one that is doubted, one that is given."""
    given = {"accept_threshold": 0.7, "edit_threshold": 0.5, "remask_threshold": 0.3, "frozen": 1}
    args = [_, _, 4, 5, 6], [1, 2, 7, 5, 8], [0.9, 0.4, 0.8, 0.1, 0.2]
    state = block_of(FUSED[edits], [9, *args[0]], **given)
    said, stands = ([9, *args[1]], [1.0, *args[2]]), [1.0, 0.0, 0.0, 0.9, 0.1, 0.9]
    plain = update(FUSED[edits], state, *said, current=stands)
    monkeypatch.setitem(kernel._BACKENDS, "tpu", functools.partial(tpu.decide, interpret=True))
    with kernel.decided_by("tpu"):
        got = update(FUSED[edits], state, *said, current=stands)
    assert shown(plain) == [9, 1, _, 7 if edits else 4, _, 6]
    jax.tree.map(np.testing.assert_array_equal, got, plain)


def test_a_negative_number_of_times_is_refused():
    with pytest.raises(ValueError, match="max_per_position=-1 must not be negative"):
        decide(max_per_position=-1)
