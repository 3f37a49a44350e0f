"""The whole of ``test_same_answer``: 64 prompts, greedy and sampled, every strategy, every way to run them. Minutes, not seconds."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
import same_answer

from diffulex_jax import Engine
from diffulex_jax.rules import levenshtein
from diffulex_jax.strategies import STRATEGIES


GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
TRAINED = str(GOLDEN / "tiny-llada2-trained")
REQUESTS = same_answer.requests(64, [0.0, 0.7], longest=96, most=48)
SLOTS, LENGTH, BLOCK = 16, 160, 8
CASES = [(name, window) for name in STRATEGIES for window in ((1, 2) if name in ("llada2", "llada2_edit", "dmax") else (None,))]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1] or 'own'}")
def case(request):
    name, window = request.param
    # The special tokens of LLaDA2.2 are not in this vocabulary: two that the model likes stand in for them.
    strategy = {"delete_id": 7, "split_id": 300} if name == "llada2_levenshtein" else name
    options = {"model": TRAINED, "strategy": strategy, "buffer_size": window, "block_size": BLOCK}
    options |= {"max_slots": SLOTS, "max_model_len": LENGTH}
    engine = build(options)
    return options, engine, same_answer.alone(engine, REQUESTS)


def build(options, **more) -> Engine:
    strategy = options["strategy"]
    return Engine.from_pretrained(**(options | {"strategy": levenshtein(**strategy) if isinstance(strategy, dict) else strategy}), **more)


@pytest.mark.parametrize("at_once", [2, 4, 8, 16])
def test_in_batches_with_random_arrivals(case, at_once):
    _, engine, alone = case
    assert same_answer.arriving(engine, REQUESTS, at_once=at_once, seed=at_once) == alone


@pytest.mark.parametrize("cached", [True, False], ids=["prefix cache", "no prefix cache"])
def test_with_a_pool_of_thirty_per_cent(case, cached):
    options, _, alone = case
    pages = int(0.3 * SLOTS * LENGTH / BLOCK)
    engine = build(options, num_pages=pages, prefix_cache=cached)
    assert [o.token_ids for o in engine.generate(*zip(*REQUESTS, strict=True))] == alone
    assert engine.stats["preemptions"] > 0 and engine.stats["pages_held"] == 0
    if not cached:
        assert engine.stats["prefix_cache_hits"] == 0


def test_preempted_at_every_step_index(case):
    _, engine, alone = case
    assert same_answer.preempted(engine, REQUESTS, every=1) == alone


def test_restored_from_a_snapshot_in_another_process(case, tmp_path, request):
    options, engine, alone = case
    cache = str(request.config.cache.mkdir("jax"))
    assert same_answer.restored(engine, REQUESTS, options=options, steps=1, folder=tmp_path, cache=cache) == alone
    # A token a forward: none of them is done before it is taken in the middle of a block.
    slow = [(prompt, dataclasses.replace(params, accept_threshold=2.0)) for prompt, params in REQUESTS[:16]]
    again = same_answer.restored(engine, slow, options=options, steps=6, folder=tmp_path, cache=cache)
    assert again == same_answer.alone(engine, slow)
