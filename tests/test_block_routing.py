"""LLaDA2.2: the tokens of a block choose their experts together, whatever else is computed beside them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import attend_to, logits_of, sees
from scripted import KERNELS, RAW

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.errors import SettingError
from diffulex_jax.models.base import init
from diffulex_jax.models.ops import machine_ops
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.weights import checkpoint


BLOCK, MASK = 4, RAW["mask_token_id"]
ROUTED = RAW | {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "expert_capacity": 3,
    "block_size": BLOCK,
    "delete_token_id": 156_930,
    "split_token_id": 156_931,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("routed")
    model = model_of(ROUTED)
    checkpoint.save(path, model, init(model, jax.random.key(2), scale=1.0), dtype="float32")
    return path


@pytest.fixture(scope="module")
def network(folder):
    return checkpoint.load(folder, make_mesh())


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_pretrained(str(folder), max_slots=3, max_model_len=32, page_size=8, warm_up=False)


def test_the_config_says_how_experts_are_chosen(network):
    """LLaDA2.2-flash states groups too; where there is a capacity they mean nothing, and need not even fit."""
    spec = network[0].spec
    assert (spec.block_size, spec.block_stated, spec.routing_block) == (BLOCK, True, BLOCK)
    assert model_of(RAW).spec.routing_block == 0
    assert model_of(ROUTED | {"block_size": None}).spec.routing_block == 32
    assert model_of(ROUTED | {"num_experts_per_tok": 3, "topk_group": 1, "n_group": 8}).config.expert_capacity == 3
    with pytest.raises(ValueError, match="expert_capacity=1 must lie between num_experts_per_tok=2 and num_experts=16"):
        model_of(ROUTED | {"expert_capacity": 1})
    with pytest.raises(ValueError, match="delete_token_id=7 is not implemented; supported: 156930"):
        model_of(ROUTED | {"delete_token_id": 7})
    assert not {"expert_capacity", "block_size"} & model_of(RAW).config.to_hf().keys()


def test_the_engine_decodes_blocks_of_that_size_only(folder):
    with pytest.raises(SettingError, match="block_size=8 must be 4 for this model, whose blocks of 4 tokens choose their experts together"):
        Engine.from_pretrained(str(folder), block_size=8, force_block_size=True, max_model_len=32)


PROMPTS = ([3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8, 1, 8, 2], [6])
SETTINGS = SamplingParams(max_tokens=10, ignore_eos=True, accept_threshold=1.0)


def plainly(network, prompt):
    """The tokens that a forward over the whole sequence gives, the best one of a block at a time, to the end of its last block."""
    forward, length = forward_of(*network), len(prompt) + 10
    tokens = np.array([*prompt, *[MASK] * (-len(prompt) % BLOCK)])
    while len(tokens) < length or MASK in tokens:
        if MASK not in tokens:
            tokens = np.append(tokens, [MASK] * BLOCK)
        open_ = np.flatnonzero(tokens == MASK)
        p = jax.nn.softmax(forward(tokens).at[:, MASK].set(-jnp.inf), -1)[open_]
        best = int(p.max(-1).argmax())
        tokens[open_[best]] = int(p[best].argmax())
    return tokens[len(prompt) : length].tolist()


def forward_of(model, params):
    @functools.lru_cache
    def compiled(length):
        return jax.jit(lambda ids: logits_of(model, params, ids, attend_to(sees(length, BLOCK)))[0])

    return lambda ids: compiled(len(ids))(ids)


@pytest.mark.sweep
def test_cached_and_batched_as_plainly(engine, network):
    """And without its capacity the model says something else."""
    want = [plainly(network, prompt) for prompt in PROMPTS]
    for _ in range(2):  # the second time from the prefix cache
        assert [output.token_ids for output in engine.generate(list(PROMPTS), SETTINGS)] == want
    assert engine.stats["prefix_cache_hits"] > 0
    for prompt, tokens in zip(PROMPTS, want, strict=True):
        assert engine.generate([prompt], SETTINGS)[0].token_ids == tokens
    free = model_of({key: value for key, value in ROUTED.items() if key != "expert_capacity"})
    assert [plainly((free, network[1]), prompt) for prompt in PROMPTS] != want


def hidden(network, x, *, pending=0, valid=None):
    """Final hidden states of rows of blocks; a position attends to itself alone, so that only experts can bring others in."""
    model, params = network

    def attend(layer, heads):
        return jnp.broadcast_to(heads[..., -1:, :], (*heads.shape[:3], heads.shape[3] - 2, heads.shape[4])), ()

    ops = machine_ops(KERNELS, attend, pending=pending, valid=valid)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]) % BLOCK, x.shape[:2])
    return model.layers(params, x, positions, ops)[0]


def test_neither_rows_beside_it_nor_a_pending_block_nor_dummies_change_a_bit(network):
    x = jax.random.normal(jax.random.key(0), (3, 3 * BLOCK, 16))
    there = jnp.ones((3, 3 * BLOCK), bool)
    alone = hidden(network, x[:, BLOCK:], valid=there[:, BLOCK:])
    np.testing.assert_array_equal(hidden(network, x, pending=BLOCK, valid=there)[:, BLOCK:], alone)
    np.testing.assert_array_equal(hidden(network, x[1:2, BLOCK:], valid=there[1:2, BLOCK:]), alone[1:2])
    loud, dummies = x.at[:, -BLOCK:].set(1e3), there.at[:, -BLOCK:].set(False)
    np.testing.assert_array_equal(hidden(network, loud, pending=BLOCK, valid=dummies)[:, BLOCK:-BLOCK], alone[:, :BLOCK])


def test_a_token_that_is_not_there_has_no_say_in_its_block(network):
    """Where it is there, it has: what the others give then depends on it. Rows differ in their last token alone."""
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (BLOCK, 16)), (24, BLOCK, 16))
    x = x.at[:, -1].set(jax.random.normal(jax.random.key(2), (24, 16)))
    there = jnp.broadcast_to(jnp.arange(BLOCK) < BLOCK - 1, (24, BLOCK))
    unheard, heard = (np.asarray(hidden(network, x, valid=valid))[:, :-1] for valid in (there, None))
    assert (unheard == unheard[0]).all()
    assert not (heard == heard[0]).all()
