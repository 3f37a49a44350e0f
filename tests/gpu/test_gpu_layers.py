"""The network's layers as a GPU runs them, as near the layers in float32 as plain XLA is in bfloat16."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from diffulex_jax.bench.shapes import random_params
from diffulex_jax.models.ops import machine_ops
from diffulex_jax.models.registry import model_of
from pallas_kernels import REFERENCE, choose
from pallas_kernels.block_attention import split_heads
from pallas_kernels.grouped_matmul import is_quantised
from pallas_kernels.grouped_matmul.stacks import plain as plain_stack
from pallas_kernels.quantised.words import Packed


MODEL = model_of(
    {
        "model_type": "llada2_moe",
        "vocab_size": 64,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "n_group": 8,
        "topk_group": 4,
        "mask_token_id": 63,
        "eos_token_id": 62,
    }
)


def attend_with(pending):
    """All positions see all others of the pending block and of the window; the pending block sees itself alone."""

    def attend(layer, heads):
        q, k, v = split_heads(heads)
        at = jnp.arange(heads.shape[1])
        mask = (at[:, None] >= pending) | (at[None] < pending)
        score = jnp.einsum("rtkgh,rskh->rkgts", q.astype(jnp.float32), k.astype(jnp.float32)) / 8
        out = jnp.einsum("rkgts,rskh->rtkgh", jax.nn.softmax(jnp.where(mask, score, -jnp.inf), -1), v.astype(jnp.float32))
        return out.astype(q.dtype), (k, v)

    return attend


@pytest.mark.parametrize(("pending", "weights"), [(0, None), (32, None), (0, "int8"), (32, "int8"), (0, "int4"), (32, "int4")])
def test_layers_of_the_hopper_kernels_are_the_layers(key, relative_error, pending, weights):
    """With quantised experts too, beside a shared one that is not: against the weights that they stand for."""
    own = choose(jax.devices()[0]).for_layers(jnp.bfloat16)
    params = random_params(MODEL, jnp.bfloat16, weights=weights, kernels=own)
    assert isinstance(params["moe"]["experts_down"], Packed) == (weights is not None)
    params["moe"]["router"] *= 40  # scores far enough apart that rounding seldom changes a choice
    x = jax.random.normal(key, (3, 64, 512), jnp.bfloat16)
    positions, valid = jnp.arange(64) + jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 64), bool).at[1, 40:].set(False)

    @functools.partial(jax.jit, static_argnames="kernels")
    def hidden(params, x, kernels):
        return MODEL.layers(params, x, positions, machine_ops(kernels, attend_with(pending), pending=pending, valid=valid))

    plain_kernels = REFERENCE._replace(grouped_matmul="dense")
    (plain, plain_kv), (got, got_kv) = hidden(params, x, plain_kernels), hidden(params, x, own)
    wide = jax.tree.map(lambda a: plain_stack(a, jnp.float32).astype(jnp.float32), params, is_leaf=is_quantised)
    with jax.default_matmul_precision("highest"):
        exact = hidden(wide, x.astype(jnp.float32), plain_kernels)[0]

    def error(rows):
        """Of the middle row: where rounding tips the choice of an expert, a row is another."""
        off = jnp.linalg.norm(rows.astype(jnp.float32) - exact, axis=-1) / jnp.linalg.norm(exact, axis=-1)
        return float(jnp.median(off[valid]))

    print(f"relative error of four layers, {weights} experts, {pending} pending: {error(got):.5f}, of plain XLA {error(plain):.5f}")
    assert error(got) < (2 if weights == "int4" else 1.5) * error(plain)  # int4 rounds weights to bfloat16 once more
    assert error(plain) < 3e-2
    for a, b in zip(got_kv, plain_kv, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) < 2e-2
