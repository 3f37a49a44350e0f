"""The network's layers as a GPU runs them, as near the layers in float32 as plain XLA is in bfloat16."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from diffulex_jax.bench.shapes import random_params
from diffulex_jax.config import ModelConfig
from diffulex_jax.models import llada2
from pallas_kernels import grouped_matmul
from pallas_kernels.block_attention import split_heads
from pallas_kernels.grouped_matmul import dense


CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=256,
    n_group=8,
    topk_group=4,
    mask_token_id=63,
    eos_token_id=62,
)


def attend(layer, heads, before=None):
    """All positions see all others, and those before them."""
    q, k, v = split_heads(heads)
    _, keys, values = split_heads(heads if before is None else jnp.concatenate([before, heads], 1))
    score = jnp.einsum("rtkgh,rskh->rkgts", q.astype(jnp.float32), keys.astype(jnp.float32)) / 8
    out = jnp.einsum("rkgts,rskh->rtkgh", jax.nn.softmax(score, -1), values.astype(jnp.float32))
    return out.astype(q.dtype), (k, v)


@pytest.mark.parametrize("leading", [0, 32])
def test_streamed_layers_are_the_layers(key, relative_error, leading):
    params = random_params(CONFIG, jnp.bfloat16)
    params["moe"]["router"] *= 40  # scores far enough apart that rounding seldom changes a choice
    x = jax.random.normal(key, (3, 64, 512), jnp.bfloat16)
    positions, valid = jnp.arange(64) + jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 64), bool).at[1, 40:].set(False)

    @functools.partial(jax.jit, static_argnames=("backend", "streamed"))
    def hidden(params, backend, streamed):
        experts = functools.partial(grouped_matmul.expert_mlp, backend=backend)
        return llada2.hidden(params, CONFIG, x, positions, attend, leading=leading, valid=valid, experts=experts, streamed=streamed)

    (plain, plain_kv), (got, got_kv) = hidden(params, "dense", False), hidden(params, "gpu", True)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    with jax.default_matmul_precision("highest"):
        exact = llada2.hidden(wide, CONFIG, x.astype(jnp.float32), positions, attend, leading=leading, valid=valid, experts=dense)[0]

    def error(rows):
        """Of the middle row: where rounding tips the choice of an expert, a row is another."""
        off = jnp.linalg.norm(rows.astype(jnp.float32) - exact, axis=-1) / jnp.linalg.norm(exact, axis=-1)
        return float(jnp.median(off[valid]))

    print(f"relative error of four layers, {leading} leading tokens: {error(got):.5f}, of plain XLA in bfloat16 {error(plain):.5f}")
    assert error(got) < 1.5 * error(plain)
    assert error(plain) < 3e-2
    for a, b in zip(got_kv, plain_kv, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) < 2e-2
