"""The same answer whatever else is in the batch, cached, preempted, or resumed: token for token, greedy and sampled."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.engine.snapshot import Snapshot


TRAINED = str(GOLDEN / "tiny-llada2-trained")
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, int(n)).tolist() for n in RNG.integers(1, 150, 16)]
PARAMS = [
    SamplingParams(max_tokens=int(RNG.integers(20, 100)), temperature=t, seed=i, accept_threshold=0.6, ignore_eos=True)
    for i, t in enumerate([0.0, 0.7] * 8)
]
OPTIONS = {"max_slots": 8, "max_model_len": 256}
STRATEGIES = [("llada2_edit", 2), ("dmax", 1)]


@pytest.fixture(scope="module", params=STRATEGIES, ids=lambda p: f"{p[0]}-{p[1]}")
def setup(request):
    strategy, window = request.param
    build = functools.partial(Engine.from_pretrained, TRAINED, strategy=strategy, buffer_size=window, **OPTIONS)
    engine = build()
    alone = [engine.generate([prompt], params)[0].token_ids for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    return build, engine, alone


def answers(outputs):
    return [output.token_ids for output in outputs]


def test_in_a_batch_and_from_the_prefix_cache(setup):
    _, engine, alone = setup
    before = engine.stats
    assert answers(engine.generate(PROMPTS, PARAMS)) == alone
    assert engine.stats["prefix_cache_hits"] > before["prefix_cache_hits"]
    assert engine.stats["pages_held"] == 0


def test_arriving_at_any_moment(setup):
    _, engine, alone = setup
    left, outputs, ids = list(range(16)), {}, {}
    rng = np.random.default_rng(1)
    while left or len(outputs) < 16:
        for _ in range(int(rng.integers(0, 3))):
            if left:
                i = left.pop(0)
                ids[engine.add(PROMPTS[i], PARAMS[i])[0]] = i
        outputs.update({ids[id_]: output.token_ids for id_, output in engine.step().items()})
    assert [outputs[i] for i in range(16)] == alone


def test_with_a_pool_of_thirty_per_cent_and_no_prefix_cache(setup):
    build, _, alone = setup
    engine = build(num_pages=19, prefix_cache=False)
    assert answers(engine.generate(PROMPTS, PARAMS)) == alone
    assert engine.stats["preemptions"] > 0 and engine.stats["prefix_cache_hits"] == 0


@pytest.mark.parametrize("every", [1, 3])
def test_preempted_at_every_step(setup, every, monkeypatch):
    _, engine, alone = setup
    monkeypatch.setattr(engine._scheduler, "steps_per_dispatch", 1)
    ids = [engine.add(prompt, params)[0] for prompt, params in zip(PROMPTS[:3], PARAMS[:3], strict=True)]
    outputs, steps = {}, 0
    while len(outputs) < 3:
        outputs |= engine.step()
        steps += 1
        running = list(engine._scheduler.running.values())
        if running and steps % every == 0:
            engine._scheduler.preempt(running[steps % len(running)])
    assert [outputs[id_].token_ids for id_ in ids] == alone[:3]


RESTORE = """
import pickle, sys, jax
from diffulex_jax import Engine
from diffulex_jax.engine.snapshot import Snapshot
path, options, cache = pickle.load(sys.stdin.buffer)
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
engine = Engine.from_pretrained(**options)
id_ = engine.restore(Snapshot.load(path, like=engine.saved_structure))
outputs = {}
while id_ not in outputs:
    outputs |= engine.step()
print(outputs[id_].token_ids)
"""


def test_restored_in_another_process(tmp_path, monkeypatch, request):
    options = {"model": TRAINED, "strategy": "dmax", **OPTIONS}
    engine = Engine.from_pretrained(**options)
    alone = engine.generate([PROMPTS[1]], PARAMS[1])[0].token_ids
    monkeypatch.setattr(engine._scheduler, "steps_per_dispatch", 1)
    (id_,) = engine.add(PROMPTS[1], PARAMS[1])
    for _ in range(12):
        assert not engine.step()
    engine.snapshot(id_).save(tmp_path / "request.safetensors")
    job = pickle.dumps((str(tmp_path / "request.safetensors"), options, str(request.config.cache.mkdir("jax"))))
    done = subprocess.run([sys.executable, "-c", RESTORE], input=job, capture_output=True, check=True)
    assert done.stdout.decode().strip().splitlines()[-1] == str(alone)


def test_a_snapshot_of_another_engine_is_refused(tmp_path):
    engine = Engine.from_pretrained(TRAINED, strategy="llada2", **OPTIONS)
    (id_,) = engine.add(PROMPTS[0], PARAMS[0])
    engine.snapshot(id_).save(tmp_path / "waiting")
    taken = Snapshot.load(tmp_path / "waiting", like=engine.saved_structure)
    assert taken.saved is None and taken.params == PARAMS[0]
    other = Engine.from_pretrained(TRAINED, strategy="llada2", max_slots=8, max_model_len=128)
    with pytest.raises(ValueError, match="the snapshot is of"):
        other.restore(taken)
    engine.abort(id_)


def test_a_second_turn_reuses_the_first_turns_generated_blocks():
    engine = Engine.from_pretrained(TRAINED, strategy="llada2", **OPTIONS)
    first = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=100, ignore_eos=True, accept_threshold=0.6))[0]
    whole = PROMPTS[0] + first.token_ids
    before = engine.stats["prefix_cache_hits"]
    engine.generate([whole + [5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))
    written = (len(whole) - 1) // 32  # the last block of a request is never written: nothing comes after it
    assert engine.stats["prefix_cache_hits"] - before == written
