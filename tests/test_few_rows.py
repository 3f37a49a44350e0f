"""A dispatch over the first slots alone, where the kernels ask for it: few requests do not pay for all slots."""

from __future__ import annotations

import numpy as np
import pytest
from scripted import MODEL
from test_warm_up import PARAMS

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.engine import build
from pallas_kernels import choose


PROMPTS = [np.random.default_rng(n).integers(0, 8, n).tolist() for n in (3, 9, 30, 5, 17)]
MIXED = [SamplingParams(max_tokens=6 + 5 * n, seed=n, temperature=0.7 * (n % 2), logprobs=n == 1) for n in range(5)]


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(build, "choose", lambda device: choose(device)._replace(few_rows=(2, 3, 9)))
    return Engine(MODEL, PARAMS, block_size=4, max_slots=4, max_model_len=64, warm_up=False)


def test_few_requests_run_in_few_rows_and_answer_the_same(engine):
    rows, run = [], engine._device._dispatch
    engine._device._dispatch = lambda kind, count, **bounds: rows.append(count) or run(kind, count, **bounds)
    wanted = Engine(MODEL, PARAMS, block_size=4, max_slots=4, max_model_len=64, warm_up=False).generate(PROMPTS, MIXED)
    alone = engine.generate(PROMPTS[:1], MIXED[:1])
    assert set(rows) == {2}
    rows.clear()
    outputs = engine.generate(PROMPTS, MIXED)
    assert rows[0] == 4 and rows[-1] == 2  # all slots at first; the last request came to one of the first slots
    for got, want in zip([*alone, *outputs], [wanted[0], *wanted], strict=True):
        assert got.token_ids == want.token_ids and got.nfe == want.nfe
    np.testing.assert_allclose(outputs[1].logprobs, wanted[1].logprobs, rtol=1e-5)


def test_a_request_that_runs_alone_takes_the_first_slot_there_is(engine):
    (first,), (second,) = (engine.add(prompt, SamplingParams(max_tokens=40, ignore_eos=True)) for prompt in PROMPTS[:2])
    engine.step()
    engine.step()
    engine.discard(first)
    (third,) = engine.add(PROMPTS[2], SamplingParams(max_tokens=8))
    engine.step()
    assert sorted(engine._scheduler.running) in ([0, 1], [1])
    done = {}
    while not {second, third} <= set(done):
        done |= engine.step()
    assert len(done[second].token_ids) == 40


@pytest.mark.sweep
def test_a_warm_engine_has_a_program_for_each_number_of_rows(engine):
    engine._device.warm_up()
    names = {name[-1] for name in engine._device._programs._found if name[0] == "denoise"}
    assert names == {2, 3, 4}  # nine are more than there are
