"""Which experts are chosen: every backend against the scheme written down in NumPy, and examples to check by hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import in_simulator, simulated

from pallas_kernels.expert_choice import Router, choose, choose_backend
from pallas_kernels.target import Target


def chosen(logits, bias, router):
    """``(ids, weights)`` of a stable sort, in float32."""
    if router.score == "sigmoid":
        score = 1 / (1 + np.exp(-logits.astype(np.float32)))
    else:
        powers = np.exp(logits.astype(np.float32) - logits.max(1, keepdims=True).astype(np.float32))
        score = powers / powers.sum(1, keepdims=True)
    compared = score + (0 if bias is None else bias)
    if router.kept < router.groups:
        grouped = compared.reshape(len(logits), router.groups, -1)
        sums = np.sort(grouped, -1)[..., -2:].sum(-1)
        lost = np.argsort(-sums, 1, kind="stable")[:, router.kept :]
        stays = np.ones(sums.shape, bool)
        np.put_along_axis(stays, lost, False, 1)
        compared = np.where(stays[..., None], grouped, -np.inf).reshape(compared.shape)
    ids = np.argsort(-compared, 1, kind="stable")[:, : router.top_k]
    weights = np.take_along_axis(score, ids, 1)
    if router.normalise:
        weights = weights / (weights.sum(1, keepdims=True) + (1e-20 if router.score == "sigmoid" else 0))
    return ids, weights * router.scale


@functools.partial(jax.jit, static_argnames=("router", "backend"))
def run(x, matrix, bias, router, backend, valid=None):
    return choose(x, matrix, bias, router, backend=backend, valid=valid)


ROUTERS = [
    Router(top_k=8, groups=8, kept=4, scale=2.5),
    Router(top_k=8, groups=16, kept=4),
    Router(top_k=8, normalise=False),
    Router(top_k=8, score="softmax"),
    Router(top_k=4, score="softmax", normalise=False, scale=0.5),
    Router(top_k=4, score="softmax", groups=4, kept=2),
]


@pytest.mark.parametrize("backend", ["sorted", "compared"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("biased", [False, True])
def test_as_the_scheme_says(backend, router, biased):
    """With a bias all scores differ; without, logits are halves, so that ties are everywhere, between experts and between groups."""
    rng = np.random.default_rng(biased)
    logits = rng.standard_normal((64, 32)) * 2
    bias = (rng.random(32) / 8).astype(np.float32) if biased else None
    if not biased:
        logits = np.abs(np.round(logits * 2) / 2)  # of either sign, two sigmoids could make the sum of two others but for rounding
    ids, weights = run(np.eye(64, dtype=np.float32), logits.astype(np.float32), bias, router, backend)
    want_ids, want_weights = chosen(logits, bias, router)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-5)
    assert (ids.dtype, weights.dtype) == (jnp.int32, jnp.float32)


@pytest.mark.parametrize("router", ROUTERS)
def test_comparing_is_sorting(router):
    """Scores on a coarse grid, so that ties are everywhere: between experts, and between groups."""
    matrix, bias = jnp.round(jax.random.normal(jax.random.key(0), (6, 32)) * 2) / 2, jnp.round(jnp.arange(32) % 3 / 2) / 8
    x = jnp.round(jax.random.normal(jax.random.key(1), (200, 6)))
    got, want = (run(x, matrix, bias, router, backend) for backend in ("compared", "sorted"))
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_allclose(got.weights, want.weights, rtol=1e-6)


HALF, THREE_QUARTERS = 0.0, float(np.log(3))  # logits of these sigmoids


def one(logits, bias, router):
    """Experts and weights of one token, the same by every backend."""
    x, matrix = np.ones((1, 1), np.float32), np.array([logits], np.float32)
    first, *others = (run(x, matrix, bias, router, backend) for backend in ("sorted", "compared", "gpu"))
    for other in others:
        np.testing.assert_array_equal(other.ids, first.ids)
        np.testing.assert_allclose(other.weights, first.weights, rtol=1e-6)
    return np.asarray(first.ids)[0].tolist(), np.asarray(first.weights)[0].tolist()


PAIRS = Router(top_k=2, groups=2, kept=1)


def test_the_bias_selects_and_does_not_weigh():
    """Scores 0.5, 0.5 | 0.75, 0.5; the bias turns the second group's order around and leaves its weights alone."""
    ids, weights = one([HALF, HALF, THREE_QUARTERS, HALF], jnp.array([0.0, 0.0, 0.0, 0.5]), PAIRS)
    assert ids == [3, 2]
    np.testing.assert_allclose(weights, [0.4, 0.6], rtol=1e-6)  # 0.5 and 0.75, normalised


def test_the_best_group_is_kept():
    """The best expert (0.75) is alone in its group: 0.75 + 0.1 lose to 0.5 + 0.5."""
    bias = jnp.array([0.0, -0.4, 0.0, 0.0])
    assert one([THREE_QUARTERS, HALF, HALF, HALF], bias, PAIRS)[0] == [2, 3]
    assert one([THREE_QUARTERS, HALF, HALF, HALF], bias, PAIRS._replace(kept=2))[0] == [0, 2]


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_ties_go_to_the_lower_expert(score):
    assert one([HALF] * 4, None, PAIRS._replace(score=score))[0] == [0, 1]


def test_softmax_is_over_all_experts():
    """Powers 1, 2, 3, 4 of a sum of 10: 0.4 and 0.3, that is 4/7 and 3/7 of what was chosen."""
    logits = [float(np.log(n)) for n in (1, 2, 3, 4)]
    ids, weights = one(logits, None, Router(top_k=2, score="softmax"))
    assert ids == [3, 2]
    np.testing.assert_allclose(weights, [4 / 7, 3 / 7], rtol=1e-6)
    np.testing.assert_allclose(one(logits, None, Router(top_k=2, score="softmax", normalise=False))[1], [0.4, 0.3], rtol=1e-6)


def test_weights_are_scaled():
    np.testing.assert_allclose(one([HALF] * 4, None, PAIRS._replace(normalise=False))[1], [0.5, 0.5])
    np.testing.assert_allclose(one([HALF] * 4, None, PAIRS._replace(scale=2.5))[1], [1.25, 1.25])


# Block routing: the tokens of a block choose among the experts that the block admits.


def chosen_by_blocks(logits, bias, valid, router):
    """Block by block and token by token, in float32."""
    score = 1 / (1 + np.exp(-logits.astype(np.float32)))
    ids, weights = [], []
    for start in range(0, len(logits), router.block):
        tokens = range(start, start + router.block)
        best = np.max([score[t] + bias if valid[t] else np.full(len(bias), -np.inf) for t in tokens], 0)
        pool = sorted(np.argsort(-best, kind="stable")[: router.capacity])
        for t in tokens:
            mine = sorted(pool, key=lambda e: (-(score[t] + bias)[e], e))[: router.top_k]
            ids.append(mine)
            weights.append(score[t][mine] / (score[t][mine].sum() + 1e-20) * router.scale)
    return np.array(ids), np.array(weights)


@pytest.mark.sweep_but(
    "32-48-8-256-sorted", "32-48-8-256-gpu", "8-8-2-16-compared", "8-2-2-16-gpu", "4-16-4-16-sorted", "1-5-3-100-compared"
)
@pytest.mark.parametrize("backend", ["sorted", "compared", "gpu"])
@pytest.mark.parametrize(
    ("block", "capacity", "top_k", "experts"), [(32, 48, 8, 256), (8, 8, 2, 16), (8, 2, 2, 16), (4, 16, 4, 16), (1, 5, 3, 100)]
)
def test_a_blocks_tokens_share_its_experts(backend, block, capacity, top_k, experts):
    """The last block but one has a token that is not there, the last none that is."""
    rng = np.random.default_rng(block)
    tokens = 4 * block
    logits, bias = rng.standard_normal((tokens, experts)) * 2, (rng.random(experts) / 8).astype(np.float32)
    valid = np.arange(tokens) < 3 * block - (block > 1)
    router = Router(top_k=top_k, capacity=capacity, block=block, scale=2.5)
    x, matrix = np.eye(tokens, dtype=np.float32), logits.astype(np.float32)
    ids, weights = map(np.asarray, run(x, matrix, bias, router, backend, valid))
    want_ids, want_weights = chosen_by_blocks(logits, bias, valid, router)
    np.testing.assert_array_equal(ids[valid], want_ids[valid])
    np.testing.assert_allclose(weights[valid], want_weights[valid], rtol=1e-5)
    assert bool(((ids >= 0) & (ids < experts)).all())
    for admitted in ids[: 2 * block].reshape(2, -1):
        assert len(set(admitted)) <= capacity


BLOCKS = Router(top_k=1, capacity=2, block=2)


def experts_of(logits, router=BLOCKS, **settings):
    """The best expert of each token; scores are sigmoids, the wider apart the logits are."""
    x, matrix = np.eye(len(logits), dtype=np.float32), np.array(logits, np.float32)
    return np.asarray(run(x, matrix, None, router, "sorted", **settings).ids)[:, 0].tolist()


def test_an_expert_is_admitted_for_its_best_token():
    """Bests of the first block are 3, 5, 4, so experts 1 and 2: token 0 does not get its own best, 0. The second block is by itself."""
    assert experts_of([[3, 2, 1], [0, 5, 4], [3, 2, 1], [0, 1, 4]]) == [1, 1, 0, 2]


def test_tokens_that_are_not_there_admit_nobody():
    there = jnp.array([True, False, True, True])
    assert experts_of([[3, 2, 1], [0, 5, 4], [3, 2, 1], [0, 1, 2]], valid=there)[0] == 0


def test_ties_at_the_door_go_to_the_lower_expert():
    assert experts_of([[1, 1, 1], [1, 1, 1]], BLOCKS._replace(top_k=2)) == [0, 0]
    assert experts_of([[0, 1, 1, 1], [0, 1, 1, 1]]) == [1, 1]
    assert choose(jnp.eye(2), jnp.array([[0.0, 1, 1, 1]] * 2), None, BLOCKS._replace(top_k=2)).ids.tolist() == [[1, 2]] * 2


def test_a_block_of_one_token_and_room_for_all_are_no_limit():
    logits = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    x = np.eye(8, dtype=np.float32)
    free = run(x, logits, None, Router(top_k=3), "sorted")
    for limited in (Router(top_k=3, capacity=3, block=1), Router(top_k=3, capacity=16, block=4)):
        got = run(x, logits, None, limited, "sorted")
        np.testing.assert_array_equal(got.ids, free.ids)
        np.testing.assert_array_equal(got.weights, free.weights)


def test_the_bias_admits_and_does_not_weigh():
    """Scores 0.75, 0.5, 0.5 and a bias of 0.5 for the last: it is admitted instead of expert 1, and weighs 0.5 beside 0.75."""
    logits, bias = np.array([[THREE_QUARTERS, HALF, HALF]] * 2, np.float32), np.array([0, 0, 0.5], np.float32)
    ids, weights = run(np.eye(2, dtype=np.float32), logits, bias, BLOCKS._replace(top_k=2), "sorted")
    assert ids.tolist() == [[2, 0]] * 2
    np.testing.assert_allclose(weights, [[0.4, 0.6]] * 2, rtol=1e-6)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_experts_exist_even_where_scores_are_not_numbers(score):
    router = Router(top_k=2, score=score)
    for backend in ("sorted", "compared"):
        ids, weights = map(np.asarray, run(np.full((3, 1), np.nan, np.float32), np.ones((1, 4), np.float32), None, router, backend))
        assert ((ids >= 0) & (ids < 4)).all()
        assert np.isnan(weights).all()


def test_choice_of_backend():
    hopper = "gpu" if jax.__version_info__ >= (0, 11) else "sorted"
    assert choose_backend(Target("gpu", 9.0)) == hopper
    assert {choose_backend(t) for t in (Target("cpu"), Target("tpu"), Target("gpu", 8.0))} == {"sorted"}


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (Router(top_k=2, score="tanh"), "unknown score 'tanh'.*sigmoid, softmax"),
        (Router(top_k=2, groups=3), "4 experts do not lie in groups=3"),
        (Router(top_k=2, groups=2, kept=3), "groups=2 of which kept=3"),
        (Router(top_k=3, groups=2, kept=1), "top_k=3 exceeds"),
        (Router(top_k=0), "top_k=0"),
        (Router(top_k=2, capacity=1), "capacity=1 must lie between top_k=2 and the 4 experts"),
        (Router(top_k=2, capacity=5), "capacity=5 must lie between top_k=2 and the 4 experts"),
        (Router(top_k=2, capacity=4, groups=2, kept=1), "capacity=4 admits experts of all groups; kept=1 of groups=2 does not"),
        (Router(top_k=2, capacity=4, block=2), "1 tokens do not make whole blocks of 2"),
    ],
)
def test_a_router_that_does_not_fit_is_named(router, message):
    with pytest.raises(ValueError, match=message):
        choose(jnp.ones((1, 1)), jnp.ones((1, 4)), None, router)


@pytest.mark.sweep_but("4")
@simulated
@pytest.mark.parametrize("kept", [4, 8])
def test_tokens_choose_in_the_simulator(kept):
    rng = np.random.default_rng(kept)
    logits, bias = rng.standard_normal((70, 256)).astype(np.float32), (rng.standard_normal(256) / 8).astype(np.float32)
    logits[3] = 0.5  # a row of equals
    logits[5] = 0.0  # what is not a number counts as this
    router = Router(top_k=8, groups=8, kept=kept, scale=2.5)
    with in_simulator():
        ids, weights = choose(jnp.eye(70).at[5].set(jnp.nan), jnp.asarray(logits), jnp.asarray(bias), router, backend="gpu")
    want_ids, want_weights = chosen(logits, bias, router)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-5)
