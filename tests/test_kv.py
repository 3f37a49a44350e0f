"""Engines whose pool holds keys and values in 8 bits: the same answer whatever else runs, snapshots, and what is refused."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import same_answer
from scripted import MODEL

from diffulex_jax import Engine
from diffulex_jax.engine.build import limits_of
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.snapshot import Snapshot
from diffulex_jax.errors import SettingError
from diffulex_jax.models.base import init
from pallas_kernels.block_attention import Scaled


GOLDEN = pathlib.Path(__file__).parent / "golden"
REQUESTS = same_answer.requests(5, [0.0, 0.7], longest=40, most=30, vocab=8)


def engine_of(kv, **settings) -> Engine:
    params = init(MODEL, jax.random.key(0), jnp.float32, scale=0.5)
    return Engine(MODEL, params, block_size=4, max_slots=4, max_model_len=96, warm_up=False, kv=kv, **settings)


@pytest.fixture(scope="module")
def engine():
    """Pages of two blocks, so that a page is written twice, and so few that requests are set aside."""
    return engine_of("int8", page_size=8, num_pages=18, max_batched_tokens=24)


@pytest.fixture(scope="module")
def alone(engine):
    return same_answer.alone(engine, REQUESTS)


def test_the_same_answer_in_a_batch_from_the_prefix_cache_and_preempted(engine, alone):
    assert isinstance(engine._scheduler.device.pool.k, Scaled)
    before = engine.stats
    assert same_answer.together(engine, REQUESTS) == alone
    assert engine.stats["prefix_cache_hits"] > before["prefix_cache_hits"] and engine.stats["preemptions"] > before["preemptions"]
    assert same_answer.preempted(engine, REQUESTS[:3], every=1) == alone[:3]


def test_other_kv_is_another_answer_and_no_one_elses_snapshot(engine, alone, tmp_path):
    other = engine_of("fp8", page_size=8)
    assert other._scheduler.device.pool.v.dtype == jnp.float8_e4m3fn
    found = same_answer.together(other, REQUESTS)
    assert found != alone
    prompt, params = REQUESTS[0]
    (id_,) = other.add(prompt, params)
    other.step()
    other.step()
    other.snapshot(id_).save(tmp_path / "taken")
    other.discard(id_)
    read = Snapshot.load(tmp_path / "taken", like=other.saved_structure)
    assert read.saved is not None and read.saved.k.dtype == jnp.float8_e4m3fn and np.asarray(read.saved.k, np.float32).any()
    again = other.restore(read)
    while again not in (done := other.step()):
        pass
    assert done[again].token_ids == found[0]
    with pytest.raises(ValueError, match="kv='fp8'; this engine has kv='int8'"):
        engine.restore(read)
    with pytest.raises(ValueError, match="arrays; this engine's strategy and kv keep"):
        Snapshot.load(tmp_path / "taken", like=engine.saved_structure)


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(SettingError, match="kv='int4' must be one of None, bfloat16, fp8, int8"):
        EngineConfig(kv="int4")
    with pytest.raises(SettingError, match="kv=int8 is not for this model, which sees its whole canvas"):
        limits_of(str(GOLDEN / "families" / "tiny-llada"), None, EngineConfig(kv="int8", max_model_len=64))


def test_eight_bits_are_counted(engine):
    pool = engine._scheduler.device.pool
    layers = MODEL.spec.layers
    vectors = 2 * layers.count * layers.kv_heads * engine._scheduler.device.num_pages * 8
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pool)) == vectors * (layers.head_dim + 2)
