"""Objectives: which tokens are hidden, what stands in their place, which count, and who sees whom."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffulex_jax.training import layout, objective
from diffulex_jax.training.layout import Batch


ROWS, BLOCK, LENGTH, VOCAB, MASK = 6, 4, 48, 20, 19
MODEL = types.SimpleNamespace(spec=types.SimpleNamespace(block_size=BLOCK, mask_id=MASK, vocab_size=VOCAB))
KEY = jax.random.key(3)


@pytest.fixture
def seen(monkeypatch):
    """The forwards of an objective, by a model that says of a token what is fixed for its place: notes what each was given."""
    calls = []
    z = np.random.default_rng(1).normal(size=(ROWS, LENGTH, VOCAB)).astype(np.float32) * 2
    z[..., MASK] = -np.inf

    def predict(params, model, noisy, clean, *, first=None, balance=0.0):
        calls.append(types.SimpleNamespace(noisy=np.asarray(noisy), clean=np.asarray(clean), first=first, balance=balance))
        return jnp.asarray(z)

    monkeypatch.setattr(objective, "predict", predict)
    calls.append(z)
    return calls


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    start = rng.integers(1, 9, ROWS)
    end = start + rng.integers(1, 12, ROWS)
    return Batch(jnp.array(rng.integers(0, 19, (ROWS, LENGTH)), jnp.int32), jnp.array(start), jnp.array(end))


def response(batch):
    return np.array([[s <= i < e + 32 for i in range(LENGTH)] for s, e in zip(batch.start, batch.end, strict=True)])


def mean(z, labels, where):
    """Loss and accuracy, position by position."""
    losses, right = [], []
    for r, i in np.argwhere(where):
        row = z[r, i].astype(np.float64)
        losses.append(np.log(np.exp(row).sum()) - row[labels[r, i]])
        right.append(row.argmax() == labels[r, i])
    return pytest.approx((np.mean(losses), np.mean(right)), rel=1e-5)


def draws(count):
    return jax.random.split(KEY, count)


@pytest.mark.parametrize(("noise", "all_count"), [((0.0, 1.0), False), ((0.75, 0.75), True)])
def test_masked_hides_a_share_of_each_block(seen, batch, noise, all_count):
    score = objective.masked(None, MODEL, batch, KEY, noise=noise, all_count=all_count, balance=0.5)
    block_key, token_key = draws(2)
    ratio = noise[1] - (noise[1] - noise[0]) * np.asarray(jax.random.uniform(block_key, (ROWS, LENGTH // BLOCK)))
    hidden = response(batch) & (np.asarray(jax.random.uniform(token_key, (ROWS, LENGTH))) < ratio.repeat(BLOCK, 1))
    z, (call,) = seen[0], seen[1:]
    np.testing.assert_array_equal(call.noisy, np.where(hidden, MASK, batch.tokens))
    np.testing.assert_array_equal(call.clean, batch.tokens)
    assert call.balance == 0.5
    assert 0 < hidden.sum() < response(batch).sum()
    assert score == mean(z, np.asarray(batch.tokens), response(batch) if all_count else hidden)


def hidden_by_row(batch, noise):
    ratio_key, token_key, _ = draws(3)
    ratio = jax.random.uniform(ratio_key, (ROWS, 1), minval=noise[0], maxval=noise[1])
    return response(batch) & np.asarray(jax.random.uniform(token_key, (ROWS, LENGTH)) < ratio)


def test_uniform_puts_any_token_but_the_mask_and_counts_the_whole_response(seen, batch):
    score = objective.uniform(None, MODEL, batch, KEY, noise=(0.5, 0.9))
    hidden, z, (call,) = hidden_by_row(batch, (0.5, 0.9)), seen[0], seen[1:]
    np.testing.assert_array_equal(call.noisy[~hidden], np.asarray(batch.tokens)[~hidden])
    assert set(call.noisy[hidden]) <= set(range(VOCAB)) - {MASK}
    assert len(set(call.noisy[hidden])) > 10
    assert score == mean(z, np.asarray(batch.tokens), response(batch))


@pytest.mark.parametrize("some_stay", [True, False])
def test_on_policy_repairs_the_models_own_draft(seen, batch, some_stay):
    score = objective.on_policy(None, MODEL, batch, KEY, noise=(0.6, 1.2), some_stay=some_stay)
    hidden, z, (draft, repair) = hidden_by_row(batch, (0.6, 1.2)), seen[0], seen[1:]
    filled = hidden.copy()
    if some_stay:
        sure = np.asarray(jax.nn.softmax(z).max(-1))
        filled &= sure >= np.asarray(jax.random.uniform(draws(3)[2], (ROWS, 1), minval=-1.0))
        assert 0 < filled.sum() < hidden.sum()
    masked = np.where(hidden, MASK, batch.tokens)
    np.testing.assert_array_equal(draft.noisy, masked)
    np.testing.assert_array_equal(repair.noisy, np.where(filled, z.argmax(-1), masked))
    assert score == mean(z, np.asarray(batch.tokens), response(batch))


@pytest.mark.parametrize("drafts", [True, False])
def test_multi_block_hides_by_groups_that_see_each_other(seen, batch, drafts):
    score = objective.multi_block(None, MODEL, batch, KEY, most=3, noise=(0.1, 0.9), margin=0.0, drafts=drafts)
    group_key, ratio_key, token_key = draws(3)
    first = objective.noise_groups(group_key, ROWS, LENGTH // BLOCK, most=3)
    ratio = np.asarray(objective.chain_uniform(ratio_key, first, (0.1, 0.9), 0.0))
    hidden = response(batch) & (np.asarray(jax.random.uniform(token_key, (ROWS, LENGTH))) < ratio.repeat(BLOCK, 1))
    z, calls = seen[0], seen[1:]
    masked = np.where(hidden, MASK, batch.tokens)
    assert len(calls) == 1 + drafts
    for call, noisy in zip(calls, [masked, np.where(hidden, z.argmax(-1), masked)], strict=False):
        np.testing.assert_array_equal(call.noisy, noisy)
        np.testing.assert_array_equal(call.first, first)
    assert score == mean(z, np.asarray(batch.tokens), response(batch) if drafts else hidden)


# MultiTF's groups and noise.


groups = jax.jit(objective.noise_groups, static_argnums=(1, 2), static_argnames=("most", "at_random"))


def sizes_of(first):
    """Blocks of each group, in order, of each row."""
    return [np.unique(row, return_counts=True)[1].tolist() for row in np.asarray(first)]


def test_groups_are_all_sizes_at_all_shifts():
    """Of 7 blocks and groups of up to 3: shifts of 0 and 1 for pairs, 0 to 2 for threes."""
    found = {tuple(sizes) for sizes in sizes_of(groups(KEY, 300, 7, most=3))}
    assert found == {(2, 2, 2, 1), (1, 2, 2, 2), (3, 3, 1), (1, 3, 3), (2, 3, 2)}


def test_groups_at_random_are_of_sizes_of_their_own():
    rows = sizes_of(groups(KEY, 200, 12, most=4, at_random=1.0))
    assert {size for sizes in rows for size in sizes[:-1]} == {2, 3, 4}
    assert sum(len(set(sizes[:-1])) > 1 for sizes in rows) > 100
    half = sizes_of(groups(KEY, 200, 12, most=2, at_random=0.5))
    assert {tuple(sizes) for sizes in half} == {(2,) * 6, (1, *(2,) * 5, 1)}


def test_a_group_has_at_least_two_blocks():
    with pytest.raises(ValueError, match="most=1: a group"):
        objective.noise_groups(KEY, 1, 4, most=1)


def test_noise_rises_within_a_group_between_its_bounds():
    first = groups(KEY, 400, 12, most=4)
    ratio, begins = np.asarray(objective.chain_uniform(KEY, first, (0.2, 0.8), 0.1)), np.asarray(first) == np.arange(12)
    assert (ratio >= 0.2).all() and (ratio <= 0.8 - 0.1 * 0.6 + 1e-6).all()
    assert (np.diff(ratio, axis=1) >= 0)[~begins[:, 1:]].all()
    assert (np.diff(ratio, axis=1) < 0)[begins[:, 1:]].mean() > 0.6  # another group begins anew
    # E floor = (low + high) / 2, and half of what is left with every block.
    high = 0.74
    for number, expected in ((0, high - (high - 0.2) / 4), (1, high - (high - 0.2) / 8)):
        of = np.arange(12) - np.asarray(first) == number
        assert ratio[of].mean() == pytest.approx(expected, abs=0.02)


# Who sees whom.


def test_attention_mask_of_two_blocks_of_one_token():
    # Layout: noisy 0, noisy 1, clean 0, clean 1.
    expected = [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(layout.attention_mask(2, 1), np.array(expected, bool))


def test_attention_mask_of_groups():
    """Query by query: blocks 0 | 1 2 | 3 of two tokens, as the definition says it."""
    first = np.array([[0, 1, 1, 3], [0, 0, 2, 2]])
    found = np.asarray(layout.attention_mask(8, 2, jnp.array(first)))
    for row, groups in enumerate(first):
        for q, k in np.ndindex(16, 16):
            query, key = q % 8 // 2, k % 8 // 2
            if q < 8 and k < 8:
                sees = groups[query] == groups[key] and key <= query
            elif q < 8:
                sees = key < groups[query]
            else:
                sees = k >= 8 and key <= query
            assert found[row, q, k] == sees


def test_the_response_is_scored_up_to_32_end_of_sequence_tokens():
    batch = Batch(jnp.zeros((1, 64), jnp.int32), jnp.array([5]), jnp.array([9]))
    assert np.flatnonzero(layout.scored(batch)[0]).tolist() == list(range(5, 9 + 32))


def test_settings_come_with_a_partial(seen, batch):
    whole = functools.partial(objective.masked, noise=(1.0, 1.0))
    whole(None, MODEL, batch, KEY)
    np.testing.assert_array_equal(seen[1].noisy, np.where(response(batch), MASK, batch.tokens))
