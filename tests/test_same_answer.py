"""The same answer whatever else is in the batch, cached, preempted, or resumed: token for token, greedy and sampled."""

from __future__ import annotations

import functools
import pathlib

import pytest
import same_answer
from sweep import sweep

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.engine.build import limits_of
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.snapshot import Snapshot


GOLDEN = pathlib.Path(__file__).parent / "golden"
TRAINED = str(GOLDEN / "tiny-llada2-trained")
REQUESTS = same_answer.requests(8, [0.0, 0.7])
PROMPTS, PARAMS = zip(*REQUESTS, strict=True)
OPTIONS = {"max_slots": 8, "max_model_len": 256, "warm_up": False}
SDAR = str(GOLDEN / "families" / "tiny-sdar-trained")
FAST = str(GOLDEN / "families" / "tiny-fast-dllm-v2-trained")
# Where so few tokens go together, prompts are cut, and not where they are when they are alone.
SETUPS = {
    "llada2_edit": {"model": TRAINED, "strategy": "llada2_edit", "buffer_size": 2, **OPTIONS},
    "dmax": {"model": TRAINED, "strategy": "dmax", **OPTIONS},
    "sdar-4": {"model": SDAR, "strategy": "sdar", "buffer_size": 2, "max_batched_tokens": 72, **OPTIONS},
    "sdar-32": {"model": SDAR, "strategy": "sdar_leftmost", "block_size": 32, "force_block_size": True, **OPTIONS},
    "fast-8": {
        "model": FAST,
        "strategy": "fast_dllm_v2",
        "block_size": 8,
        "force_block_size": True,
        "page_size": 16,
        "max_batched_tokens": 40,
        **OPTIONS,
    },
    "fast-32": {"model": FAST, "strategy": "fast_dllm_v2", **OPTIONS},
    "fast-cached": {"model": FAST, "strategy": "fast_dllm_v2", "sub_block_cache": 8, **OPTIONS},
}


POOL = 0.3  # of what all slots could hold: requests are set aside in every way of running them


def options_of(name: str) -> dict:
    """An engine's, with a small pool: one shape of it for every test compiles once."""
    settings = {key: value for key, value in SETUPS[name].items() if key not in ("model", "strategy")}
    limits, _ = limits_of(SETUPS[name]["model"], SETUPS[name]["strategy"], EngineConfig(**settings))
    return SETUPS[name] | {"num_pages": int(POOL * limits.num_pages)}


def requests_of(name: str) -> list[same_answer.Request]:
    return same_answer.requests(8, [0.0, 0.7], vocab=500) if name.startswith(("sdar", "fast")) else REQUESTS


@pytest.fixture(scope="module", params=sweep(SETUPS, but=["sdar-4"]))
def setup(request):
    requests, build = requests_of(request.param), functools.partial(Engine.from_pretrained, **options_of(request.param))
    engine = build()
    return build, engine, requests, same_answer.alone(engine, requests)


def test_in_a_batch_and_from_the_prefix_cache(setup):
    _, engine, requests, alone = setup
    before = engine.stats
    assert same_answer.together(engine, requests) == alone
    assert engine.stats["prefix_cache_hits"] > before["prefix_cache_hits"] and engine.stats["preemptions"] > before["preemptions"]
    assert engine.stats["pages_held"] == 0


def test_arriving_at_any_moment(setup):
    _, engine, requests, alone = setup
    assert same_answer.arriving(engine, requests, at_once=8) == alone


def test_with_no_prefix_cache(setup):
    build, engine, requests, alone = setup
    engine = build(prefix_cache=False)
    assert same_answer.together(engine, requests) == alone
    assert engine.stats["preemptions"] > 0 and engine.stats["prefix_cache_hits"] == 0


@pytest.mark.sweep_but("sdar-4-1")
@pytest.mark.parametrize("every", [1, 3])
def test_preempted_at_every_step(setup, every):
    _, engine, requests, alone = setup
    assert same_answer.preempted(engine, requests[:3], every=every) == alone[:3]


@pytest.mark.sweep_but("sdar-4")
@pytest.mark.parametrize("name", ["dmax", "sdar-4", "sdar-32", "fast-8", "fast-cached"])
def test_restored_in_another_process(tmp_path, request, name):
    options, some = options_of(name), requests_of(name)[:2]
    engine = Engine.from_pretrained(**options)
    alone = same_answer.alone(engine, some)
    cache = str(request.config.cache.mkdir("jax"))
    assert same_answer.restored(engine, some, options=options, steps=5, folder=tmp_path, cache=cache) == alone


@pytest.mark.sweep
def test_with_room_for_all():
    """A pool that holds every page of every slot, which no request ever has to leave, and prompts in one piece."""
    options, some = SETUPS["sdar-4"], requests_of("sdar-4")
    engine, small = Engine.from_pretrained(**options | {"max_batched_tokens": 2048}), Engine.from_pretrained(**options_of("sdar-4"))
    assert same_answer.together(engine, some) == same_answer.together(small, some)
    assert engine.stats["preemptions"] == 0


def test_a_snapshot_of_another_engine_is_refused(tmp_path):
    engine = Engine.from_pretrained(**options_of("dmax"))
    (id_,) = engine.add(PROMPTS[0], PARAMS[0])
    engine.snapshot(id_).save(tmp_path / "waiting")
    taken = Snapshot.load(tmp_path / "waiting", like=engine.saved_structure)
    assert taken.saved is None and taken.params == PARAMS[0].resolve()
    engine.abort(id_)
    engine._fingerprint = engine._fingerprint | {"positions": "128"}
    with pytest.raises(ValueError, match="the snapshot is of positions='256'; this engine has positions='128'"):
        engine.restore(taken)


@pytest.mark.sweep
@pytest.mark.parametrize("name", sweep(["llada2_edit", "dmax"], but=["dmax"]))
def test_a_second_turn_reuses_the_first_turns_generated_blocks(name):
    engine = Engine.from_pretrained(**options_of(name))
    first = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=100, ignore_eos=True, accept_threshold=0.6))[0]
    whole = PROMPTS[0] + first.token_ids
    before = engine.stats["prefix_cache_hits"]
    engine.generate([whole + [5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))
    written = (len(whole) - 1) // 32  # the last block of a request is never written: nothing comes after it
    assert engine.stats["prefix_cache_hits"] - before == written
