"""Prediction and decision: the TPU kernels, simulated, against plain jnp; and the decision against the rules it stands for.

19 rows in tiles of 8, 333 tokens in tiles of 128: neither divides.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffulex_jax.request_state import empty_state
from diffulex_jax.rules.blocks import may_force
from diffulex_jax.state import Dims, Prediction
from diffulex_jax.strategies import llada2_edit
from pallas_kernels import remask
from pallas_kernels.remask import gpu, reference, tpu, tpu_decision


ROWS, VOCAB, EMBED, MASK = 19, 333, 16, 332
TILE = (8, 128)


def make(seed=0, *, temperature=(0.0, 0.7, 1.5), filters=False, rows=ROWS, vocab=VOCAB):
    """(hidden, lm_head, current, options): every kind of row, some positions penalised or banned where it changes the best token."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.standard_normal((rows, EMBED)), jnp.float32)
    lm_head = jnp.asarray(rng.standard_normal((vocab, EMBED)), jnp.float32)
    row = np.arange(rows)
    order = np.argsort(-np.asarray(hidden @ lm_head.T), 1)
    banned = np.full((rows, 3), -1)
    banned[row % 5 == 1, :2] = order[row % 5 == 1, :2]
    sampling = remask.Sampling(
        key=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), row),
        temperature=jnp.asarray(rng.choice(temperature, rows), jnp.float32),
        top_p=jnp.asarray(np.where(filters & (row % 3 == 0), 0.5, 1.0), jnp.float32),
        top_k=jnp.asarray(np.where(filters & (row % 4 == 0), 5, 0), jnp.int32),
    )
    options = {
        "forbidden_id": vocab - 1,
        "sampling": sampling,
        "penalized": jnp.asarray(np.where(row % 2 == 0, order[:, 0], -1), jnp.int32),
        "penalty": jnp.full(rows, 3.0, jnp.float32),
        "banned": jnp.asarray(banned, jnp.int32),
    }
    return hidden, lm_head, jnp.asarray(rng.integers(0, vocab, rows), jnp.int32), options


@functools.partial(jax.jit, static_argnames=("function", "interpret", "tile", "forbidden_id", "top_k"))
def call(function, *args, **options):
    return function(*args, **options)


def assert_same(got, want, *, rtol=1e-5):
    for name in remask.Best._fields:
        a, b = getattr(got, name), getattr(want, name)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if a.dtype == jnp.int32:
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("top_k, filters", [(0, False), (1, True), (4, False)])
def test_from_hidden_states(interpret, top_k, filters):
    *args, options = make(filters=filters)
    want = call(reference.predict_from_hidden, *args, top_k=top_k, **options)
    assert len({*np.asarray(want.token).tolist()}) > ROWS // 2
    assert_same(call(tpu.predict_from_hidden, *args, top_k=top_k, tile=TILE, interpret=interpret, **options), want)


@pytest.mark.parametrize("top_k", [1, 7])
def test_from_logits(interpret, top_k):
    hidden, lm_head, current, options = make(1)
    logits = hidden @ lm_head.T
    want = call(reference.predict, logits, current, top_k=top_k, **options)
    assert_same(call(tpu.predict, logits, current, top_k=top_k, tile=TILE, interpret=interpret, **options), want)


def test_greedy_rows_without_options():
    hidden, lm_head, current, options = make(2, temperature=(0.0,))
    options = {name: options[name] for name in ("forbidden_id", "sampling")}
    want = call(reference.predict_from_hidden, hidden, lm_head, current, **options)
    assert_same(call(tpu.predict_from_hidden, hidden, lm_head, current, tile=TILE, interpret=True, **options), want)


@pytest.mark.parametrize(
    "function", [reference.predict_from_hidden, gpu.predict_from_hidden, functools.partial(tpu.predict_from_hidden, interpret=True)]
)
def test_without_sampling_all_rows_are_greedy(function):
    hidden, lm_head, current, options = make(5, temperature=(0.0,))
    want = call(reference.predict_from_hidden, hidden, lm_head, current, **options)
    assert_same(call(function, hidden, lm_head, current, **options | {"sampling": None}), want)


def test_bfloat16_states():
    hidden, lm_head, current, options = make(3, temperature=(0.0,))
    args = hidden.astype(jnp.bfloat16), lm_head.astype(jnp.bfloat16), current
    want = call(reference.predict_from_hidden, *args, top_k=2, **options)
    assert_same(call(tpu.predict_from_hidden, *args, top_k=2, tile=TILE, interpret=True, **options), want, rtol=1e-4)


def test_draws_are_those_of_the_reference_for_every_token():
    # Equal logits leave the choice to the noise alone: 200 draws from 2000 tokens would show a single wrong bit.
    *_, options = make(4, temperature=(1.0,), rows=200, vocab=2000)
    options = {name: options[name] for name in ("forbidden_id", "sampling")}
    logits, current = jnp.zeros((200, 2000)), jnp.zeros(200, jnp.int32)
    got = call(tpu.predict, logits, current, tile=(64, 256), interpret=True, **options)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (2000,)))(options["sampling"].key)
    np.testing.assert_array_equal(got.token, jnp.argmax(noise[:, :-1], 1))
    np.testing.assert_allclose(got.prob, 1 / 1999, rtol=1e-5)


def test_ties_go_to_the_lowest_id(interpret):
    logits = jnp.zeros((3, VOCAB)).at[0, jnp.array([300, 131, 130])].set(5.0).at[1, 7].set(5.0)
    *_, current, options = make(5, temperature=(0.0,), rows=3)
    options = {name: options[name] for name in ("forbidden_id", "sampling")}
    got = call(tpu.predict, logits, current, top_k=4, tile=TILE, interpret=interpret, **options)
    np.testing.assert_array_equal(got.token, [130, 7, 0])
    np.testing.assert_array_equal(got.top_ids, [[130, 131, 300, 0], [7, 0, 1, 2], [0, 1, 2, 3]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 200, VOCAB - 2])
def test_a_row_that_is_not_finite_says_so_and_no_other_row_does(interpret, bad, at):
    hidden, lm_head, current, options = make(6)
    logits = (hidden @ lm_head.T).at[5, at].set(bad)
    options["banned"] = options["banned"].at[5].set(-1)
    got = call(tpu.predict, logits, current, top_k=1, tile=TILE, interpret=interpret, **options)
    np.testing.assert_array_equal(np.isnan(got.prob), np.arange(ROWS) == 5)
    np.testing.assert_array_equal(np.isnan(got.current_prob), np.arange(ROWS) == 5)
    want = call(reference.predict, logits, current, top_k=1, **options)
    assert bool(jnp.isnan(want.prob[5])) and int(want.token[5]) < VOCAB
    assert_same(*(jax.tree.map(lambda a: np.delete(a, 5, 0), best) for best in (got, want)))


def test_unknown_keys_and_too_many_candidates_are_refused():
    hidden, lm_head, current, options = make(7)
    with pytest.raises(ValueError, match="top_k=200.*at most 128"):
        tpu.predict_from_hidden(hidden, lm_head, current, top_k=200, **options)
    other = options["sampling"]._replace(key=jax.random.split(jax.random.key(0, impl="rbg"), ROWS))
    with pytest.raises(ValueError, match="threefry2x32 keys, got rbg"):
        tpu.predict_from_hidden(hidden, lm_head, current, **options | {"sampling": other})


def window(seed, slots=5, blocks=3, block=8):
    """Arguments of ``remask.decide``; probabilities in tenths, so that ties and thresholds are met exactly."""
    rng = np.random.default_rng(seed)
    shape = slots, blocks, block

    def tenths(*shape):
        return jnp.asarray(np.round(rng.random(shape), 1), jnp.float32)

    def integers(high, *shape):
        return jnp.asarray(rng.integers(0, high, shape), jnp.int32)

    def bits(*shape):
        return jnp.asarray(rng.random(shape) < 0.6)

    windows = {"tokens": integers(5, *shape), "masked": bits(*shape), "confidence": tenths(*shape), "editable": bits(*shape)}
    windows |= {"times": integers(3, *shape), "token": integers(5, *shape), "prob": tenths(*shape), "current_prob": tenths(*shape)}
    bounds = {name: tenths(slots) for name in ("accept_threshold", "edit_threshold", "remask_threshold")}
    return windows | bounds | {"num_to_transfer": integers(4, slots), "may_force": bits(slots, blocks)}


def decided(arrays, at_most=2):
    """What ``remask.decide`` should give, position by position."""
    a = {name: np.asarray(x) for name, x in arrays.items()}
    tokens, masked, confidence = (a[name].copy() for name in ("tokens", "masked", "confidence"))
    counts = np.zeros((3, len(tokens)), int)
    for s, k in np.ndindex(tokens.shape[:2]):
        at = s, k
        masks = [b for b in range(tokens.shape[2]) if a["editable"][*at, b] and a["masked"][*at, b]]
        least = min(a["num_to_transfer"][s] if a["may_force"][at] else 0, len(masks))
        take = [b for b in masks if a["prob"][*at, b] > a["accept_threshold"][s]]
        if len(take) < least:
            take = sorted(masks, key=lambda b: (-a["prob"][*at, b], b))[:least]
        for b in np.flatnonzero(a["editable"][at]):
            here = (*at, b)
            new, sure = a["token"][here], a["prob"][here]
            if a["masked"][here]:
                if b in take:
                    tokens[here], masked[here], confidence[here] = new, False, sure
                    counts[0, s] += 1
                continue
            revised = new != tokens[here] and sure > a["edit_threshold"][s]
            if revised:
                tokens[here], confidence[here] = new, sure
            stands = sure if tokens[here] == new else a["current_prob"][here]
            if stands < a["remask_threshold"][s] and a["times"][here] < at_most:
                masked[here], confidence[here] = True, 0
                counts[2, s] += 1
            else:
                counts[1, s] += revised
    return tokens, masked, confidence, *counts


@pytest.mark.parametrize("shape", [(5, 3, 8), (1, 1, 32), (3, 2, 5)])
def test_decision_position_by_position(shape):
    arrays = window(sum(shape), *shape)
    got = remask.decide(**arrays, max_per_position=2, backend="reference")
    for name, a, b in zip(remask.Decision._fields, got, decided(arrays), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert shape[0] < 5 or all(int(count.sum()) > 0 for count in got[3:])


def test_decision_is_what_the_rules_make_of_it_in_a_chain():
    arrays = window(1)
    slots, blocks, block = arrays["tokens"].shape
    dims, rule = Dims(slots=slots, window=blocks, block=block, pages_per_slot=4), llada2_edit()
    state = empty_state(dims, rule, mask_id=MASK)
    given = {name: arrays[name] for name in ("accept_threshold", "edit_threshold", "remask_threshold", "num_to_transfer")}
    state = state.replace(
        tokens=arrays["tokens"],
        masked=arrays["masked"],
        confidence=arrays["confidence"],
        frozen=~arrays["editable"],
        active=jnp.ones((slots, blocks), bool),
        live=jnp.ones(slots, bool),
        settings=state.settings.replace(**given, semi_complete_threshold=jnp.full(slots, 0.5, jnp.float32)),
    )
    none = jnp.zeros((slots, blocks, block, 0))
    prediction = Prediction(arrays["token"], arrays["prob"], arrays["current_prob"], none.astype(jnp.int32), none, arrays["masked"])
    after, rule_state = rule.update(prediction, state, (*rule.init(dims)[:2], arrays["times"]))
    got = remask.decide(**arrays | {"may_force": may_force(state)}, max_per_position=2, backend="reference")
    assert 0 < int(may_force(state).sum()) < slots * blocks
    for name in ("tokens", "masked", "confidence"):
        np.testing.assert_array_equal(getattr(got, name), getattr(after, name), err_msg=name)
    np.testing.assert_array_equal(rule_state[2] - arrays["times"], got.masked & ~arrays["masked"])


@pytest.mark.parametrize("shape", [(5, 3, 8), (1, 1, 32), (3, 2, 5)])
def test_decision_kernel(interpret, shape, monkeypatch):
    arrays = window(sum(shape), *shape)
    monkeypatch.setitem(remask._DECIDE, "tpu", functools.partial(tpu_decision.decide, interpret=interpret))
    want, got = (remask.decide(**arrays, max_per_position=2, backend=backend) for backend in ("reference", "tpu"))
    for name, a, b in zip(remask.Decision._fields, got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_decision_names_an_array_of_the_wrong_shape():
    arrays = window(2)
    with pytest.raises(ValueError, match=r"may_force has shape \(5,\), expected \(5, 3\)"):
        remask.decide(**arrays | {"may_force": jnp.ones(5, bool)}, max_per_position=2)
