"""Engine policies: what a prompt sees of itself, what a strategy's name brings along, what the host does meanwhile, what breaks."""

from __future__ import annotations

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import attend_to, probabilities

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.settle import plan
from diffulex_jax.errors import SettingError
from diffulex_jax.parallel.mesh import make_mesh, mesh_of
from diffulex_jax.strategies import STRATEGIES
from diffulex_jax.weights import checkpoint


GOLDEN = pathlib.Path(__file__).parent / "golden"
MODEL = GOLDEN / "tiny-llada2-trained"
BLOCK, MASK, POISON = 8, 1021, 1000
OPTIONS = {"block_size": BLOCK, "max_slots": 2, "max_model_len": 64, "warm_up": False}
NETWORK, PARAMS = checkpoint.load(MODEL, make_mesh())


def prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([n, seed]).integers(0, 900, n).tolist()


def compiled(attend, *, first: int = 0):
    """``probabilities`` of the network as one program: operation by operation, each new length would compile them all."""
    return jax.jit(lambda params, ids: probabilities(NETWORK, params, ids, attend, first=first))


@pytest.mark.sweep_but("21")
@pytest.mark.parametrize("n", [5, 16, 21])
def test_a_full_prefix_sees_all_of_itself(engine_of, n):
    """The prompt's blocks are computed from the whole prompt, what follows its last whole block included."""
    ids, new = prompt(n), 16
    whole = n // BLOCK * BLOCK
    _, kv = compiled(attend_to(jnp.ones((n, n), bool)))(PARAMS, np.array(ids))
    kv = [a[:, :, :whole] for a in kv]
    x = np.full(whole + -(-(n - whole + new) // BLOCK) * BLOCK, MASK)
    x[:n] = ids
    for start in range(whole, n + new, BLOCK):
        part = slice(whole, start + BLOCK)
        block_of = np.arange(start + BLOCK - whole) // BLOCK
        forward = compiled(attend_to(jnp.array(block_of[None] <= block_of[:, None]), kv), first=whole)
        while (x[part] == MASK).any():
            p = np.asarray(forward(PARAMS, x[part])[0])
            open_ = np.flatnonzero(x[part] == MASK)
            prob, best = p.max(-1)[open_], p.argmax(-1)[open_]
            fill = prob > 0.6 if (prob > 0.6).any() else prob == prob.max()
            x[whole + open_[fill]] = best[fill]
    settings = SamplingParams(max_tokens=new, ignore_eos=True, accept_threshold=0.6)
    full = engine_of("tiny-llada2-trained", attention="prefix_full", **OPTIONS)
    assert full.generate([ids], settings)[0].token_ids == x[n : n + new].tolist()
    assert full.generate([ids], settings)[0].token_ids == x[n : n + new].tolist()
    assert full.stats["prefix_cache_hits"] == 0  # a prefix's KV depends on what follows it


def test_a_full_prefix_is_not_cut_into_chunks(engine_of):
    engine = Engine.from_pretrained(str(MODEL), attention="prefix_full", max_batched_tokens=20, **OPTIONS)
    assert len(engine.generate([prompt(20)], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4
    with pytest.raises(ValueError, match="prompt 0 has 21 tokens; with attention='prefix_full' at most max_batched_tokens=20"):
        engine.generate([prompt(21)], SamplingParams(max_tokens=4))


@pytest.mark.parametrize(
    ("name", "window", "attention"), [("llada2", 1, "block_causal"), ("multi_bd", 2, "block_causal"), ("d2f", 4, "prefix_full")]
)
def test_a_strategy_brings_its_window_and_attention_along(name, window, attention):
    settings, policy, dims = plan(NETWORK.spec, STRATEGIES[name], EngineConfig(**OPTIONS))
    assert (dims.window, settings.buffer_size, settings.attention) == (window, window, attention)
    assert policy.chunkable == (attention == "block_causal")


@pytest.mark.sweep
def test_multi_block_diffusion_in_a_window_of_one_is_single_block_decoding(engine_of):
    settings = SamplingParams(max_tokens=30, ignore_eos=True, accept_threshold=0.5)
    prompts = [prompt(n) for n in (3, 17, 30)]
    single, multi = (
        [
            (o.token_ids, o.nfe)
            for o in Engine.from_pretrained(str(MODEL), strategy=name, buffer_size=1, **OPTIONS).generate(prompts, settings)
        ]
        for name in ("llada2", "multi_bd")
    )
    assert single == multi


def test_single_block_decoding_counts_denoising_forwards_and_nothing_else(engine_of):
    """One token a forward; the KV of the eight blocks is written along with other forwards, not by forwards of its own."""
    engine = Engine.from_pretrained(str(MODEL), **OPTIONS)
    output = engine.generate([prompt(8)], SamplingParams(max_tokens=56, ignore_eos=True, accept_threshold=1.0))[0]
    assert (len(output.token_ids), output.nfe) == (56, 56)
    before = engine.stats["prefix_cache_hits"]
    engine.generate([prompt(8) + output.token_ids[:48]], SamplingParams(max_tokens=1, ignore_eos=True))
    assert engine.stats["prefix_cache_hits"] - before == 7  # all of them were written


# The host and the device at once


def test_the_host_works_while_the_device_does():
    """A step launches the next dispatch before it returns what the last one gave."""
    engine = Engine.from_pretrained(str(MODEL), steps_per_dispatch=2, **OPTIONS)
    settings = SamplingParams(max_tokens=40, ignore_eos=True, accept_threshold=1.0)
    (id_,) = engine.add(prompt(8), settings)
    assert engine.step() == {} and engine.progress(id_).nfe == 0  # launched, not waited for
    seen = []
    while engine.has_work:
        outputs = engine.step()
        if id_ not in outputs:
            progress = engine.progress(id_)
            seen.append((progress.nfe, list(progress.tokens)))
    assert [nfe for nfe, _ in seen] == list(range(2, 40, 2))
    final = outputs[id_].token_ids
    assert all(tokens == final[: len(tokens)] for _, tokens in seen)  # nothing is taken back
    assert len(seen[-1][1]) >= 32


def test_a_snapshot_waits_for_the_dispatch_under_way():
    engine = Engine.from_pretrained(str(MODEL), **OPTIONS)
    settings = SamplingParams(max_tokens=40, ignore_eos=True, accept_threshold=1.0)
    alone = engine.generate([prompt(5)], settings)[0].token_ids
    (id_,) = engine.add(prompt(5), settings)
    engine.step()
    taken = engine.snapshot(id_)
    assert engine.progress(id_).nfe == int(taken.saved.row.nfe) == 8
    engine.abort(id_)
    again = engine.restore(taken)
    while engine.has_work:
        outputs = engine.step()
    assert outputs[again].token_ids == alone


def test_a_snapshot_of_a_request_that_ended_meanwhile_is_refused():
    engine = Engine.from_pretrained(str(MODEL), **OPTIONS)
    (id_,) = engine.add(prompt(5), SamplingParams(max_tokens=1, ignore_eos=True))
    engine.step()
    with pytest.raises(KeyError, match="has finished"):
        engine.snapshot(id_)
    assert engine.abort(id_).finish_reason == "abort"
    assert not engine.has_work and engine.step() == {} and engine.stats["pages_held"] == 0


# What is not a number


@pytest.mark.sweep
def test_a_row_that_is_not_a_number_ends_alone_and_leaves_nothing_behind():
    poisoned = PARAMS | {"embed": PARAMS["embed"].at[POISON].set(jnp.nan)}
    settings = SamplingParams(max_tokens=20, ignore_eos=True, accept_threshold=0.6)
    good = [prompt(n) for n in (3, 20, 9, 30, 12)]
    clean = [o.token_ids for o in Engine(NETWORK, PARAMS, **OPTIONS).generate(good, settings)]
    assert all(POISON not in tokens for tokens in clean)
    engine = Engine(NETWORK, poisoned, num_pages=10, **OPTIONS)
    bad = [[POISON, *prompt(n, 1)] for n in (2, 25, 17)]
    mixed = [good[0], bad[0], good[1], bad[1], bad[2], *good[2:]]
    outputs = engine.generate(mixed, settings)
    assert [o.finish_reason for o in outputs] == ["length", "error", "length", "error", "error", "length", "length", "length"]
    assert [o.token_ids for o in outputs if o.finish_reason == "length"] == clean
    assert all(o.token_ids == [] for o in outputs if o.finish_reason == "error")
    assert [o.token_ids for o in engine.generate(good, settings)] == clean
    assert engine.stats["pages_held"] == 0


def test_a_mesh_of_other_axes_or_several_data_shards_is_refused():
    with pytest.raises(ValueError, match="takes a mesh of axes"):
        Engine(NETWORK, PARAMS, mesh=jax.make_mesh((1,), ("x",)), **OPTIONS)


@pytest.mark.parametrize(
    "text, message",
    [
        ("tensor=2", "mesh='tensor=2': a 1x1x2 mesh needs 2 devices; there are 1"),
        ("expert=1, tensor=0", "'tensor=0' is not AXIS=DEVICES with an axis of data, expert, tensor, as in expert=2,tensor=2"),
        ("model=1", "'model=1' is not AXIS=DEVICES"),
        ("tensor", "'tensor' is not AXIS=DEVICES"),
        ("", "'' is not AXIS=DEVICES"),
        ("tensor=1,tensor=1", "tensor stands there twice"),
    ],
)
def test_a_mesh_as_text_that_will_not_do(text, message):
    with pytest.raises(SettingError, match=re.escape(message)) as error:
        Engine.from_pretrained(str(MODEL), mesh=text, **OPTIONS)
    assert error.value.field == "mesh"


def test_a_mesh_as_text():
    assert dict(mesh_of("tensor=1, data=1").shape) == dict(mesh_of(None).shape) == {"data": 1, "expert": 1, "tensor": 1}
