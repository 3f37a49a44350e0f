"""Where the Hopper kernels are used, and that what they do not serve is the reference, to the bit, also without a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import REFERENCE, block_attention, choose_for, prediction, token_merge
from pallas_kernels.target import Target


@pytest.mark.parametrize("operation", [block_attention, prediction, token_merge])
@pytest.mark.parametrize("capability,hopper", [(7.5, False), (8.0, False), (8.9, False), (9.0, True), (10.0, False)])
def test_hopper_kernels_run_on_hopper_only(operation, capability, hopper):
    compiles = jax.__version_info__ >= (0, 11)
    assert operation.choose_backend(Target("gpu", capability)) == ("gpu" if hopper and compiles else "reference")


def both(function, *args, **options):
    for got, want in zip(*(jax.tree.leaves(function(*args, **options, backend=b)) for b in ("gpu", "reference")), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_prediction_in_float32(top_k):
    rng = np.random.default_rng(0)
    hidden, lm_head = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4, 64), (40, 64)))
    zeros = jnp.zeros(4)
    sampling = prediction.Sampling(jax.random.split(jax.random.key(0), 4), zeros, zeros + 1, zeros.astype(jnp.int32))
    both(prediction.predict_from_hidden, hidden, lm_head, jnp.arange(4), forbidden_id=39, sampling=sampling, top_k=top_k)


def test_attention_in_float32():
    rng = np.random.default_rng(1)
    heads = jnp.asarray(rng.standard_normal((2, 16, 1, 4, 64)), jnp.float32)
    pools = [jnp.asarray(rng.standard_normal((2, 5, 8, 1, 64)), jnp.float32) for _ in "kv"]
    table, length = jnp.array([[0, 1], [4, 5]]), jnp.array([16, 8])
    lanes = jnp.array([[True, True], [True, False]])
    keys = block_attention.Keys(*pools, table, length, lanes)
    both(block_attention.block_attention, heads, keys, layer=jnp.int32(1), block=8)


@pytest.mark.parametrize("mode,width", [("dmax_topk", 100), ("iter_smooth_topk", 128)])
def test_merge_of_another_mode_or_width(mode, width):
    rng = np.random.default_rng(2)
    table, probs = jnp.asarray(rng.standard_normal((9, width)), jnp.float32), jnp.full((2, 3, 1), 0.4)
    tokens, soft = jnp.arange(6).reshape(2, 3), jnp.array([[True, False, True]] * 2)
    options = {"mask_id": 8, "ids": tokens[..., None], "probs": probs, "soft": soft, "spec": token_merge.MergeSpec(mode=mode)}
    both(token_merge.merge, table, tokens, **options)


def test_what_follows_from_the_device():
    cpu, tpu, ampere, hopper = (choose_for(t) for t in (Target("cpu"), Target("tpu"), Target("gpu", 8.0), Target("gpu", 9.0)))
    compiles = jax.__version_info__ >= (0, 11)
    assert [k.host_drives_loops for k in (REFERENCE, cpu, tpu, ampere, hopper)] == [False, False, False, True, True]
    assert [k.layers_per_turn for k in (REFERENCE, cpu, tpu, ampere, hopper)] == [1, 1, 1, 1, 2 if compiles else 1]
    assert [k.rows_apart for k in (REFERENCE, cpu, tpu, ampere, hopper)] == [True, True, True, True, not compiles]
    assert [k.pool_order for k in (REFERENCE, cpu, tpu, ampere, hopper)] == [None, None, (0, 1, 3, 2, 4), None, None]


IN_PLACE = {
    "linear": "gpu",
    "expert_choice": "gpu",
    "rows_apart": False,
    "layers_per_turn": 2,
    "prefill_tokens": (256, 1024, 2048, 4096),
    "free_tokens": 2048,
}


@pytest.mark.parametrize(
    ("kernels", "prefill_tokens"),
    [(REFERENCE, REFERENCE.prefill_tokens), (REFERENCE._replace(**IN_PLACE), (512,))],
    ids=["apart", "in place"],
)
def test_layers_in_place_are_for_bfloat16(kernels, prefill_tokens):
    """In float32 prompts are prefilled in one size: another would give other bits."""
    assert kernels.for_layers(jnp.bfloat16) == kernels
    assert kernels.for_layers(jnp.float32) == REFERENCE._replace(prefill_tokens=prefill_tokens)
