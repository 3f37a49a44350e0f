"""What a request can ask for beside its thresholds: ends, fixed positions, and what it wants to know."""

from __future__ import annotations

import math
import pathlib

import pytest

from diffulex_jax import SamplingParams
from diffulex_jax.engine.admission import check
from diffulex_jax.engine.build import limits_of
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.sampling_params import seeds


GOLDEN = pathlib.Path(__file__).parent / "golden"
MODEL = "tiny-llada2-trained"
OPTIONS = {"max_slots": 8, "max_model_len": 256, "warm_up": False}
PROMPT = list(range(40, 53))


@pytest.fixture
def engine(engine_of):
    return engine_of(MODEL, strategy="llada2_edit", **OPTIONS)


@pytest.fixture
def talker(engine_of):
    """The embedded model: the one with a tokenizer."""
    return engine_of("embedded", strategy="llada2", max_slots=8, max_model_len=256)


@pytest.mark.sweep
def test_stop_texts_cut_wherever_they_begin(talker):
    question = "What is 12 + 30?"
    whole = talker.generate([question], SamplingParams(max_tokens=60))[0]
    assert whole.text.endswith("So the answer is 42.")
    for stop in ("So the", " answer is", "er is 4", "12 + 30 = 42. So"):
        cut = talker.generate([question], SamplingParams(max_tokens=60, stop=["never", stop]))[0]
        assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
        assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
        assert cut.text.startswith(talker.tokenizer.decode(cut.token_ids))
    assert talker.generate([question], SamplingParams(max_tokens=60, stop="never"))[0].token_ids == whole.token_ids


def test_a_stop_text_needs_a_tokenizer(engine):
    with pytest.raises(ValueError, match="stop=.* needs a tokenizer"):
        engine.generate([PROMPT], SamplingParams(stop="x"))


def test_stop_tokens_end_and_min_tokens_holds_them_back(engine):
    whole = engine.generate([PROMPT], SamplingParams(max_tokens=60, ignore_eos=True))[0].token_ids
    stop = whole[20]
    cut = engine.generate([PROMPT], SamplingParams(max_tokens=60, ignore_eos=True, stop_token_ids=[stop]))[0]
    assert cut.finish_reason == "stop" and stop not in cut.token_ids
    late = engine.generate([PROMPT], SamplingParams(max_tokens=60, ignore_eos=True, stop_token_ids=[stop], min_tokens=50))[0]
    assert len(late.token_ids) >= 50 and stop not in late.token_ids


def test_too_many_stop_tokens_are_refused(engine):
    with pytest.raises(ValueError, match="at most 7 stop_token_ids beside 1 EOS ids, got 8"):
        engine.generate([PROMPT], SamplingParams(stop_token_ids=range(8)))


def test_the_repetition_guard_keeps_the_allowed_run(engine):
    pinned = dict.fromkeys(range(5, 12), 7)
    whole = engine.generate([PROMPT], SamplingParams(max_tokens=20, ignore_eos=True, pinned=pinned))[0].token_ids
    cut = engine.generate([PROMPT], SamplingParams(max_tokens=20, ignore_eos=True, pinned=pinned, max_repetition_run=3))[0]
    assert cut.finish_reason == "repetition"
    assert cut.token_ids == whole[: len(cut.token_ids)] and cut.token_ids[-3:] == [cut.token_ids[-1]] * 3


def test_pinned_positions_stay_and_initial_ones_may_change(engine):
    pinned, start = {0: 7, 5: 9, 40: 11}, {1: 500, 2: 501, 41: 502}
    output = engine.generate(
        [PROMPT],
        SamplingParams(max_tokens=60, ignore_eos=True, pinned=pinned, init_tokens=start, edit_threshold=0.0, return_step_map=True),
    )[0]
    assert [output.token_ids[i] for i in pinned] == [7, 9, 11]
    assert [output.step_map[i] for i in pinned] == [(0, 0)] * 3
    assert output.revised_tokens >= 3
    assert [output.token_ids[i] for i in start] != [500, 501, 502]


@pytest.mark.parametrize("token", [1021, 4000])
def test_tokens_that_cannot_be_given_are_refused(engine, token):
    with pytest.raises(ValueError, match=rf"pinned\[3\]={token} is not a token that can be given"):
        engine.generate([PROMPT], SamplingParams(pinned={3: token}))


def test_logprobs_and_step_maps_agree_with_the_trace(engine_of):
    # The model with random weights: it changes its mind all the time.
    engine = engine_of("tiny-llada2", strategy="llada2_edit", **OPTIONS)
    params = SamplingParams(max_tokens=60, ignore_eos=True, accept_threshold=0.3, edit_threshold=0.0, logprobs=True, return_step_map=True)
    output = engine.generate([PROMPT], params, trace=True)[0]
    first, last, confidence = {}, {}, {}
    for number, step in enumerate(output.trace, 1):
        for i, position in enumerate(range(step.start, step.start + len(step.tokens))):
            if not step.masked[i] and position >= len(PROMPT):
                first.setdefault(position, number)
                if position not in last or step.revised[i]:
                    last[position] = number
                confidence[position] = float(step.confidence[i])
    made = range(len(PROMPT), len(PROMPT) + 60)
    assert output.step_map == [(first[p], last[p]) for p in made]
    assert output.logprobs == pytest.approx([math.log(confidence[p]) for p in made])
    assert any(accepted < revised for accepted, revised in output.step_map)  # something was revised


@pytest.mark.sweep
def test_a_salt_keeps_cached_prefixes_apart(engine):
    prompt = [*range(100, 170)]  # two whole blocks
    hits = []
    for salt in ("", "a", "", "a", "b"):
        before = engine.stats["prefix_cache_hits"]
        engine.generate([prompt], SamplingParams(max_tokens=1, cache_salt=salt))
        hits.append(engine.stats["prefix_cache_hits"] - before)
    assert hits == [0, 0, 2, 2, 0]


@pytest.mark.sweep
def test_each_of_n_outputs_has_a_seed_of_its_own_that_gives_it_again(engine):
    settings = {"max_tokens": 30, "temperature": 1.0, "ignore_eos": True}
    several = engine.generate([PROMPT, PROMPT[:5]], SamplingParams(n=3, seed=5, **settings))
    each = seeds(SamplingParams(seed=5, n=3))
    alone = [engine.generate([p], SamplingParams(seed=seed, **settings))[0] for p in (PROMPT, PROMPT[:5]) for seed in each]
    assert [o.token_ids for o in several] == [o.token_ids for o in alone]


def test_abort_at_any_moment_gives_the_final_tokens_and_the_pages_back(engine):
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    whole = engine.generate([PROMPT], params)[0].token_ids
    for steps in (0, 1, 3, 5):
        (id_,) = engine.add(PROMPT, params)
        for _ in range(steps):
            engine.step()
        output = engine.abort(id_)
        assert output.finish_reason == "abort"
        assert output.token_ids == whole[: len(output.token_ids)] and len(output.token_ids) < 100
        assert engine.stats["pages_held"] == engine.stats["running"] == 0
    with pytest.raises(KeyError):
        engine.abort(id_)


def test_a_request_that_could_never_fit_is_refused():
    limits, _ = limits_of(str(GOLDEN / MODEL), "llada2_edit", EngineConfig(num_pages=2, **OPTIONS))
    with pytest.raises(ValueError, match="prompt needs 3 pages with max_tokens=60; the pool has 2"):
        check(limits, PROMPT, SamplingParams(max_tokens=60).resolve(), name="prompt")


@pytest.mark.sweep
def test_a_wider_window_spends_fewer_forwards(engine, engine_of):
    params = SamplingParams(max_tokens=96, ignore_eos=True, accept_threshold=0.5, edit_threshold=2.0)
    prompts = [PROMPT, PROMPT[:3], PROMPT * 3]
    wider = engine_of(MODEL, strategy="llada2_edit", buffer_size=2, **OPTIONS)
    narrow, wide = (sum(output.nfe for output in one.generate(prompts, params)) for one in (engine, wider))
    assert wide < narrow
