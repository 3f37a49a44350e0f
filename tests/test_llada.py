"""LLaDA: its rules on blocks small enough to check in one's head, its canvas, its configs, and what does not go with it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import same_answer
from plain import attend_to, logits_of, predict
from scripted import block_of, play, script, shown, update
from sweep import sweep

from diffulex_jax import Engine, SamplingParams, SettingError, chain
from diffulex_jax.bench.shapes import shape_model
from diffulex_jax.models.attention import AttentionPolicy
from diffulex_jax.models.base import leaves
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.rules import factor, levenshtein, scheduled, threshold
from diffulex_jax.strategies import STRATEGIES, Strategy
from diffulex_jax.weights import checkpoint
from pallas_kernels.block_attention import canvas_attention
from pallas_kernels.prediction import Sampling


GOLDEN = pathlib.Path(__file__).parent / "golden" / "families"
DENSE, MOE = str(GOLDEN / "tiny-llada"), str(GOLDEN / "tiny-llada-moe")
OPTIONS = {"block_size": 64, "max_slots": 4, "max_model_len": 256, "warm_up": False}
_ = None


# scheduled


@pytest.mark.parametrize(
    ("masks", "steps", "want"),
    [
        (8, 4, [2, 2, 2, 2]),
        (7, 3, [3, 2, 2]),
        (3, 2, [2, 1]),  # of eight positions five are given: what is shared out are the masks, not the block
        (2, 5, [1, 1]),
        (6, 0, [2, 2, 2]),  # num_to_transfer
    ],
)
def test_the_masks_that_a_block_begins_with_are_shared_out(masks, steps, want):
    rule = scheduled()
    state, got = block_of(rule, [*[7] * (8 - masks), *[_] * masks], frozen=8 - masks, denoising_steps=steps, num_to_transfer=2), []
    while state.masked.any():
        before = int(state.masked.sum())
        state = update(rule, state, [1] * 8, [0.5] * 8)
        got.append(before - int(state.masked.sum()))
    assert got == want


def test_the_surest_are_filled_first_and_of_equals_the_first():
    state = block_of(scheduled(), [7, _, _, _, _], frozen=1, num_to_transfer=2)
    state = update(scheduled(), state, range(1, 6), [0.9, 0.3, 0.6, 0.3, 0.1])
    assert shown(state) == [7, 2, 3, _, _]


def test_in_random_order_every_position_is_as_likely_to_be_first_and_every_forward_draws_anew():
    """20 000 requests: chi-square over five masks, and over their pairs of first and second."""
    rule = scheduled(order="random")
    one = block_of(rule, [7, _, _, _, _, _], frozen=1)

    def first_two(seed):
        state = one.replace(key=jnp.stack([jnp.uint32(0), seed])[None])
        firsts = []
        for nfe in range(2):
            state = update(rule, state.replace(nfe=jnp.array([nfe])), [1] * 6, [0.9, 0.1, 0.2, 0.3, 0.4, 0.5])
            firsts.append(state.masked[0, 0, 1:])
        return firsts[0].argmin(), (firsts[0] != firsts[1]).argmax()

    first, second = jax.jit(jax.vmap(first_two))(jnp.arange(20_000, dtype=jnp.uint32))
    pairs = np.zeros((5, 5))
    np.add.at(pairs, (np.asarray(first), np.asarray(second)), 1)
    assert (pairs.diagonal() == 0).all()
    observed = pairs[~np.eye(5, dtype=bool)]
    assert ((observed - 1000) ** 2 / 1000).sum() < 43.8  # 19 degrees of freedom: exceeded once in a thousand times


def test_another_order_is_refused():
    with pytest.raises(ValueError, match="order='left' must be 'confidence' or 'random'"):
        scheduled(order="left")


# threshold(inclusive=True), factor


@pytest.mark.parametrize(
    ("inclusive", "limit", "want"),
    [(True, 0.75, [1, _, 3, _]), (False, 0.75, [_, _, 3, _]), (True, 0.95, [_, _, 3, _])],  # the best one, sure or not
)
def test_a_threshold_may_count_as_reached(inclusive, limit, want):
    rule = threshold(inclusive=inclusive)
    state = block_of(rule, [_, _, _, _], accept_threshold=limit)
    assert shown(update(rule, state, [1, 2, 3, 4], [0.75, 0.5, 0.875, 0.25])) == want


@pytest.mark.parametrize(
    ("probs", "want"),
    [
        # With f = 1 the second needs 2/3, the third 3/4, the fourth 4/5.
        ([0.1, 0.1, 0.1, 0.1], [1, _, _, _]),
        ([0.7, 0.9, 0.1, 0.1], [1, 2, _, _]),
        ([0.6, 0.9, 0.9, 0.9], [1, 2, 3, 4]),  # only the last fails: it is let through
        ([0.6, 0.6, 0.9, 0.9], [_, _, 3, 4]),  # the third fails, and the fourth with it
        ([0.8, 0.8, 0.8, 0.8], [1, 2, 3, 4]),
        ([0.7, 0.7, 0.7, 0.7], [1, 2, _, _]),
    ],
)
def test_the_more_are_filled_the_surer_all_are(probs, want):
    assert shown(update(factor(), block_of(factor(), [_] * 4), [1, 2, 3, 4], probs)) == want


def test_a_factor_fills_among_masks_alone():
    """Of two masks the second is the last: it is filled whatever its probability."""
    state = block_of(factor(), [7, _, 8, _], frozen=1, confidence_factor=0.0)
    assert shown(update(factor(), state, [1, 2, 3, 4], [0.9, 0.5, 0.9, 0.1])) == [7, 2, 8, 4]


# What a forward says


def test_the_mask_has_its_share_of_the_softmax_and_doubted_tokens_none():
    """exp: 4, 2, 1, 1 (the mask), of which the last is never chosen."""
    logits = jnp.log(jnp.array([[4.0, 2.0, 1.0, 8.0]] * 3))
    doubted = jnp.array([[-1, -1], [0, -1], [1, 2]])
    best = predict(logits, jnp.array([3, 1, 0]), forbidden_id=3, sampling=None, counts_all=True, doubted=doubted)
    assert best.token.tolist() == [0, 0, 0]
    np.testing.assert_allclose(best.prob, [4 / 15, 0, 4 / 12], rtol=1e-6)  # a doubted token is chosen all the same
    np.testing.assert_allclose(best.current_prob, [8 / 15, 2 / 11, 4 / 12], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.0])
def test_draws_follow_the_authors_formula(temperature):
    """Their draws are the largest of exp(z) / (-log u)^T, which are of softmax(z / T); the mask id, which they may draw, is none of ours.

    Chi-square over 20 000 draws on seven tokens; confidence is that of softmax(z), the mask's share included.
    """
    z = np.array([1.0, 0.5, 0.0, -0.5, 0.8, -1.0, 0.3, 0.9])
    mask, n = 7, 20_000
    keys = jax.random.split(jax.random.key(3), n)
    row = jnp.full(n, temperature, jnp.float32)
    sampling = Sampling(keys, row, jnp.ones(n), jnp.zeros(n, jnp.int32))
    logits = jnp.broadcast_to(jnp.asarray(z, jnp.float32), (n, 8))
    best = predict(logits, jnp.full(n, mask), forbidden_id=mask, sampling=sampling, counts_all=True)
    theirs = np.exp(z) / (-np.log(np.random.default_rng(0).random((n, 8)))) ** temperature
    drawn = theirs.argmax(-1)
    expected = np.exp(z / temperature)[:mask] / np.exp(z / temperature)[:mask].sum()
    for tokens in (np.asarray(best.token), drawn[drawn != mask]):
        counts = np.bincount(tokens, minlength=mask)
        assert len(counts) == mask
        assert ((counts - len(tokens) * expected) ** 2 / (len(tokens) * expected)).sum() < 22.5  # 6 degrees: once in a thousand times
    np.testing.assert_allclose(best.prob, (np.exp(z) / np.exp(z).sum())[np.asarray(best.token)], rtol=1e-5)


def test_a_row_sees_its_own_canvas_and_all_of_it():
    q = jax.random.normal(jax.random.key(0), (2, 6, 2, 2, 4))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 6, 2, 4))
    got = canvas_attention(q, k, v, length=jnp.array([4, 6]), backend="reference")
    score = jnp.einsum("rtkgh,rskh->rkgts", q, k) / 2
    score = jnp.where(jnp.arange(6) < jnp.array([4, 6])[:, None, None, None, None], score, -jnp.inf)
    np.testing.assert_allclose(got, jnp.einsum("rkgts,rskh->rtkgh", jax.nn.softmax(score, -1), v), atol=1e-5)


# The canvas


def test_blocks_begin_at_the_prompts_end_and_are_as_long_as_asked_for():
    """Three of prompt; seven tokens in blocks of three, the last cut short at the canvas's end. The window shows four positions."""
    says = script([5, 6, 7], (range(16), [0.5] * 16), max_tokens=7, block_length=3, ignore_eos=True)
    (got,), state = play(scheduled(), says, block=4, pages=4, steps=20, whole_canvas=True)
    assert (got.tokens, got.reason, got.nfe) == ([3, 4, 5, 6, 7, 8, 9], "length", 7)
    assert got.starts == [3, 3, 3, 6, 6, 6, 9]
    assert got.trace[2] == [3, 4, 5, _]  # the fourth is of the next block
    assert int(state.written_upto[0]) == 0


def test_what_is_pinned_behind_a_block_stays_there():
    says = script([5], (range(16), [0.5] * 16), max_tokens=6, block_length=2, ignore_eos=True, pinned={2: 13, 5: 12})
    (got,), _state = play(scheduled(), says, block=4, pages=4, steps=20, whole_canvas=True)
    assert (got.tokens, got.nfe) == ([1, 2, 13, 4, 5, 12], 4)


def test_an_eos_ends_an_output_once_all_before_it_is_filled():
    """The surest token of the block is an EOS in its middle."""
    tokens, probs = [*range(2, 9), 14, *range(8)], [0.5] * 7 + [0.9] + [0.4] * 8
    (got,), _state = play(scheduled(), script([5, 6], (tokens, probs), max_tokens=14), block=8, pages=4, steps=20, whole_canvas=True)
    assert (got.tokens, got.reason, got.nfe) == ([4, 5, 6, 7, 8], "stop", 6)


@pytest.mark.sweep
def test_a_step_is_a_forward_over_the_prompt_and_all_masks():
    """Token by token the most probable of a plain forward over the canvas, whatever else is in the batch; with guidance, of two."""
    network, params = checkpoint.load(DENSE, make_mesh())
    forward = jax.jit(lambda ids: logits_of(network, params, ids, attend_to(jnp.ones((len(ids),) * 2, bool)))[0])
    mask, prompt, want = network.spec.mask_id, [3, 1, 4, 1, 5], {}
    for scale in (0.0, 1.5):
        ids = np.array([*prompt, *[mask] * 6])
        while (open_ := np.flatnonzero(ids == mask)).size:
            bare = forward(np.where(np.arange(11) < 5, mask, ids))
            z = bare + (scale + 1) * (forward(ids) - bare)
            p, token = jax.nn.softmax(z, -1), z.at[:, mask].set(-jnp.inf).argmax(-1)
            best = open_[int(p[open_, token[open_]].argmax())]
            ids[best] = int(token[best])
        want[scale] = ids[5:].tolist()
    engine = Engine.from_pretrained(DENSE, strategy="llada", **OPTIONS)
    asked = [SamplingParams(max_tokens=6, ignore_eos=True, cfg_scale=scale) for scale in want]
    long = SamplingParams(max_tokens=100, ignore_eos=True)
    outputs = engine.generate([prompt, prompt, list(range(90))], [*asked, long])
    assert [output.token_ids for output in outputs[:2]] == list(want.values())
    assert want[0.0] != want[1.5]
    assert engine.stats["pages_held"] == 0
    assert engine._device.pool.k.size == 0


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_is_an_approximation_that_the_first_forward_of_a_block_knows_nothing_of(engine_of, cache):
    """With one step a block there is no other. With more, keys and values that are not made anew change what is said."""
    exact, cached = (engine_of("families/tiny-llada", strategy="llada", cache=name, **OPTIONS) for name in ("none", cache))
    prompts = [[97, 250, 407, 289, 392], [9] * 20]
    for steps, same in ((1, True), (8, False)):
        params = SamplingParams(max_tokens=32, block_length=8, denoising_steps=steps, ignore_eos=True)
        one, other = ([(o.token_ids, o.nfe) for o in engine.generate(prompts, params)] for engine in (exact, cached))
        assert (one == other) == same
        assert [nfe for _, nfe in one] == [nfe for _, nfe in other] == [4 * steps] * 2
    with pytest.raises(SettingError, match="cfg_scale=1.0 means nothing to this engine's strategy"):
        cached.generate(prompts, SamplingParams(cfg_scale=1.0))


SETTINGS = {
    "block_length": 8,
    "cfg_scale": 2.0,
    "doubted_token_ids": [141],
    "confidence_factor": 0.0,
    "denoising_steps": 4,
    "num_to_transfer": 3,
    "temperature": 1.0,
    "accept_threshold": 0.2,
    "min_tokens": 30,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_of_a_canvas_changes_something(engine_of, name):
    strategy = {"confidence_factor": "llada_factor", "accept_threshold": "llada_threshold"}.get(name, "llada")
    engine = engine_of("families/tiny-llada", strategy=strategy, **OPTIONS)

    def run(**settings):
        params = SamplingParams(max_tokens=32, seed=0, stop_token_ids=[141] if name == "min_tokens" else [], **settings)
        return [(o.token_ids, o.nfe) for o in engine.generate([[97, 250, 407, 289, 392], [9] * 20], params)]

    assert run() != run(**{name: SETTINGS[name]})


# Configs


def raw(path: str, **changes) -> dict:
    return json.loads((pathlib.Path(path) / "config.json").read_text()) | changes


@pytest.mark.parametrize("path", [DENSE, MOE])
def test_a_config_is_written_as_it_is_read(path):
    model = model_of(raw(path))
    again = model_of(model.config.to_hf())
    assert again == model and again.spec == model.spec
    assert model.spec.attention == AttentionPolicy("whole", canvas="whole", cache="none") and model.spec.strategy == "llada"


def test_both_have_one_model_type_and_are_told_apart():
    dense, moe = model_of(raw(DENSE)), model_of(raw(MOE))
    assert (dense.spec.experts_per_token, moe.spec.experts_per_token) == (0, 4)
    assert "q_norm" not in dense.schema["dense"] and "q_norm" in moe.schema["moe"]
    assert not moe.config.norm_topk_prob and model_of(raw(MOE, norm_topk_prob=True)) == moe
    assert model_of(raw(MOE, model_type="lladamoe")) == moe


@pytest.mark.parametrize(("shape", "total"), [("llada-8b", 8.016e9), ("llada-moe-7b-a1b", 7.36e9)])
def test_public_sizes_have_the_parameters_they_are_known_for(shape, total):
    """16.03 GB in bfloat16 is what the index of LLaDA-8B's files says; of LLaDA-MoE 7 B are known."""
    found = sum(int(np.prod(param.shape)) for param in leaves(shape_model(shape).schema).values())
    assert found == pytest.approx(total, rel=0.001)


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        (DENSE, {"block_type": "sequential"}, "block_type='sequential' is not implemented; supported: 'llama'"),
        (DENSE, {"weight_tying": True}, "weight_tying=True is not implemented"),
        (DENSE, {"include_qkv_bias": True}, "include_qkv_bias=True is not implemented"),
        (DENSE, {"attention_layer_norm": True}, "attention_layer_norm=True is not implemented"),
        (DENSE, {"embedding_size": 640}, "embedding_size=640 is not implemented; supported: that of vocab_size"),
        (DENSE, {"n_heads": 6}, "n_kv_heads=4 must divide n_heads=6"),
        (DENSE, {"n_heads": 64, "n_kv_heads": 64}, "n_heads=64 of d_model=64 gives head_dim=1, which must be even"),
        (DENSE, {"n_layers": 10**6}, "n_layers=1000000 must be at most 4096"),
        (DENSE, {"mlp_hidden_size": None}, "missing mlp_hidden_size"),
        (MOE, {"moe_layer_freq": [0, 1, 1]}, r"moe_layer_freq=\[0, 1, 1\] is not implemented; supported: 1 for every layer"),
        (MOE, {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=True is not implemented"),
        (MOE, {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5 is not implemented; supported: 1.0"),
        (MOE, {"shared_expert_intermediate_size": 32}, "shared_expert_intermediate_size=32 is not implemented; supported: 0"),
        (MOE, {"num_experts_per_tok": 17}, "num_experts_per_tok=17 exceeds num_experts=16"),
    ],
)
def test_what_a_config_may_not_ask_for(path, changes, message):
    with pytest.raises(ValueError, match=message):
        model_of(raw(path, **changes))


# What does not go together


@pytest.mark.parametrize(
    ("model", "options", "field", "message"),
    [
        (DENSE, {"strategy": "llada2"}, "strategy", "'llada2' is not for this model, which sees its whole canvas; choose one of llada, "),
        (DENSE, {"strategy": "dmax"}, "strategy", "strategy 'dmax' is not for this model"),
        (
            DENSE,
            {"strategy": chain(levenshtein(delete_id=1, split_id=2))},
            "strategy",
            "'custom' moves tokens within a block, which a model that sees its whole",
        ),
        (DENSE, {"strategy": Strategy("soft", STRATEGIES["dmax"].rule)}, "strategy", "strategy 'soft' makes soft tokens"),
        (DENSE, {"strategy": "llada", "attention": "block_causal"}, "attention", "attention='block_causal' is not for this model"),
        (DENSE, {"strategy": "llada", "buffer_size": 2}, "buffer_size", "buffer_size=2 must be 1 for this model"),
        (DENSE, {"strategy": "llada", "num_pages": 9}, "num_pages", "num_pages=9 is not for this model, which sees its whole canvas"),
        (DENSE, {"strategy": "llada", "page_size": 8}, "page_size", "page_size=8 is not for this model, which sees its whole canvas"),
        (
            str(GOLDEN / "tiny-sdar"),
            {"strategy": "sdar", "cache": "dual"},
            "cache",
            "cache='dual' is not for this model, which is block-causal",
        ),
        (
            str(GOLDEN / "tiny-sdar"),
            {"strategy": "llada"},
            "strategy",
            "'llada' is not for this model, which is block-causal; choose one of ",
        ),
        (str(GOLDEN / "tiny-sdar"), {"strategy": "sdar", "attention": "full"}, "attention", "attention='full' is not for this model"),
    ],
)
def test_families_refuse_what_is_not_for_them(model, options, field, message):
    with pytest.raises(SettingError, match=message) as caught:
        Engine.from_pretrained(model, max_model_len=256, **options)
    assert caught.value.field == field


# The same answer


REQUESTS = same_answer.requests(6, [0.0, 0.7], vocab=490)
SETUPS = {
    "llada": {"model": DENSE, "strategy": "llada", **OPTIONS},
    "llada_random": {"model": MOE, "strategy": "llada_random", **OPTIONS},
    "dual": {"model": DENSE, "strategy": "llada", "cache": "dual", **OPTIONS},
    "prefix": {"model": DENSE, "strategy": "llada_threshold", "cache": "prefix", **OPTIONS},
}


@pytest.fixture(scope="module", params=sweep(SETUPS, but=["llada"]))
def setup(request):
    engine = Engine.from_pretrained(**SETUPS[request.param])
    lengths = itertools.cycle([0, 8, 24, 1, 40])
    scale = 0.0 if "cache" in SETUPS[request.param] else 1.0
    requests = [
        (prompt, dataclasses.replace(params, block_length=next(lengths), num_to_transfer=3, cfg_scale=scale if i == 3 else 0.0))
        for i, (prompt, params) in enumerate(REQUESTS)
    ]
    return request.param, engine, requests


@pytest.fixture(scope="module")
def alone(setup):
    _name, engine, requests = setup
    return same_answer.alone(engine, requests)


@pytest.mark.sweep
def test_in_a_batch_and_arriving_at_any_moment(setup, alone):
    _name, engine, requests = setup
    assert same_answer.together(engine, requests) == alone
    assert same_answer.arriving(engine, requests, at_once=6) == alone
    assert engine.stats["pages_held"] == engine.stats["prefix_cache_hits"] == 0


def test_preempted_at_every_step(setup):
    _name, engine, requests = setup
    assert same_answer.preempted(engine, requests[:2], every=1) == same_answer.alone(engine, requests[:2])


@pytest.mark.sweep
def test_restored_in_another_process(setup, alone, tmp_path, request):
    name, engine, requests = setup
    some, cache = slice(2, 4), str(request.config.cache.mkdir("jax"))
    got = same_answer.restored(engine, requests[some], options=SETUPS[name], steps=5, folder=tmp_path, cache=cache)
    assert got == alone[some]


def test_tokens_come_as_blocks_fill_from_the_left(setup):
    """What is told of an unfinished request is final: a beginning of its output, the longer the later."""
    _name, engine, requests = setup
    (alone,) = same_answer.alone(engine, requests[1:2])
    (id_,), told, outputs = engine.add(*requests[1]), [], {}
    while not (outputs := engine.step()):
        told.append(list(engine.progress(id_).tokens))
    assert outputs[id_].token_ids == alone
    assert all(tokens == alone[: len(tokens)] for tokens in told)
    assert len({len(tokens) for tokens in told}) > 2
