"""What an engine compiles, and when: nothing a second time, and nothing while a request waits that was asked for before."""

from __future__ import annotations

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import MODEL

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.models.base import init


PARAMS = init(MODEL, jax.random.key(0), jnp.float32, scale=0.5)
LENGTHS = [1, 3, 9, 70]
PROMPTS = [np.random.default_rng(n).integers(0, 8, n).tolist() for n in LENGTHS]
MIXED = [SamplingParams(max_tokens=9, seed=3, temperature=t, logprobs=t > 0) for t in (0.0, 0.7, 0.0, 1.0)]


def engine_of(**settings) -> Engine:
    return Engine(MODEL, PARAMS, block_size=4, page_size=8, max_slots=2, max_model_len=128, **settings)


@pytest.fixture(scope="module")
def every_program():
    names: list[str] = []

    def note(event: str, _seconds: float, **about) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)  # there is no way to take it out
    return names


@pytest.fixture
def compiled(every_program):
    """The names of the programs that were compiled, or read from disk, since the test began, or since ``clear()``."""
    every_program.clear()
    return every_program


@pytest.mark.sweep
@pytest.mark.parametrize("attention", ["block_causal", "prefix_full"])
def test_an_engine_that_is_built_compiles_nothing_more(compiled, attention):
    """For prompts of any length, greedy and sampled, set aside, and taken to another engine."""
    engine = engine_of(attention=attention, num_pages=10)
    assert len(compiled) > 7
    compiled.clear()
    outputs = engine.generate(PROMPTS[::-1] * 2, MIXED * 2)
    assert engine.stats["preemptions"] > 0 and not compiled
    (id_,) = engine.add(PROMPTS[1], MIXED[0])
    assert not engine.step()
    again = engine.restore(engine.snapshot(id_))
    engine.discard(id_)
    while again not in (done := engine.step()):
        pass
    assert done[again].token_ids == engine.generate([PROMPTS[1]], MIXED[0])[0].token_ids != outputs[0].token_ids
    assert not compiled


@pytest.mark.sweep_but("block_causal")
@pytest.mark.parametrize("attention", ["block_causal", "prefix_full"])
def test_without_warm_up_what_is_needed_is_compiled_when_it_is(compiled, attention):
    engine = engine_of(attention=attention, warm_up=False)
    assert len(compiled) == 1  # what makes an empty pool
    (first,) = engine.generate(PROMPTS[:1], MIXED[:1])
    assert "jit(traced)" in compiled and len(compiled) <= 4
    later, warm = engine.generate(PROMPTS, MIXED), engine_of(attention=attention).generate(PROMPTS, MIXED)
    assert [output.token_ids for output in later] == [output.token_ids for output in warm]
    assert later[0].token_ids == first.token_ids


@pytest.mark.sweep_but("chosen1-block_causal", "chosen2-block_causal")
@pytest.mark.parametrize("attention", ["block_causal", "prefix_full"])
@pytest.mark.parametrize("chosen", [slice(1), slice(1, 2), slice(4)])
def test_warmed_up_for_prompts_these_wait_for_no_compiler(compiled, attention, chosen):
    engine = engine_of(attention=attention, warm_up=False)
    engine.warm_up(PROMPTS[chosen], MIXED[chosen])
    assert "jit(traced)" in compiled
    compiled.clear()
    engine.generate(PROMPTS[chosen] * 2, MIXED[chosen] * 2)
    assert not compiled
    engine.warm_up(PROMPTS[chosen], MIXED[chosen])
    assert not compiled


def test_one_short_prompt_needs_no_prefill_and_nobody_to_be_set_aside(compiled):
    engine = engine_of(warm_up=False)
    compiled.clear()
    engine.warm_up([[1, 2, 3]])
    assert compiled.count("jit(traced)") == 1 and not {"jit(take)", "jit(_read_pages)", "jit(_write_pages)"} & set(compiled)
    compiled.clear()
    engine.warm_up([[1, 2, 3, 4, 5]])
    assert compiled == ["jit(traced)"]


def test_warming_up_harms_no_request():
    engine = engine_of(warm_up=False)
    (id_,) = engine.add([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
    with pytest.raises(RuntimeError, match="1 requests are queued or running"):
        engine.warm_up([[1]])
    with pytest.raises(ValueError, match="prompt 0 holds token id 99"):
        engine.warm_up([[99]])
    while id_ not in (done := engine.step()):
        pass
    assert len(done[id_].token_ids) == 2


@pytest.mark.parametrize("strategy", ["llada2", "dmax"])
def test_what_a_saved_request_looks_like_is_known_without_saving_one(strategy):
    engine = engine_of(strategy=strategy, warm_up=False)
    (id_,) = engine.add([1, 2, 3], SamplingParams(max_tokens=9, ignore_eos=True))
    engine.step()
    saved, known = engine.snapshot(id_).saved, engine.saved_structure
    assert jax.tree.structure(saved) == jax.tree.structure(known)
    for a, b in zip(jax.tree.leaves(saved.row), jax.tree.leaves(known.row), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
