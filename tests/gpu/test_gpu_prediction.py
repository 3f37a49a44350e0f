"""The prediction kernel on a Hopper GPU against plain jnp in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import prediction
from pallas_kernels.prediction import gpu


def make(rng, rows, vocab, width, dtype=jnp.bfloat16, temperature=0.0):
    """(hidden, lm_head, current, options): the best token of some rows penalised, banned or, of row 2, forbidden to all."""
    hidden = jnp.asarray(rng.standard_normal((rows, width), np.float32), dtype)
    seed = jax.random.key(int(rng.integers(2**31)))
    lm_head = (jax.random.normal(seed, (vocab, width)) * 0.05).astype(dtype)
    best = np.asarray(jnp.einsum("rd,vd->rv", hidden, lm_head, preferred_element_type=jnp.float32).argmax(1))
    row = np.arange(rows)
    keys = jax.random.split(seed, rows)
    ones = jnp.ones(rows, jnp.float32)
    options = {
        "forbidden_id": int(best[2]),
        "sampling": prediction.Sampling(keys, ones * temperature, ones * 0.9, jnp.zeros(rows, jnp.int32)),
        "penalized": jnp.asarray(np.where(row % 2 == 0, best, rng.integers(-1, vocab, rows)), jnp.int32),
        "penalty": jnp.asarray(np.where(row % 3 == 0, 0.0, 2.5), jnp.float32),
        "banned": jnp.asarray(np.stack([np.where(row % 4 == 1, best, -1), rng.integers(0, vocab, rows)], 1), jnp.int32),
        "top_k": 1,
    }
    return hidden, lm_head, jnp.asarray(np.where(row % 5 == 0, best, rng.integers(0, vocab, rows)), jnp.int32), options


@functools.partial(jax.jit, static_argnames=("backend", "forbidden_id", "top_k", "tempered", "entropy", "counts_all"))
def predict(*args, **options):
    return prediction.predict_from_hidden(*args, **options)


def exact(hidden, lm_head, current, options):
    with jax.default_matmul_precision("highest"):
        return predict(hidden.astype(jnp.float32), lm_head.astype(jnp.float32), current, **options, backend="reference")


@pytest.mark.parametrize("rows,vocab,width", [(32, 157184, 2048), (256, 157184, 2048), (300, 50264, 512), (64, 1000, 256), (5, 32008, 64)])
def test_as_the_reference_for_vocabularies_that_no_tile_divides(rng, relative_error, rows, vocab, width):
    hidden, lm_head, current, options = make(rng, rows, vocab, width)
    got, want = predict(hidden, lm_head, current, **options, backend="gpu"), exact(hidden, lm_head, current, options)
    assert relative_error(got.prob, want.prob) < 1e-4
    assert relative_error(got.current_prob, want.current_prob) < 1e-4
    # Where two tokens are equally good to rounding, either is right.
    same = np.asarray(got.token == want.token)
    assert np.allclose(np.asarray(got.prob)[~same], np.asarray(want.prob)[~same], rtol=1e-4) and same.mean() > 0.95
    assert (got.top_ids[:, 0] == got.token).all() and (got.top_probs[:, 0] == got.prob).all()


def test_ties_go_to_the_lowest_id(rng):
    hidden, lm_head, current, options = make(rng, 32, 4096, 128)
    nobody = jnp.full(32, -1)
    unlikely = int(jnp.einsum("rd,vd->rv", hidden, lm_head).max(0).argmin())
    options |= {"forbidden_id": unlikely, "penalized": nobody, "banned": nobody[:, None]}
    once, twice = (predict(hidden, w, current, **options, backend="gpu").token for w in (lm_head, jnp.concatenate([lm_head, lm_head])))
    np.testing.assert_array_equal(twice, once)


def test_a_row_that_is_not_a_number_has_no_probability_and_leaves_the_others_alone(rng):
    hidden, lm_head, current, options = make(rng, 64, 4096, 128)
    clean = predict(hidden, lm_head, current, **options, backend="gpu")
    got = predict(hidden.at[7, 3].set(jnp.nan), lm_head, current, **options, backend="gpu")
    others = np.arange(64) != 7
    assert np.isnan(got.prob[7]) and 0 <= got.token[7] < 4096
    for name in ("token", "prob", "current_prob"):
        np.testing.assert_array_equal(getattr(got, name)[others], getattr(clean, name)[others])


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"dtype": jnp.float32}, {"vocab": 4093}])
def test_what_the_kernel_does_not_serve_is_the_reference(rng, change):
    hidden, lm_head, current, options = make(rng, 32, **({"vocab": 4096, "width": 128} | change))
    for a, b in zip(*(predict(hidden, lm_head, current, **options, backend=b) for b in ("gpu", "reference")), strict=True):
        np.testing.assert_array_equal(a, b)


def test_logits_are_never_in_memory(rng):
    hidden, lm_head, current, _ = make(rng, 256, 50264, 512)
    ids = jnp.stack([current] * 3)
    compiled = jax.jit(functools.partial(gpu.reduce_vocabulary, forbidden_id=0)).lower(hidden, lm_head, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 50264 // 8


def test_greedy_rows_are_tempered_by_nothing_and_entropy_is_the_references(rng, relative_error):
    hidden, lm_head, current, options = make(rng, 32, 4096, 128)
    plain, tempered = (predict(hidden, lm_head, current, **options, tempered=t, backend="gpu") for t in (False, True))
    for a, b in zip(plain[:5], tempered[:5], strict=True):
        np.testing.assert_array_equal(a, b)
    got, want = (predict(hidden, lm_head, current, **options, entropy=True, backend=b).entropy for b in ("gpu", "reference"))
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("sampling", [False, True])
def test_the_forbidden_id_may_have_its_share(rng, relative_error, sampling):
    hidden, lm_head, current, options = make(rng, 64, 126464, 1024)
    options |= {"counts_all": True} | ({} if sampling else {"sampling": None})
    got, want = predict(hidden, lm_head, current, **options, backend="gpu"), exact(hidden, lm_head, current, options)
    assert relative_error(got.prob, want.prob) < 1e-4
    assert relative_error(got.current_prob, want.current_prob) < 1e-4
    assert relative_error(got.top_probs, want.top_probs) < 1e-4
