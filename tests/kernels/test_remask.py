"""The decision: position by position, the TPU kernel, simulated, against plain jnp, and both against the rules they stand for."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from diffulex_jax.request_state import empty_state
from diffulex_jax.rules.blocks import may_force
from diffulex_jax.state import Dims, Prediction
from diffulex_jax.strategies import llada2_edit
from pallas_kernels import remask
from pallas_kernels.remask import tpu


MASK = 332


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
    monkeypatch.setitem(remask._BACKENDS, "tpu", functools.partial(tpu.decide, interpret=interpret))
    want, got = (remask.decide(**arrays, max_per_position=2, backend=backend) for backend in ("reference", "tpu"))
    for name, a, b in zip(remask.Decision._fields, got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_decision_names_an_array_of_the_wrong_shape():
    arrays = window(2)
    with pytest.raises(ValueError, match=r"may_force has shape \(5,\), expected \(5, 3\)"):
        remask.decide(**arrays | {"may_force": jnp.ones(5, bool)}, max_per_position=2)
