"""Network shapes to measure without a checkpoint, and random weights for them."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffulex_jax.models.base import Model, Param, Params, leaves
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import make_mesh, sharding
from diffulex_jax.weights.quantise import Store, placement, store
from pallas_kernels import REFERENCE, Kernels
from pallas_kernels.quantised import Form


_TINY = {
    "model_type": "llada2_moe",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "n_group": 4,
    "topk_group": 2,
    "mask_token_id": 1021,
    "eos_token_id": 1020,
    "max_position_embeddings": 4096,
}
_MINI = {
    "model_type": "llada2_moe",
    "vocab_size": 157_184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "n_group": 8,
    "topk_group": 4,
    "mask_token_id": 156_895,
    "eos_token_id": 156_892,
}
_SDAR = {
    "model_type": "sdar",
    "vocab_size": 151_936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "eos_token_id": 151_643,
}
_FAST_DLLM = {"model_type": "Fast_dLLM_Qwen", "num_hidden_layers": 28, "bd_size": 32, "eos_token_id": 151_645}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    # 131.7 M parameters: what two CPU cores decode in tens of milliseconds a step.
    "cpu-131m": _TINY
    | {
        "vocab_size": 32_768,
        "hidden_size": 512,
        "intermediate_size": 1280,
        "num_hidden_layers": 8,
        "head_dim": 64,
        "num_experts": 32,
        "moe_intermediate_size": 256,
        "mask_token_id": 32_767,
        "eos_token_id": 32_766,
    },
    # inclusionAI's LLaDA2.0-mini: 16.3 G parameters, 32.5 GB in bfloat16; and LLaDA2.0-flash: 102.9 G, 206 GB.
    "llada2-mini": _MINI,
    "llada2-flash": _MINI
    | {
        "hidden_size": 4096,
        "intermediate_size": 9216,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "moe_intermediate_size": 1024,
    },
    # JetLM's SDAR-1.7B-Chat, SDAR-4B-Chat, SDAR-8B-Chat and SDAR-30B-A3B-Chat.
    "sdar-1.7b": _SDAR
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
    "sdar-4b": _SDAR | {"hidden_size": 2560, "intermediate_size": 9728},
    "sdar-8b": _SDAR | {"hidden_size": 4096, "intermediate_size": 12_288},
    "sdar-30b-a3b": _SDAR
    | {
        "model_type": "sdar_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    # Efficient-Large-Model's Fast_dLLM_v2_1.5B (with the embeddings of its base, Qwen2.5-1.5B, as its output matrix) and Fast_dLLM_v2_7B.
    "fast-dllm-v2-1.5b": _FAST_DLLM
    | {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "fast-dllm-v2-7b": _FAST_DLLM
    | {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    # GSAI-ML's LLaDA-8B-Instruct and inclusionAI's LLaDA-MoE-7B-A1B-Instruct.
    "llada-8b": {
        "model_type": "llada",
        "vocab_size": 126_464,
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12_288,
        "max_sequence_length": 4096,
        "rope_theta": 500_000.0,
        "mask_token_id": 126_336,
        "eos_token_id": 126_081,
    },
    "llada-moe-7b-a1b": {
        "model_type": "llada",
        "vocab_size": 157_184,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "expert_intermediate_size": 1024,
        "rope_theta": 50_000.0,
        "mask_token_id": 156_895,
        "eos_token_id": 156_892,
    },
    # Dream-org's Dream-v0-Instruct-7B and Dream-Coder-v0-Instruct-7B, and Apple's DiffuCoder-7B.
    "dream-7b": {
        "model_type": "Dream",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131_072,
        "mask_token_id": 151_666,
        "eos_token_id": 151_643,
    },
}
"""The ``config.json`` of each shape."""


def shape_model(name: str) -> Model:
    """The network of a shape.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; choose one of {', '.join(SHAPES)}")
    return model_of(SHAPES[name], name=name)


def random_params(
    model: Model, dtype: Any, *, weights: Form | None = None, kernels: Kernels = REFERENCE, mesh: Mesh | None = None, seed: int = 0
) -> Params:
    """Random weights made on the devices of ``mesh`` (default: the first device) piece by piece: no copy of a stack of experts, and none
    in float32, ever exists, and no device holds more of a stack than its part and a layer. With ``weights`` what may be is quantised
    layer by layer, in the form that ``kernels`` read.

    Tokens choose their experts as if independently. Plain random weights would not do: masks all look alike, attention hardly
    tells their positions apart, and so they would share experts. Here queries only carry the fastest rotary frequencies, and
    with them a sharp attention, which gives every position a mix of values of its own.
    """
    params, mesh = leaves(model.schema), make_mesh() if mesh is None else mesh
    made = []
    for (path, param), key in zip(params.items(), jax.random.split(jax.random.key(seed), len(params)), strict=True):
        kind, where, one = param.dtype or dtype, sharding(mesh, param.axes), sharding(mesh, param.axes[1:])
        if path[-1] == "q_norm":
            half = model.spec.layers.rotary_dim // 2
            fast = min(6, half)
            made.append(jax.device_put(jnp.zeros(param.shape, kind).at[:, :fast].set(40).at[:, half : half + fast].set(40), where))
        elif param.init != "normal":
            made.append(jnp.full(param.shape, {"ones": 1, "zeros": 0}[param.init], kind, device=where))
        elif param.axes[0] != "layer":
            made.append(_normal(key, param.shape, kind, where))
        else:
            form = store(param, weights, kernels=kernels, dtype=dtype, mesh=mesh) or _same
            kept = jax.eval_shape(form, jax.ShapeDtypeStruct(param.shape, kind))
            lies = placement(mesh, param, kept)
            stack = jax.tree.map(lambda a, at: jnp.zeros(a.shape, a.dtype, device=at), kept, lies)
            keep = _of_one_layer(form, param, lies)
            for layer, part in enumerate(jax.random.split(key, param.shape[0])):
                stack = _put(stack, keep(_normal(part, param.shape[1:], kind, one)), layer)
            made.append(stack)
    tree: Params = {}
    for path, array in zip(params, made, strict=True):
        functools.reduce(lambda node, name: node.setdefault(name, {}), path[:-1], tree)[path[-1]] = array
    return tree


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, where: NamedSharding) -> jax.Array:
    """Normal with deviation 0.02, in pieces along the first axis."""
    pieces = math.gcd(shape[0], 16)
    piece = (shape[0] // pieces, *shape[1:])
    made = lax.map(lambda k: jax.random.normal(k, piece, dtype) * jnp.asarray(0.02, dtype), jax.random.split(key, pieces))
    return lax.with_sharding_constraint(made.reshape(shape), where)


def _of_one_layer(form: Store, param: Param, lies: Any) -> Any:
    """What makes of one layer of a leaf that of the leaf as ``form`` keeps it; of experts, one after the other."""

    def alone(layer: jax.Array) -> Any:
        return form(layer) if "expert" in param.axes else jax.tree.map(lambda a: a[0], form(layer[None]))

    return jax.jit(alone, out_shardings=jax.tree.map(lambda at: NamedSharding(at.mesh, PartitionSpec(*at.spec[1:])), lies))


def _same(piece: jax.Array) -> jax.Array:
    return piece


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Any, row: Any, at: int) -> Any:
    return jax.tree.map(lambda a, new: lax.dynamic_update_index_in_dim(a, new, at, 0), stack, row)
