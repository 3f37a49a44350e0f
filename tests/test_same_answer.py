"""The same answer whatever else is in the batch, cached, preempted, or resumed: token for token, greedy and sampled."""

from __future__ import annotations

import functools
import pathlib

import pytest
import same_answer

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.engine.snapshot import Snapshot


GOLDEN = pathlib.Path(__file__).parent / "golden"
TRAINED = str(GOLDEN / "tiny-llada2-trained")
REQUESTS = same_answer.requests(8, [0.0, 0.7])
PROMPTS, PARAMS = zip(*REQUESTS, strict=True)
OPTIONS = {"max_slots": 8, "max_model_len": 256}
STRATEGIES = [("llada2_edit", 2), ("dmax", 1)]


@pytest.fixture(scope="module", params=STRATEGIES, ids=lambda p: f"{p[0]}-{p[1]}")
def setup(request):
    strategy, window = request.param
    build = functools.partial(Engine.from_pretrained, TRAINED, strategy=strategy, buffer_size=window, **OPTIONS)
    engine = build()
    return build, engine, same_answer.alone(engine, REQUESTS)


def test_in_a_batch_and_from_the_prefix_cache(setup):
    _, engine, alone = setup
    before = engine.stats
    assert [output.token_ids for output in engine.generate(PROMPTS, PARAMS)] == alone
    assert engine.stats["prefix_cache_hits"] > before["prefix_cache_hits"]
    assert engine.stats["pages_held"] == 0


def test_arriving_at_any_moment(setup):
    _, engine, alone = setup
    assert same_answer.arriving(engine, REQUESTS, at_once=8) == alone


def test_with_a_pool_of_thirty_per_cent_and_no_prefix_cache(setup):
    build, _, alone = setup
    engine = build(num_pages=19, prefix_cache=False)
    assert [output.token_ids for output in engine.generate(PROMPTS, PARAMS)] == alone
    assert engine.stats["preemptions"] > 0 and engine.stats["prefix_cache_hits"] == 0


@pytest.mark.parametrize("every", [1, 3])
def test_preempted_at_every_step(setup, every):
    _, engine, alone = setup
    assert same_answer.preempted(engine, REQUESTS[:3], every=every) == alone[:3]


def test_restored_in_another_process(tmp_path, request):
    options, some = {"model": TRAINED, "strategy": "dmax", **OPTIONS}, REQUESTS[1:2]
    engine = Engine.from_pretrained(**options)
    alone = same_answer.alone(engine, some)
    cache = str(request.config.cache.mkdir("jax"))
    assert same_answer.restored(engine, some, options=options, steps=5, folder=tmp_path, cache=cache) == alone


def test_a_snapshot_of_another_engine_is_refused(tmp_path):
    engine = Engine.from_pretrained(TRAINED, strategy="llada2", **OPTIONS)
    (id_,) = engine.add(PROMPTS[0], PARAMS[0])
    engine.snapshot(id_).save(tmp_path / "waiting")
    taken = Snapshot.load(tmp_path / "waiting", like=engine.saved_structure)
    assert taken.saved is None and taken.params == PARAMS[0].resolve()
    other = Engine.from_pretrained(TRAINED, strategy="llada2", max_slots=8, max_model_len=128)
    with pytest.raises(ValueError, match="the snapshot is of positions='256'; this engine has positions='128'"):
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
