"""A block is the model's, a page is the pool's: neither changes an answer, and what was not trained for is refused."""

from __future__ import annotations

import json

import jax
import pytest
import same_answer
from scripted import RAW

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.settle import plan
from diffulex_jax.errors import SettingError
from diffulex_jax.models.base import init
from diffulex_jax.models.registry import model_of
from diffulex_jax.strategies import STRATEGIES
from diffulex_jax.weights import checkpoint


SDAR = {
    "model_type": "sdar",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "mask_token_id": 63,
    "eos_token_id": 62,
}


@pytest.fixture(scope="module")
def sdar(tmp_path_factory):
    """A tiny SDAR with random weights, trained, as its config says, with blocks of 4."""
    path = tmp_path_factory.mktemp("sdar")
    model = model_of(SDAR | {"block_size": 4})
    checkpoint.save(path, model, init(model, jax.random.key(0), scale=0.6), dtype="float32")
    return path


def planned(path, **settings):
    """(settings, attention, sizes) of an engine for a checkpoint, which is not built."""
    return plan(checkpoint.load_model(path).spec, STRATEGIES["sdar"], EngineConfig(max_slots=1, max_model_len=64, **settings))


def test_the_checkpoint_says_how_long_a_block_is(sdar):
    settings, _, dims = planned(sdar)
    assert (settings.block_size, settings.page_size, dims.block, dims.page) == (4, 16, 4, 16)


def test_another_block_size_is_refused_unless_forced(sdar):
    with pytest.raises(SettingError, match="block_size=8, but the checkpoint was trained with blocks of 4") as error:
        Engine.from_pretrained(str(sdar), strategy="sdar", block_size=8, max_slots=1, max_model_len=32)
    assert error.value.field == "block_size"
    _, _, forced = planned(sdar, block_size=8, force_block_size=True)
    assert forced.block == 8


def test_a_block_size_that_no_checkpoint_states_can_be_set(tmp_path):
    """LLaDA2's configs name none: 32 is what such models have, and any other may be asked for."""
    model = model_of(RAW)
    checkpoint.save(tmp_path, model, init(model, jax.random.key(0)), dtype="float32")
    assert "block_size" not in json.loads((tmp_path / "config.json").read_text())
    assert [planned(tmp_path, **asked)[2].block for asked in ({}, {"block_size": 4})] == [32, 4]


@pytest.mark.parametrize(("block", "page"), [(4, 6), (4, 3), (32, 48)])
def test_pages_and_blocks_that_do_not_divide_each_other(sdar, block, page):
    with pytest.raises(SettingError, match=f"page_size={page} must be a multiple of block_size={block}, or divide it"):
        Engine.from_pretrained(str(sdar), block_size=block, force_block_size=True, page_size=page, max_slots=1, max_model_len=96)


REQUESTS = same_answer.requests(4, [0.0, 0.8], longest=40, most=24, vocab=60)
OPTIONS = {"strategy": "sdar", "max_slots": 3, "max_model_len": 64, "force_block_size": True, "warm_up": False}


@pytest.mark.sweep_but("4-pages0")
@pytest.mark.parametrize(("block", "pages"), [(4, (4, 8, 16)), (16, (4, 8, 32))])
def test_the_size_of_a_page_changes_no_answer(sdar, block, pages):
    """Alone, in a batch with a pool that is too small, and again from the prefix cache."""
    want = None
    for page in (block, *pages):
        least = max(block, page)
        engine = Engine.from_pretrained(str(sdar), block_size=block, page_size=page, num_pages=80 // least, **OPTIONS)
        want = want or same_answer.alone(engine, REQUESTS)
        assert same_answer.arriving(engine, REQUESTS, at_once=3) == want
        assert same_answer.preempted(engine, REQUESTS, every=2) == want
        if block <= page <= 8:
            assert engine.stats["prefix_cache_hits"] > 0


@pytest.mark.sweep
def test_a_request_from_a_snapshot_publishes_its_pages_as_what_they_are(sdar, tmp_path):
    """A page is found by all the tokens up to its end, also where another process wrote the first of them."""
    options = OPTIONS | {"page_size": 4, "max_slots": 1}
    settings = SamplingParams(max_tokens=24, ignore_eos=True, accept_threshold=0.9)
    engine, other, fresh = (Engine.from_pretrained(str(sdar), **options) for _ in range(3))
    (id_,) = engine.add([5, 6, 7, 8, 9], settings)
    for _ in range(2):
        engine.step()
    taken = engine.snapshot(id_)
    assert taken.saved is not None and taken.saved.k.shape[1] >= 2
    restored, outputs = other.restore(taken), {}
    while other.has_work:
        outputs |= other.step()
    whole = [5, 6, 7, 8, 9, *outputs[restored].token_ids]
    late = whole[20:24]  # a block in the middle, as the beginning of another prompt
    before = other.stats["prefix_cache_hits"]
    assert other.generate([[*late, 1]], settings)[0].token_ids == fresh.generate([[*late, 1]], settings)[0].token_ids
    assert other.stats["prefix_cache_hits"] == before
    assert other.generate([[*whole[:20], 1]], settings)[0].token_ids == fresh.generate([[*whole[:20], 1]], settings)[0].token_ids
