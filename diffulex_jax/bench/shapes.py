"""Network shapes to measure without a checkpoint, and random weights for them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.config import ModelConfig
from diffulex_jax.models import llada2


_TINY = ModelConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    n_group=4,
    topk_group=2,
    mask_token_id=1021,
    eos_token_id=1020,
    max_position_embeddings=4096,
)

SHAPES: dict[str, ModelConfig] = {
    "tiny": _TINY,
    # 131.7 M parameters: what two CPU cores decode in tens of milliseconds a step.
    "cpu-131m": dataclasses.replace(
        _TINY,
        vocab_size=32_768,
        hidden_size=512,
        intermediate_size=1280,
        num_hidden_layers=8,
        head_dim=64,
        num_experts=32,
        moe_intermediate_size=256,
        mask_token_id=32_767,
        eos_token_id=32_766,
    ),
    # inclusionAI's LLaDA2.0-mini: 16.3 G parameters, 32.5 GB in bfloat16.
    "llada2-mini": ModelConfig(
        vocab_size=157_184,
        hidden_size=2048,
        intermediate_size=5120,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        n_group=8,
        topk_group=4,
        mask_token_id=156_895,
        eos_token_id=156_892,
    ),
}


def random_params(config: ModelConfig, dtype: Any, *, seed: int = 0) -> llada2.Params:
    """Random weights made on the device piece by piece: no copy of a stack of experts, and none in float32, ever exists.

    Tokens choose their experts as if independently. Plain random weights would not do: masks all look alike, attention hardly
    tells their positions apart, and so they would share experts. Here queries only carry the fastest rotary frequencies, and
    with them a sharp attention, which gives every position a mix of values of its own.
    """
    leaves, treedef = jax.tree.flatten_with_path(llada2.schema(config), is_leaf=llada2.is_leaf)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = []
    for (path, (shape, axes)), key in zip(leaves, keys, strict=True):
        name = path[-1].key
        if name == "router_bias":
            made.append(jnp.zeros(shape, jnp.float32))
        elif name == "q_norm":
            half, fast = config.rotary_dim // 2, min(6, config.rotary_dim // 2)
            made.append(jnp.zeros(shape, dtype).at[:, :fast].set(40).at[:, half : half + fast].set(40))
        elif name.endswith("norm"):
            made.append(jnp.ones(shape, dtype))
        elif axes[0] != "layer":
            made.append(_normal(key, shape, dtype))
        else:
            stack = jnp.zeros(shape, dtype)
            for layer, part in enumerate(jax.random.split(key, shape[0])):
                stack = _put(stack, _normal(part, shape[1:], dtype), layer)
            made.append(stack)
    return jax.tree.unflatten(treedef, made)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal with deviation 0.02, in pieces along the first axis."""
    pieces = math.gcd(shape[0], 16)
    piece = (shape[0] // pieces, *shape[1:])
    return lax.map(lambda k: jax.random.normal(k, piece, dtype) * jnp.asarray(0.02, dtype), jax.random.split(key, pieces)).reshape(shape)


_put = jax.jit(lambda stack, row, at: lax.dynamic_update_index_in_dim(stack, row, at, 0), donate_argnums=0)
