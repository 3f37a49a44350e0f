"""Prediction: the TPU kernel, simulated, and the Hopper kernel's fallbacks against plain jnp.

19 rows in tiles of 8, 333 tokens in tiles of 128: neither divides.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels import prediction
from pallas_kernels.prediction import gpu, reference, tpu


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
    sampling = prediction.Sampling(
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


STATIC = ("function", "backend", "interpret", "tile", "forbidden_id", "top_k", "tempered", "cut", "entropy")


@functools.partial(jax.jit, static_argnames=STATIC)
def call(function, *args, **options):
    return function(*args, **options)


def assert_same(got, want, *, rtol=1e-5):
    for name in prediction.Best._fields:
        a, b = getattr(got, name), getattr(want, name)
        if b is None:
            assert a is None, name
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if a.dtype == jnp.int32:
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-9, err_msg=name)


@pytest.mark.sweep_but("plain-4-False", "simulated-1-True")
@pytest.mark.parametrize("top_k, filters", [(0, False), (1, True), (4, False)])
def test_from_hidden_states(interpret, top_k, filters):
    *args, options = make(filters=filters)
    want = call(reference.predict_from_hidden, *args, top_k=top_k, **options)
    assert len({*np.asarray(want.token).tolist()}) > ROWS // 2
    assert_same(call(tpu.predict_from_hidden, *args, top_k=top_k, tile=TILE, interpret=interpret, **options), want)


@pytest.mark.sweep_but("simulated-7")
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


@pytest.mark.sweep_but("simulated")
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


def weighted(*temperature: float) -> tuple[jax.Array, prediction.Sampling]:
    """Rows of logits whose tokens are as likely as 1 : 2 : 3, and a fourth, the mask, that does not count."""
    rows = len(temperature)
    sampling = prediction.Sampling(
        jax.random.split(jax.random.key(0), rows), jnp.array(temperature), jnp.full(rows, 0.1), jnp.ones(rows, jnp.int32)
    )
    return jnp.tile(jnp.log(jnp.array([1.0, 2.0, 3.0, 99.0])), (rows, 1)), sampling


@pytest.mark.parametrize("backend", [None, "reference", "gpu"])
def test_tempered_probabilities_and_entropy(backend):
    """At temperature 0.5 the odds are 1 : 4 : 9, before top-k and top-p, which leave the best alone; greedy counts as 1."""
    logits, sampling = weighted(0.0, 1.0, 0.5)
    options = {"forbidden_id": 3, "sampling": sampling, "top_k": 2, "backend": backend}
    best = call(prediction.predict, logits, jnp.zeros(3, jnp.int32), tempered=True, entropy=True, **options)
    odds = np.array([[1, 2, 3], [1, 2, 3], [1, 4, 9]]) / np.array([[6], [6], [14]])
    assert best.token.tolist() == [2, 2, 2]
    np.testing.assert_allclose(best.prob, odds[:, 2], rtol=1e-6)
    np.testing.assert_allclose(best.current_prob, odds[:, 0], rtol=1e-6)
    np.testing.assert_allclose(best.top_probs, odds[:, [2, 1]], rtol=1e-6)
    np.testing.assert_allclose(best.entropy, -(odds * np.log(odds)).sum(-1), rtol=1e-6)


def test_cut_probabilities_are_those_of_what_is_drawn_from():
    """At temperature 1 the odds are 1 : 2 : 3, of which top-p 0.6 leaves 2 : 3 and top-k 1 the best; greedy rows count all."""
    logits, _ = weighted(1.0, 1.0, 0.0)
    keys = jax.random.split(jax.random.key(0), 3)
    cold = jnp.array([1.0, 1.0, 0.0])
    sampling = prediction.Sampling(keys, cold, jnp.array([0.6, 1.0, 0.6]), jnp.array([0, 1, 0]))
    best = call(prediction.predict, logits, jnp.zeros(3, jnp.int32), forbidden_id=3, sampling=sampling, top_k=2, tempered=True, cut=True)
    odds = np.array([[0, 2 / 5, 3 / 5], [0, 0, 1], [1 / 6, 2 / 6, 3 / 6]])
    assert best.token[1:].tolist() == [2, 2] and best.token[0] in (1, 2)
    np.testing.assert_allclose(best.prob, odds[np.arange(3), np.asarray(best.token)], rtol=1e-6)
    np.testing.assert_allclose(best.current_prob, odds[:, 0], rtol=1e-6)
    np.testing.assert_allclose(best.top_probs, odds[:, [2, 1]], rtol=1e-6)


@pytest.mark.parametrize("temperature", [(0.0,), (0.0, 0.8)])
def test_the_kernels_leave_cut_probabilities_to_the_reference_where_a_row_samples(temperature):
    hidden, lm_head, current, options = make(10, temperature=temperature)
    args = hidden, lm_head, current
    want = call(reference.predict_from_hidden, *args, tempered=True, cut=True, **options)

    @functools.partial(jax.jit, static_argnames=("forbidden_id", "top_k"))
    def by_kernel(*args, **options):
        return prediction.predict_from_hidden(*args, tempered=True, cut=True, backend="gpu", **options)

    assert_same(by_kernel(*args, **options), want)


def test_entropy_is_of_the_distribution_that_probabilities_are_of():
    """At temperature 1 unless tempered; banned tokens have no part in it, certainty has none, and a row that is not a number says so."""
    logits, sampling = weighted(0.5, 0.5, 0.5, 0.5)
    logits = logits.at[3, 1].set(jnp.nan)
    banned = jnp.array([[-1, -1], [2, -1], [1, 2], [-1, -1]])
    options = {"forbidden_id": 3, "sampling": sampling, "banned": banned}
    best = call(prediction.predict, logits, jnp.zeros(4, jnp.int32), entropy=True, **options)
    np.testing.assert_allclose(best.prob[:3], [1 / 2, 2 / 3, 1], rtol=1e-6)
    sixths, thirds = np.array([1, 2, 3]) / 6, np.array([1, 2]) / 3
    np.testing.assert_allclose(best.entropy[:3], [-(sixths * np.log(sixths)).sum(), -(thirds * np.log(thirds)).sum(), 0.0], rtol=1e-6)
    assert np.isnan(best.entropy[3])
    assert call(prediction.predict, logits, jnp.zeros(4, jnp.int32), **options).entropy is None


@pytest.mark.parametrize("tempered", [False, True])
def test_probabilities_and_entropy_are_those_of_the_distribution_asked_for(tempered):
    """Against NumPy in float64: penalised and banned tokens and the mask lie outside it; greedy rows are at temperature 1."""
    hidden, lm_head, current, options = make(8)
    logits = np.asarray(hidden @ lm_head.T)
    got = call(reference.predict, logits, current, top_k=3, tempered=tempered, entropy=True, **options)
    row = np.arange(ROWS)
    z = logits.astype(np.float64)
    penalized = np.asarray(options["penalized"])
    z[row[penalized >= 0], penalized[penalized >= 0]] -= 3.0
    z[:, MASK] = -np.inf
    for column in np.asarray(options["banned"]).T:
        z[row[column >= 0], column[column >= 0]] = -np.inf
    temperature = np.asarray(options["sampling"].temperature)
    if tempered:
        z /= np.where(temperature > 0, temperature, 1)[:, None]
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(got.prob, p[row, got.token], rtol=1e-4)
    np.testing.assert_allclose(got.current_prob, p[row, current], rtol=1e-4)
    np.testing.assert_allclose(got.top_probs, np.take_along_axis(p, np.asarray(got.top_ids), 1), rtol=1e-4)
    np.testing.assert_allclose(got.entropy, -(p * np.log(np.maximum(p, 1e-300))).sum(1), rtol=1e-4, atol=1e-6)
    plain = call(reference.predict, logits, current, top_k=3, **options)
    assert plain.entropy is None
    np.testing.assert_array_equal(got.token, plain.token)
    np.testing.assert_array_equal(got.prob == plain.prob, (temperature == 0) | (not tempered))


@pytest.mark.sweep_but("plain-False-1-True", "simulated-True-3-True")
@pytest.mark.parametrize("tempered, top_k, filters", [(True, 0, False), (True, 3, True), (False, 1, True)])
def test_tempered_probabilities_and_entropy_in_the_kernel(interpret, tempered, top_k, filters):
    *args, options = make(9, filters=filters)
    options |= {"top_k": top_k, "tempered": tempered, "entropy": not tempered or filters}
    want = call(reference.predict_from_hidden, *args, **options)
    assert (want.entropy is None) == (not options["entropy"])
    assert_same(call(tpu.predict_from_hidden, *args, tile=TILE, interpret=interpret, **options), want)


@pytest.mark.sweep_but("simulated")
def test_a_row_that_is_not_finite_has_no_entropy(interpret):
    hidden, lm_head, current, options = make(6)
    logits = (hidden @ lm_head.T).at[5, 200].set(jnp.nan)
    options["banned"] = options["banned"].at[5].set(-1)
    got = call(tpu.predict, logits, current, tile=TILE, interpret=interpret, tempered=True, entropy=True, **options)
    np.testing.assert_array_equal(np.isnan(got.entropy), np.arange(ROWS) == 5)


def test_the_hopper_kernel_leaves_entropy_to_the_reference():
    hidden, lm_head, current, options = make(10, temperature=(0.0,), vocab=328)
    args = hidden.astype(jnp.bfloat16).repeat(4, 1), lm_head.astype(jnp.bfloat16).repeat(4, 1), current
    want = call(reference.predict_from_hidden, *args, tempered=True, entropy=True, **options)
    assert_same(call(gpu.predict_from_hidden, *args, tempered=True, entropy=True, **options), want)


@pytest.mark.parametrize("asked", ["no more", "doubted", "narrowed"])
def test_what_no_kernel_knows_is_made_of_what_it_finds_or_left_to_the_reference(asked):
    """The forbidden id has its share, some current tokens are that id, and of one row it is banned; every fourth row doubts its best."""
    hidden, lm_head, current, options = make(11, temperature=(0.0, 0.7), filters=asked == "narrowed")
    row = np.arange(ROWS)
    current = jnp.where(row % 3 == 1, MASK, current)
    options["banned"] = options["banned"].at[4, 0].set(MASK)
    options["penalized"] = options["penalized"].at[7].set(MASK)
    options["penalty"] = options["penalty"].at[7].set(2.0)
    lm_head = lm_head.at[MASK].set(2 * hidden[1])  # there the forbidden id is more likely than the best
    best = call(reference.predict_from_hidden, hidden, lm_head, current, **options).token
    if asked == "no more":
        options["sampling"] = None
    doubted = jnp.where(row % 4 == 0, best, -1)[:, None] if asked == "doubted" else None
    fixed = {"forbidden_id": options.pop("forbidden_id"), "top_k": 1, "counts_all": True, "narrowed": asked == "narrowed"}

    @functools.partial(jax.jit, static_argnames=("backend", "axes"))
    def predicted(*args, backend="gpu", axes=(), **options):
        return prediction.predict_from_hidden(*args, doubted=doubted, vocab_axes=axes, backend=backend, **fixed, **options)

    want = predicted(hidden, lm_head, current, **options, backend="reference")
    assert want.prob[1] < 0.5 and want.current_prob[current == MASK].max() > 0
    assert_same(predicted(hidden, lm_head, current, **options), want, rtol=1e-4)
    if asked == "no more":
        with jax.set_mesh(jax.make_mesh((1,), ("x",))):  # devices that share the vocabulary, if only one
            shared = functools.partial(predicted, axes=("x",), **options)
            spread = jax.shard_map(shared, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
            assert_same(spread(hidden, lm_head, current), want, rtol=1e-4)


def test_rows_that_sample_are_drawn_some_at_a_time():
    """What the reference says of all rows at once, for any number of rows that sample; the others keep what was found."""
    rows, width, vocab = 150, 8, 40
    keys = jax.random.split(jax.random.key(3), 3)
    hidden, head = jax.random.normal(keys[0], (rows, width)), jax.random.normal(keys[1], (vocab, width))
    current = jnp.arange(rows, dtype=jnp.int32) % vocab
    options = {
        "forbidden_id": 5,
        "penalized": current[::-1],
        "penalty": jnp.linspace(0, 1, rows),
        "banned": current[:, None] + 1,
        "top_k": 1,
    }
    greedy = call(reference.predict_from_hidden, hidden, head, current, sampling=None, **options)
    draw = jax.jit(functools.partial(reference.redone, forbidden_id=5, top_k=1))
    arrays = {name: options[name] for name in ("penalized", "penalty", "banned")}
    for hot in (0, 1, 64, 65, 150):
        temperature = jnp.where(jnp.arange(rows)[::-1] < hot, 0.8, 0.0)
        sampling = reference.Sampling(jax.random.split(keys[2], rows), temperature, jnp.full(rows, 0.9), jnp.zeros(rows, jnp.int32))
        want = call(reference.predict_from_hidden, hidden, head, current, sampling=sampling, **options)
        got = draw(greedy, temperature > 0, hidden, head, current, sampling=sampling, **arrays)
        np.testing.assert_array_equal(got.token, want.token)
        np.testing.assert_allclose(got.prob, want.prob, rtol=1e-5)
        np.testing.assert_allclose(got.current_prob, want.current_prob, rtol=1e-5)
    assert (got.token != greedy.token).any()
