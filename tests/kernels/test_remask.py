"""The decision: plain jnp position by position, and the TPU kernel, simulated, against plain jnp.

That the rules make the same of it one after the other is in ``tests/test_decide.py``.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import remask
from pallas_kernels.remask import decision, tpu
from pallas_kernels.target import current_target


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
    return windows | bounds | {"least": integers(4, slots, blocks) * bits(slots, blocks)}


def decided(arrays, at_most=2):
    """What ``remask.decide`` should give, position by position."""
    a = {name: np.asarray(x) for name, x in arrays.items()}
    tokens, masked, confidence = (a[name].copy() for name in ("tokens", "masked", "confidence"))
    counts = np.zeros((3, len(tokens)), int)
    for s, k in np.ndindex(tokens.shape[:2]):
        at = s, k
        masks = [b for b in range(tokens.shape[2]) if a["editable"][*at, b] and a["masked"][*at, b]]
        least = min(a["least"][at], len(masks))
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
    with pytest.raises(ValueError, match=r"least has shape \(5,\), expected \(5, 3\)"):
        remask.decide(**arrays | {"least": jnp.ones(5, jnp.int32)}, max_per_position=2)


def test_whoever_traces_a_step_says_how_it_is_decided(monkeypatch):
    arrays, asked = window(3), []
    for name in ("reference", "tpu"):
        decide = functools.partial(lambda name, *a, **k: asked.append(name) or decision.decide(*a, **k), name)
        monkeypatch.setitem(remask._BACKENDS, name, decide)
    with remask.decided_by("tpu"):
        remask.decide(**arrays, max_per_position=2)
        remask.decide(**arrays, max_per_position=2, backend="reference")
    remask.decide(**arrays, max_per_position=2)
    assert asked == ["tpu", "reference", remask.choose_backend(current_target())]
    with pytest.raises(ValueError, match="unknown remask backend 'gpu'; valid: reference, tpu"), remask.decided_by("gpu"):
        remask.decide(**arrays, max_per_position=2)
