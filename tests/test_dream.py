"""Dream: its schedule and rules on blocks small enough to check in one's head, its confidences, its configs, and what does not go."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import same_answer
from plain import attend_to, logits_of, predict
from scripted import block_of, play, script, shown, update
from sweep import sweep

from diffulex_jax import SamplingParams, SettingError
from diffulex_jax.bench.shapes import shape_model
from diffulex_jax.engine import settle
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.models.attention import AttentionPolicy
from diffulex_jax.models.base import leaves
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.rules import at_random, by_noise_level, noise_levels, rationed
from diffulex_jax.rules.noise_levels import step_shares
from diffulex_jax.strategies import STRATEGIES
from diffulex_jax.weights import checkpoint
from pallas_kernels.prediction import Sampling


DREAM = str(pathlib.Path(__file__).parent / "golden" / "families" / "tiny-dream")
OPTIONS = {"block_size": 128, "max_slots": 4, "max_model_len": 256, "warm_up": False}
_ = None


# The schedule


_next_count = jax.jit(noise_levels._next_count)


def shared_out(masks, *, steps, eps):
    """How many masks each step fills that fills any."""
    shares, gone, counts = np.asarray(step_shares(steps, eps))[None], np.zeros((1, 1), np.int32), []
    while masks:
        count, gone = _next_count(np.array([[masks]], np.int32), shares, gone)
        counts.append(int(np.asarray(count)[0, 0]))
        masks -= counts[-1]
    return counts


@pytest.mark.parametrize(
    ("masks", "steps", "want"),
    [
        (16, 16, [*[1] * 14, 2]),  # what is rounded down is made up for by the last step; the first fills none and is left out
        (128, 64, [1, *[2] * 62, 3]),
        (24, 1, [24]),
        (8, 2, [3, 5]),  # 8 * 0.4995
        (3, 40, [1, 2]),
    ],
)
def test_masks_are_shared_out_as_the_noise_level_falls(masks, steps, want):
    assert shared_out(masks, steps=steps, eps=1e-3) == want


def test_a_noise_level_that_does_not_fall_leaves_all_to_the_last_step():
    assert shared_out(8, steps=4, eps=1.0) == [8]
    assert shared_out(16, steps=2, eps=0.5) == [4, 12]


@pytest.mark.parametrize(("eps", "steps"), [(1e-3, 512), (1e-5, 512), (0.05, 7), (1e-3, 1)])
def test_noise_levels_are_rounded_once_from_the_nearer_end(eps, steps):
    """torch's linspace: the difference of two levels is a float32, and what is made of it is exact until it is rounded."""
    end, fall = Fraction(float(np.float32(eps))), Fraction(float((np.float32(eps) - np.float32(1)) / np.float32(steps)))
    exact = [1 + fall * i if i < (steps + 1) // 2 else end - fall * (steps - i) for i in range(steps + 1)]
    assert noise_levels._noise_levels(eps, steps + 1).tolist() == [float(np.float32(float(level))) for level in exact]


def test_float32_decides_what_is_rounded_down():
    """Levels 1, 7/8, 3/4, 5/8: the second step fills 7 * (1 - 6/7), which is 1 in float64, and less in float32."""
    assert int(7 * (1 - 0.75 / 0.875)) == 1
    assert shared_out(8, steps=4, eps=0.5) == [1, 1, 6]


# by_noise_level


@pytest.mark.parametrize(
    ("confidence", "order"),
    [("prob", [2, 0, 3, 1]), ("margin", [1, 0, 3, 2]), ("entropy", [3, 1, 2, 0])],
)
def test_the_most_confident_are_filled_first_however_that_is_measured(confidence, order):
    rule = by_noise_level(confidence=confidence)
    state = block_of(rule, [7, _, _, _, _], frozen=1, step_shares=[0.25, 0.67, 1.0])
    says = {"entropy": [0, 0.9, 0.2, 0.5, 0.1], "margin": [0, 0.3, 0.4, 0.1, 0.3]}
    filled = []
    while state.masked.any():
        before = state.masked
        state = update(rule, state, [1] * 5, [0.99, 0.6, 0.3, 0.8, 0.6], **says)
        filled.append({int(i) - 1 for i in np.flatnonzero(before & ~state.masked)})
    assert filled == [{order[0]}, set(order[1:3]), {order[3]}]


def test_a_temperature_draws_which_masks_are_filled():
    """20 000 requests: chi-square over the pairs of five masks, drawn one after the other from softmax(confidence / alg_temp)."""
    rule, prob, heat = by_noise_level(), np.array([0.9, 0.1, 0.2, 0.3, 0.4, 0.5]), 0.5
    one = block_of(rule, [7, _, _, _, _, _], frozen=1, alg_temp=heat, step_shares=[0.4, 1.0])

    def filled(seed):
        return ~update(rule, one.replace(key=jnp.stack([jnp.uint32(0), seed])[None]), [1] * 6, prob).masked[0, 0, 1:]

    found = np.asarray(jax.jit(jax.vmap(filled))(jnp.arange(20_000, dtype=jnp.uint32)))
    assert (found.sum(1) == 2).all()
    p = np.exp(prob[1:] / heat) / np.exp(prob[1:] / heat).sum()
    chi = 0.0
    for i, j in itertools.combinations(range(5), 2):
        expected = 20_000 * (p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]))
        chi += (int((found[:, i] & found[:, j]).sum()) - expected) ** 2 / expected
    assert chi < 27.9  # 9 degrees of freedom: exceeded once in a thousand times


def test_another_confidence_is_refused():
    with pytest.raises(ValueError, match="confidence='top' must be one of prob, margin, entropy"):
        by_noise_level(confidence="top")


# at_random


@pytest.mark.parametrize("eps", [1e-3, 0.4])
def test_each_mask_is_filled_by_chance_as_the_noise_level_falls(eps):
    """20 000 requests: chi-square over the steps at which three masks are filled."""
    rule, n = at_random(), 3
    one = block_of(rule, [7, _, _, _], frozen=1, step_shares=step_shares(n, eps))

    def filled_at(seed):
        state, at = one.replace(key=jnp.stack([jnp.uint32(0), seed])[None]), jnp.zeros(3, jnp.int32)
        for nfe in range(n):
            state = update(rule, state.replace(nfe=jnp.array([nfe])), [1] * 4, [0.9, 0.1, 0.2, 0.3])
            at += state.masked[0, 0, 1:]
        return at

    found = np.asarray(jax.jit(jax.vmap(filled_at))(jnp.arange(20_000, dtype=jnp.uint32)))
    assert found.max() == n - 1  # the last step fills all
    level = np.linspace(1, eps, n + 1)
    fills = [*(1 - level[1:-1] / level[:-2]), 1.0]
    at = [fills[i] * math.prod(1 - f for f in fills[:i]) for i in range(n)]
    chi = 0.0
    for when in itertools.product(range(n), repeat=3):
        expected = 20_000 * math.prod(at[i] for i in when)
        chi += (int((found == when).all(1).sum()) - expected) ** 2 / expected
    assert chi < 54.1  # 26 degrees of freedom: exceeded once in a thousand times


# rationed


def test_a_ration_that_is_not_used_carries_over():
    """Two a step; 0.9 is sure. The first step finds one sure mask of its two candidates, the second may fill three."""
    rule = rationed()
    state = block_of(rule, [_] * 6, num_to_transfer=2, accept_threshold=0.9)
    state = update(rule, state, range(1, 7), [0.1, 0.95, 0.2, 0.3, 0.4, 0.5])
    assert shown(state) == [_, 2, _, _, _, _]
    state = update(rule, state, range(1, 7), [0.91, 0.1, 0.92, 0.93, 0.94, 0.1])
    assert shown(state) == [_, 2, 3, 4, 5, _]
    state = update(rule, state, range(1, 7), [0.2] * 6)
    assert shown(state) == [1, 2, 3, 4, 5, _]  # none is sure: the first of equals


def test_after_its_steps_a_ration_grows_no_more():
    """Five masks in two steps: three, then two; what those leave is filled one by one, or as it gets sure."""
    rule = rationed()
    state, left = block_of(rule, [_] * 5, denoising_steps=2, accept_threshold=0.9), []
    for prob in (0.95, 0.1, 0.1):
        state = update(rule, state, [1] * 5, [prob] * 5)
        left.append(int(state.masked.sum()))
    assert left == [2, 1, 0]


# What a forward says


def test_top_p_and_top_k_bear_on_confidence_at_temperature_0_too():
    """exp: 8, 4, 2, 1 and 1 (the mask); of 16."""
    logits = jnp.log(jnp.array([[8.0, 4.0, 2.0, 1.0, 1.0]] * 6))
    rows = [(1.0, 0), (0.51, 0), (0.49, 0), (1.0, 3), (0.8, 2), (1e-9, 0)]
    want = [[8, 4, 2, 1, 1], [8, 4], [8], [8, 4, 2], [8, 4], [8]]
    top_p, top_k = (jnp.array(a) for a in zip(*rows, strict=True))
    sampling = Sampling(jax.random.split(jax.random.key(0), 6), jnp.zeros(6), top_p, top_k)
    best = predict(logits, jnp.zeros(6, int), forbidden_id=4, sampling=sampling, counts_all=True, narrowed=True, entropy=True, margin=True)
    assert best.token.tolist() == [0] * 6
    p = [np.array(row) / sum(row) for row in want]
    np.testing.assert_allclose(best.prob, [row[0] for row in p], rtol=1e-6)
    np.testing.assert_allclose(best.margin, [row[0] - (row[1] if len(row) > 1 else 0) for row in p], rtol=1e-6)
    np.testing.assert_allclose(best.entropy, [-(row * np.log(row + 1e-10)).sum() for row in p], rtol=1e-5, atol=1e-7)


def test_where_the_mask_leads_another_token_is_chosen_and_the_margin_is_the_masks():
    logits = jnp.log(jnp.array([[1.0, 2.0, 5.0]] * 2))
    sampling = Sampling(jax.random.split(jax.random.key(0), 2), jnp.array([0.0, 1.0]), jnp.array([1.0, 0.5]), jnp.zeros(2, int))
    best = predict(logits, jnp.zeros(2, int), forbidden_id=2, sampling=sampling, counts_all=True, narrowed=True, margin=True)
    assert best.token.tolist() == [1, 1]  # of the second row top-p leaves the mask alone
    np.testing.assert_allclose(best.prob, [2 / 8, 0], atol=1e-6)
    np.testing.assert_allclose(best.margin, [3 / 8, 1], rtol=1e-6)


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(0.7, 1.0, 0), (0.2, 0.95, 50), (1.0, 0.8, 0), (1.5, 1.0, 5)])
def test_draws_follow_the_authors_formula(temperature, top_p, top_k):
    """Chi-square over 20 000 draws; what is kept is worked out by sorting, as the authors do, the mask id's share included."""
    z, mask, n = np.array([1.0, 0.5, 0.0, -0.5, 0.8, -1.0, 0.3, 0.9]), 7, 20_000
    p = np.exp(z / temperature) / np.exp(z / temperature).sum()
    order = np.argsort(-p)
    kept = order[np.cumsum(p[order]) - p[order] <= top_p][: top_k or None]
    share = np.where(np.isin(np.arange(8), kept), p, 0) / p[kept].sum()
    expected = share[:mask] / share[:mask].sum()
    row = jnp.ones(n)
    sampling = Sampling(jax.random.split(jax.random.key(3), n), row * temperature, row * top_p, jnp.full(n, top_k))
    logits = jnp.broadcast_to(jnp.asarray(z, jnp.float32), (n, 8))
    best = predict(
        logits, jnp.full(n, mask), forbidden_id=mask, sampling=sampling, tempered=True, counts_all=True, narrowed=True, margin=True
    )
    counts, seen = np.bincount(np.asarray(best.token), minlength=mask), expected > 0
    assert not counts[~seen].any()
    assert ((counts - n * expected)[seen] ** 2 / (n * expected[seen])).sum() < 22.5  # at most 6 degrees: once in a thousand times
    np.testing.assert_allclose(best.prob, share[np.asarray(best.token)], rtol=1e-5)
    np.testing.assert_allclose(best.margin, np.diff(np.sort(share))[-1], rtol=1e-4)


# Requests


def test_what_is_given_is_no_mask_of_the_schedule():
    """Four masks of six tokens in two steps: one, then the other three."""
    says = script([5], (range(16), [0.5] * 16), max_tokens=6, denoising_steps=2, ignore_eos=True, pinned={2: 13, 5: 12})
    (got,), _state = play(by_noise_level(), says, block=8, pages=4, steps=20, whole_canvas=True)
    assert (got.tokens, got.reason, got.nfe) == ([1, 2, 13, 4, 5, 12], "length", 2)
    assert got.trace[0] == [1, _, 13, _, _, 12, 15, 15]


def test_an_output_takes_as_many_steps_as_it_has_tokens_unless_told_otherwise():
    says = [script([5], (range(16), [0.5] * 16), max_tokens=6, ignore_eos=True, denoising_steps=n) for n in (0, 12, 3, 1)]
    played, _state = play(by_noise_level(), *says, block=8, pages=4, steps=20, whole_canvas=True)
    assert [got.nfe for got in played] == [5, 5, 3, 1]  # the first of six fills none, nor do the first seven of twelve


CACHED = {"block": 4, "pages": 4, "steps": 20, "whole_canvas": True, "commit_alone": True, "cached_canvas": True}


def test_behind_a_cache_a_blocks_first_forward_decides_its_first_token_alone():
    """Blocks of three in two steps, of which the first forward is one. The window shows four positions."""
    says = script([5], (range(16), [0.5] * 16), max_tokens=6, block_length=3, denoising_steps=2, ignore_eos=True)
    (got,), _state = play(by_noise_level(), says, **CACHED)
    assert (got.tokens, got.reason, got.nfe) == ([1, 2, 3, 4, 5, 6], "length", 4)
    assert got.trace == [[1, _, _, _], [1, 2, 3, _], [4, _, _, 15], [4, 5, 6, 15]]


def test_behind_a_cache_a_first_token_that_is_given_is_none_to_decide():
    """The first of four steps is gone. The second fills a bit less than a third of three masks: none, and is no forward."""
    says = script([5], (range(16), [0.5] * 16), max_tokens=4, denoising_steps=4, ignore_eos=True, pinned={0: 12})
    (got,), _state = play(by_noise_level(), says, **CACHED)
    assert got.trace == [[12, _, _, _], [12, 2, _, _], [12, 2, 3, 4]]


@pytest.mark.sweep_but("prefix")
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_where_a_block_is_one_token_a_cache_is_exact(engine_of, cache):
    """Token by token the most probable of a plain forward over the canvas, from the output at the position before."""
    network, params = checkpoint.load(DREAM, make_mesh())
    forward = jax.jit(lambda ids: logits_of(network, params, ids, attend_to(jnp.ones((len(ids),) * 2, bool)))[0])
    prompt, mask = [97, 250, 407, 289, 392], network.spec.mask_id
    ids = np.array([*prompt, *[mask] * 6])
    for i in range(5, 11):
        ids[i] = forward(ids)[i - 1].at[mask].set(-jnp.inf).argmax()
    engine = engine_of(**next(options for options in SETUPS.values() if options.get("cache") == cache))
    params = SamplingParams(max_tokens=6, block_length=1, ignore_eos=True)
    outputs = engine.generate([prompt, [9] * 20], [params, SamplingParams(max_tokens=40, ignore_eos=True)])
    assert (outputs[0].token_ids, outputs[0].nfe) == (ids[5:].tolist(), 6)


def test_behind_a_cache_blocks_are_as_long_as_fast_dllms_unless_told_otherwise():
    spec = checkpoint.load_model(DREAM).spec
    for settings, want in (({}, 512), ({"cache": "dual"}, 32), ({"cache": "dual", "block_size": 64}, 64)):
        for strategy in ("dream", "dream_threshold"):
            settings_, _policy, dims = settle.plan(spec, STRATEGIES[strategy], EngineConfig(max_model_len=256, **settings))
            assert (settings_.block_size, dims.one_block) == (want, "cache" not in settings)


SETTINGS = {
    "block_length": ("dream_threshold", {}, 8),
    "denoising_steps": ("dream", {}, 4),
    "eps": ("dream", {"denoising_steps": 4}, 0.9),
    "alg_temp": ("dream", {}, 1.0),
    "top_k": ("dream", {}, 2),
    "top_p": ("dream_topk_margin", {}, 0.5),
    "temperature": ("dream_maskgit_plus", {}, 1.0),
    "accept_threshold": ("dream_threshold", {}, 0.2),
    "num_to_transfer": ("dream_threshold", {"accept_threshold": 0.2}, 1),
}


@pytest.mark.sweep_but("block_length", "denoising_steps", "eps", "alg_temp", "top_k", "top_p", "accept_threshold", "num_to_transfer")
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_changes_something(engine_of, name):
    strategy, base, value = SETTINGS[name]
    cached = {"cache": "prefix"} if name == "block_length" else {}
    engine = engine_of(DREAM, strategy=strategy, **cached, **OPTIONS)

    def run(**settings):
        params = SamplingParams(max_tokens=32, seed=0, ignore_eos=True, **base, **settings)
        return [(o.token_ids, o.nfe) for o in engine.generate([[97, 250, 407, 289, 392], [9] * 20], params)]

    assert run() != run(**{name: value})


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        ("dream", {"max_tokens": 129}, "max_tokens=129 is more than the engine's block_size=128, all that this strategy decodes"),
        ("dream", {"denoising_steps": 513}, "denoising_steps=513 is more than 4 for each token of the engine's block_size=128"),
        ("dream", {"block_length": 8}, "block_length=8 means nothing to this engine's strategy, which reads eps, alg_temp"),
        ("dream_origin", {"alg_temp": 1.0}, "alg_temp=1.0 means nothing to this engine's strategy, which reads eps"),
        ("dream_threshold", {"eps": 0.1}, "eps=0.1 means nothing to this engine's strategy, which reads none of these"),
    ],
)
def test_what_a_request_may_not_ask_for(engine_of, strategy, settings, message):
    engine = engine_of(DREAM, strategy=strategy, **OPTIONS)
    with pytest.raises(SettingError, match=message):
        engine.generate([[1, 2]], SamplingParams(**settings))


def test_a_noise_level_is_at_most_1():
    with pytest.raises(SettingError, match=r"eps=1.5 must be at most 1"):
        SamplingParams(eps=1.5)


# The same answer


SETUPS = {
    "dream": {"model": DREAM, "strategy": "dream", **OPTIONS},
    "dream_origin": {"model": DREAM, "strategy": "dream_origin", "cache": "dual", **OPTIONS},
    "dream_threshold": {"model": DREAM, "strategy": "dream_threshold", "cache": "prefix", **OPTIONS},
}


@pytest.fixture(scope="module", params=sweep(SETUPS, but=[]))
def setup(request, engine_of):
    engine = engine_of(**SETUPS[request.param])
    steps, lengths = itertools.cycle([0, 6, 12]), itertools.cycle([0, 12, 24, 1, 40])
    requests = [
        (
            prompt,
            dataclasses.replace(
                params,
                denoising_steps=0 if request.param == "dream_threshold" else next(steps),
                alg_temp=1.0 if request.param == "dream" and i % 4 == 1 else 0.0,
                top_k=30 * (i % 2),
                block_length=next(lengths) if "cache" in SETUPS[request.param] else 0,
            ),
        )
        for i, (prompt, params) in enumerate(same_answer.requests(6, [0.0, 0.7], vocab=490))
    ]
    return request.param, engine, requests, same_answer.alone(engine, requests)


def test_in_a_batch_and_arriving_at_any_moment(setup):
    _name, engine, requests, alone = setup
    assert same_answer.together(engine, requests) == alone
    assert same_answer.arriving(engine, requests, at_once=6) == alone
    assert engine.stats["pages_held"] == engine.stats["prefix_cache_hits"] == 0


def test_preempted_at_every_step(setup):
    _name, engine, requests, alone = setup
    assert same_answer.preempted(engine, requests[:3], every=1) == alone[:3]


def test_restored_in_another_process(setup, tmp_path, request):
    name, engine, requests, alone = setup
    some, cache = slice(2, 4), str(request.config.cache.mkdir("jax"))
    got = same_answer.restored(engine, requests[some], options=SETUPS[name], steps=3, folder=tmp_path, cache=cache)
    assert got == alone[some]


# Configs


def raw(**changes) -> dict:
    given = json.loads((pathlib.Path(DREAM) / "config.json").read_text()) | changes
    return {key: value for key, value in given.items() if value != "left out"}


def test_a_config_is_written_as_it_is_read():
    model = model_of(raw())
    again = model_of(model.config.to_hf())
    assert again == model and again.spec == model.spec
    assert model.spec.attention == AttentionPolicy("whole", canvas="whole", cache="none")
    assert (model.spec.strategy, model.spec.predicts, model.spec.commit_alone) == ("dream", "next", False)


def test_a_config_may_leave_the_mask_out():
    assert model_of(raw(mask_token_id="left out", vocab_size=152_064)).spec.mask_id == 151_666


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": "left out"}, "missing rope_theta"),
        ({"rms_norm_eps": "left out"}, "missing rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented; supported: 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not implemented"),
        ({"architectures": ["DreamVLModel"]}, 'architectures=\\["DreamVLModel"\\] is not implemented'),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling=.* is not implemented"),
    ],
)
def test_what_a_config_may_not_ask_for(changes, message):
    with pytest.raises(ValueError, match=message):
        model_of(raw(**changes))


def test_the_public_size_has_the_parameters_it_is_known_for():
    """Qwen2.5-7B's: 7.62 billion, 15.23 GB in bfloat16."""
    found = sum(int(np.prod(param.shape)) for param in leaves(shape_model("dream-7b").schema).values())
    assert found == pytest.approx(7.616e9, rel=0.001)
