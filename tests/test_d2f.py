"""LLaDA and Dream as D2F trains them further: blocks behind a prompt that sees all of itself, several at once, with an exact cache."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import same_answer
from plain import attend_to, logits_of
from scripted import play, script
from sweep import sweep

from diffulex_jax import Engine, SettingError
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.settle import plan
from diffulex_jax.models.attention import AttentionPolicy, Where
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.strategies import STRATEGIES
from diffulex_jax.weights import checkpoint
from pallas_kernels.block_attention import write_positions


GOLDEN = pathlib.Path(__file__).parent / "golden" / "families"
LLADA, DREAM, SDAR = (str(GOLDEN / name) for name in ("tiny-llada", "tiny-dream", "tiny-sdar"))
D2F = STRATEGIES["d2f"]


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_logits(name):
    """A prompt of 13 and blocks of 9, as the authors' code sees them."""
    network, params = checkpoint.load(GOLDEN / name, make_mesh())
    with np.load(GOLDEN / f"{name}.logits.npz") as file:
        ids, rows, want = file["ids2"], file["rows_d2f"], file["logits_d2f"]
    at = jnp.arange(len(ids))
    where = Where(jnp.maximum((at - 13) // 9 + 1, 0), at < 13)
    mask = network.spec.in_blocks().attention.mask(where, where)
    got = np.asarray(jax.jit(lambda params, ids: logits_of(network, params, ids, attend_to(mask))[0])(params, ids))
    np.testing.assert_allclose(got[rows], want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("model", "carried"), [(LLADA, 0), (DREAM, 64)])
def test_the_strategy_alone_makes_blocks_of_a_canvas(model, carried):
    spec = checkpoint.load_model(pathlib.Path(model)).spec
    settings, policy, dims = plan(spec, D2F, EngineConfig(max_model_len=256))
    assert policy == AttentionPolicy("whole") and policy.paged and not policy.shareable
    assert (settings.attention, settings.block_size, settings.buffer_size) == ("prefix_full", 32, 4)
    assert (dims.prompt_apart, dims.whole_canvas, dims.commit_alone, dims.carried) == (True, False, False, carried)
    _, policy, dims = plan(spec, STRATEGIES[spec.strategy], EngineConfig(max_model_len=256))
    assert policy == spec.attention and (dims.prompt_apart, dims.whole_canvas, dims.carried) == (False, True, 0)


def test_a_model_made_of_blocks_keeps_its_own():
    """There blocks are counted from position 0, whatever its prompt sees."""
    _, policy, dims = plan(checkpoint.load_model(pathlib.Path(SDAR)).spec, D2F, EngineConfig(max_model_len=256))
    assert policy == AttentionPolicy("whole") and not dims.prompt_apart and dims.block == 4


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"strategy": "d2f", "attention": "full"}, "strategy", "strategy 'd2f' is not for this model, which sees its whole canvas"),
        (
            {"strategy": "llada", "attention": "prefix_full"},
            "strategy",
            "strategy 'llada' is not for this model, which is block-causal with attention='prefix_full'; choose one of .*d2f",
        ),
        ({"strategy": "d2f", "attention": "block_causal"}, "attention", "attention='block_causal' is not for this model"),
        ({"strategy": "d2f", "cache": "dual"}, "cache", "cache='dual' is not for this model, which is block-causal with attention="),
        ({"strategy": "d2f", "sub_block_cache": 8}, "sub_block_cache", "sub_block_cache=8 is not for this model"),
        ({"strategy": "d2f", "page_size": 24}, "page_size", "page_size=24 must be a multiple of block_size=32, or divide it"),
    ],
)
@pytest.mark.parametrize("model", [LLADA, DREAM])
def test_what_does_not_go_with_it(model, options, field, message):
    if model == DREAM and options["strategy"] == "llada":
        options = options | {"strategy": "dream"}
        message = message.replace("llada", "dream")
    with pytest.raises(SettingError, match=message) as caught:
        Engine.from_pretrained(model, max_model_len=256, **options)
    assert caught.value.field == field


# The pool


def test_positions_are_written_where_they_lie():
    """Two rows of three positions, each in two pages; a page past the pool takes nothing."""
    pool = jnp.zeros((1, 3, 2, 1, 1))
    fresh = jnp.arange(1.0, 7.0).reshape(1, 2, 3, 1, 1)
    written = write_positions(pool, fresh, jnp.array([[0, 2, 2], [3, 3, 1]]), jnp.array([[1, 0, 1], [0, 1, 0]]))
    assert written.reshape(3, 2).tolist() == [[0, 1], [6, 0], [2, 3]]


# Many blocks at once


def test_a_block_may_wait_for_all_those_before_it():
    """Nothing is sure: each forward fills one position, in the first block that is not full, and no block is ended by force."""
    prompt, tokens = [5, 6, 7], list(range(13)) + [0] * 11
    settings = {"add_block_threshold": 0.0, "semi_complete_threshold": 1.0, "max_post_edit_steps": 0}
    says = script(prompt, (tokens[:20], [0.5] * 20), max_tokens=16, ignore_eos=True, **settings)
    (got,), _state = play(D2F.rule, says, block=2, pages=10, steps=40, window=8, prompt_apart=True)
    assert (got.nfe, got.starts[0], got.reason) == (16, 3, "length")
    filled = [sum(token is not None for token in step) + start - 3 for step, start in zip(got.trace, got.starts, strict=True)]
    assert filled == list(range(1, 17))


# The same answer


SETUPS = {
    "llada": {"model": LLADA, "block_size": 16},
    "dream": {"model": DREAM, "block_size": 8, "page_size": 16},
}


def options_of(name: str) -> dict:
    """An engine's, with a pool that does not hold all requests at once."""
    return {"strategy": "d2f", "max_slots": 6, "max_model_len": 256, "num_pages": 32, "warm_up": False, **SETUPS[name]}


@pytest.fixture(scope="module", params=sweep(SETUPS, but=[]))
def setup(request):
    engine, requests = Engine.from_pretrained(**options_of(request.param)), same_answer.requests(5, [0.0, 0.7], vocab=490)
    return request.param, engine, requests, same_answer.alone(engine, requests)


def test_in_a_batch_and_arriving_at_any_moment(setup):
    _name, engine, requests, alone = setup
    assert same_answer.together(engine, requests) == alone
    assert same_answer.arriving(engine, requests, at_once=6) == alone
    assert engine.stats["preemptions"] > 0 and engine.stats["pages_held"] == engine.stats["prefix_cache_hits"] == 0


def test_preempted_at_every_step(setup):
    _name, engine, requests, alone = setup
    assert same_answer.preempted(engine, requests[:3], every=1) == alone[:3]


def test_restored_in_another_process(setup, tmp_path, request):
    name, engine, requests, alone = setup
    cache = str(request.config.cache.mkdir("jax"))
    got = same_answer.restored(engine, requests[2:4], options=options_of(name), steps=5, folder=tmp_path, cache=cache)
    assert got == alone[2:4]
