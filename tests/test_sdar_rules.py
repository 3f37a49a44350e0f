"""SDAR's rules on blocks small enough to check in one's head, and on any block against its written definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import MASK, block_of, play, script, shown, update

from diffulex_jax import chain
from diffulex_jax.rules import edit, entropy_bounded, remask, sequential, threshold
from diffulex_jax.rules.blocks import quota
from diffulex_jax.strategies import STRATEGIES
from pallas_kernels.prediction import Sampling, predict


_ = None
LEFTMOST = threshold(fallback="leftmost")


# The quota of a step


@pytest.mark.parametrize(
    ("block", "steps", "want"),
    [
        (4, 4, [1, 1, 1, 1, 1]),
        (4, 2, [2, 2, 2]),
        (4, 1, [4, 4]),
        (8, 3, [3, 3, 2, 2, 2]),  # 8 = 3 + 3 + 2; steps past the third go on with 2
        (8, 5, [2, 2, 2, 1, 1, 1]),
        (4, 0, [3, 3]),  # num_to_transfer
    ],
)
def test_denoising_steps_share_out_a_block(block, steps, want):
    state = block_of(threshold(), [_] * block, denoising_steps=steps, num_to_transfer=3)
    got = [int(quota(state.replace(steps=jnp.full((1, 1), count)))[0, 0]) for count in range(1, len(want) + 1)]
    assert got == want


def test_a_block_is_filled_in_as_many_steps_as_asked_for():
    """Eight masks in three steps: 3, 3 and 2, the most probable first."""
    probs = [0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5]
    state = block_of(threshold(), [_] * 8, accept_threshold=1.0, denoising_steps=3)
    seen = []
    for _step in range(3):
        state = update(threshold(), state, range(1, 9), probs)
        seen.append(shown(state))
    assert seen == [[_, 2, _, 4, _, 6, _, _], [_, 2, _, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]]


# threshold(fallback="leftmost"): JetEngine


@pytest.mark.parametrize(
    ("tokens", "probs", "want"),
    [
        ([_, _, _, _], [0.2, 0.95, 0.95, 0.1], [_, 2, 3, _]),  # two above are enough: those
        ([_, _, _, _], [0.2, 0.1, 0.95, 0.3], [1, 2, _, _]),  # one above is too few: it is dropped, the leftmost two are filled
        ([7, _, 8, _], [0.2, 0.1, 0.95, 0.3], [7, 2, 8, _]),  # two positions from the first mask on, one of them filled already
        ([7, 8, 9, _], [0.2, 0.1, 0.95, 0.3], [7, 8, 9, 4]),
    ],
)
def test_the_leftmost_are_filled_where_too_few_are_sure(tokens, probs, want):
    state = block_of(LEFTMOST, tokens, accept_threshold=0.9, num_to_transfer=2)
    assert shown(update(LEFTMOST, state, [1, 2, 3, 4], probs)) == want


def test_fallback_is_checked():
    with pytest.raises(ValueError, match="fallback='rightmost' must be 'best' or 'leftmost'"):
        threshold(fallback="rightmost")


# sequential


def test_sequential_fills_the_leftmost_masks_whatever_their_probability():
    state = block_of(sequential(), [7, _, 8, _, _], accept_threshold=0.0, num_to_transfer=2)
    assert shown(update(sequential(), state, [1, 2, 3, 4, 5], [0.9, 0.1, 0.9, 0.2, 0.99])) == [7, 2, 8, 4, _]


# entropy_bounded


@pytest.mark.parametrize(
    ("bound", "want"),
    [
        (0.0, [1, _, _, _]),  # nothing is below: one is filled all the same, of equal ones the lower
        (0.5, [1, _, _, _]),  # 0.25 + 0.25 is not below 0.5
        (0.75, [1, 2, _, _]),  # 0.25 + 0.25 is, with 0.5 more it is not
        (1.25, [1, 2, _, 4]),
        (9.0, [1, 2, 3, 4]),
    ],
)
def test_entropies_add_up_to_less_than_the_bound(bound, want):
    state = block_of(entropy_bounded(), [_, _, _, _], entropy_bound=bound)
    assert shown(update(entropy_bounded(), state, [1, 2, 3, 4], [0.5] * 4, entropy=[0.25, 0.25, 1.0, 0.5])) == want


def test_filled_positions_have_no_part_in_the_bound():
    state = block_of(entropy_bounded(), [7, _, _, _], entropy_bound=0.5)
    assert shown(update(entropy_bounded(), state, [1, 2, 3, 4], [0.5] * 4, entropy=[0.1, 1.0, 0.25, 0.1])) == [7, _, 3, 4]


def test_a_chain_asks_for_entropy_where_one_of_its_rules_does():
    assert chain(entropy_bounded(), remask()).entropy
    assert not chain(threshold(), remask()).entropy


# What a forward says


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 0.75), (1.0, 3, 0.7), (0.7, 4, 1.0), (2.0, 20, 0.95)])
def test_draws_follow_the_authors_formula(temperature, top_k, top_p):
    """Chi-square over 20 000 draws: temperature, then top-k, then top-p of what that leaves. Confidence and entropy are before both."""
    z, mask, n = np.array([1.0, 0.5, 0.0, -0.5, 0.8, -1.0, 0.3, 0.9]), 7, 20_000
    p = np.exp(z[:mask] / temperature) / np.exp(z[:mask] / temperature).sum()
    kept = np.argsort(-p)[: top_k or None]
    share = p[kept] / p[kept].sum()
    kept = kept[np.cumsum(share) - share <= top_p]
    expected = np.where(np.isin(np.arange(mask), kept), p, 0) / p[kept].sum()
    row = jnp.ones(n)
    sampling = Sampling(jax.random.split(jax.random.key(3), n), row * temperature, row * top_p, jnp.full(n, top_k))
    logits = jnp.broadcast_to(jnp.asarray(z, jnp.float32), (n, mask + 1))
    assert STRATEGIES["sdar"].confidence == STRATEGIES["sdar_entropy"].confidence == "tempered"
    best = predict(logits, jnp.full(n, mask), forbidden_id=mask, sampling=sampling, tempered=True, entropy=True)
    counts, seen = np.bincount(np.asarray(best.token), minlength=mask), expected > 0
    assert len(counts) == mask and not counts[~seen].any()
    assert ((counts - n * expected)[seen] ** 2 / (n * expected[seen])).sum() < 22.5  # at most 6 degrees: once in a thousand times
    np.testing.assert_allclose(best.prob, p[np.asarray(best.token)], rtol=1e-5)
    np.testing.assert_allclose(best.entropy, -(p * np.log(p)).sum(), rtol=1e-5)


# With what else there is


ALL = pytest.mark.parametrize("rule", [LEFTMOST, sequential(), entropy_bounded()], ids=["leftmost", "sequential", "entropy"])


@ALL
@pytest.mark.parametrize(
    ("semi_complete", "third"),
    [(1.0, [7, 1, 2, 3, _, _, _, _]), (0.75, [7, 1, 2, 3, 4, _, _, _])],  # before the third step 7, 1 and 2 stand there
)
def test_a_look_ahead_block_waits_until_its_predecessor_is_semi_complete(rule, semi_complete, third):
    """Nothing is sure: only what is forced is filled."""
    settings = {"max_tokens": 7, "add_block_threshold": 0.0, "semi_complete_threshold": semi_complete}
    (one,), _state = play(rule, script([7], (range(8), [0.25] * 8), **settings), block=4, pages=2, window=2, steps=8)
    assert one.trace[:3] == [[7, 1, _, _, _, _, _, _], [7, 1, 2, _, _, _, _, _], third]
    assert one.tokens == [1, 2, 3, 4, 5, 6, 7]


@ALL
def test_edit_and_remask_chain_on(rule):
    """The filled token is revised, the doubted one is masked again, and the leftmost or surest mask is filled, in one step."""
    chained = chain(rule, edit(), remask())
    state = block_of(chained, [5, 6, _, _], accept_threshold=0.9, edit_threshold=0.5, remask_threshold=0.25, entropy_bound=0.0)
    state = update(chained, state, [1, 9, 3, 4], [0.75, 0.375, 0.5, 0.25], current=[0.2, 0.125, 0, 0], entropy=[0, 0, 0.5, 0.75])
    assert shown(state) == [1, _, 3, _]


# Any block, against the definitions (JetEngine and the authors' evaluation loop) in plain NumPy


def best(conf: np.ndarray, masked: np.ndarray, n: int) -> np.ndarray:
    take = np.zeros(len(conf), bool)
    take[np.argsort(np.where(masked, -conf, 1.0), kind="stable")[: min(n, masked.sum())]] = True
    return take


def dynamic(conf, entropy, masked, n, limit):
    sure = masked & (conf > limit)
    return sure if sure.sum() >= n else best(conf, masked, n)


def dynamic_leftmost(conf, entropy, masked, n, limit):
    sure = masked & (conf > limit)
    if sure.sum() >= n:
        return sure
    first = int(np.flatnonzero(masked)[0])
    take = np.zeros(len(conf), bool)
    take[first : first + n] = masked[first : first + n]
    return take


def leftmost(conf, entropy, masked, n, limit):
    take = np.zeros(len(conf), bool)
    take[np.flatnonzero(masked)[:n]] = True
    return take


def bounded(conf, entropy, masked, n, limit):
    order = [i for i in np.argsort(entropy, kind="stable") if masked[i]]
    k = int((np.cumsum(entropy[order]) < limit).sum())
    take = np.zeros(len(conf), bool)
    take[order[: max(k, 1)]] = True
    return take


DEFINITIONS = {
    "best": (threshold(), dynamic),
    "leftmost": (LEFTMOST, dynamic_leftmost),
    "sequential": (sequential(), leftmost),
    "entropy": (entropy_bounded(), bounded),
}
BLOCK = 8
eighths = st.integers(0, 8).map(lambda i: i / 8)  # exact in float32, and ties are common


@pytest.mark.parametrize("name", DEFINITIONS)
@given(
    conf=st.lists(eighths, min_size=BLOCK, max_size=BLOCK),
    entropy=st.lists(eighths, min_size=BLOCK, max_size=BLOCK),
    prompt=st.integers(0, BLOCK - 1),
    filled=st.sets(st.integers(0, BLOCK - 1), max_size=BLOCK - 1),
    limit=st.sampled_from([0.0, 0.25, 0.5, 0.875, 1.0, 3.0]),
    steps=st.integers(0, BLOCK),
)
def test_every_step_is_as_defined(name, conf, entropy, prompt, filled, limit, steps):
    """From any state of a block to its end, with a model that says the same at every step."""
    rule, define = DEFINITIONS[name]
    conf, entropy = np.array(conf), np.array(entropy)
    masked = ~np.isin(np.arange(BLOCK), [*range(prompt), *filled])
    state = block_of(
        rule,
        [_ if m else 7 for m in masked],
        frozen=prompt,
        accept_threshold=limit,
        entropy_bound=limit,
        denoising_steps=steps,
        num_to_transfer=2,
    )
    for step in range(BLOCK + 1):
        if not masked.any():
            break
        n = BLOCK // steps + (step < BLOCK % steps) if steps else 2
        masked = masked & ~define(conf, entropy, masked, n, limit)
        state = update(rule, state, [MASK - 1] * BLOCK, conf, entropy=entropy)
        assert state.masked[0, 0].tolist() == masked.tolist()
    assert not masked.any()
