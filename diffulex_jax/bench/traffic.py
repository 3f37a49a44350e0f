"""Bytes: how fast the device moves them, and how many a step cannot do without."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffulex_jax import decode
from diffulex_jax.config import ModelConfig
from diffulex_jax.models import llada2
from diffulex_jax.state import DecodeState, KVPool
from pallas_kernels import block_attention, grouped_matmul


def copy_bandwidth(device: jax.Device) -> float:
    """Bytes a second that a large copy on ``device`` reads and writes, the best of several."""
    count = 2**28 if device.memory_stats() else 2**22  # float32: far more than any cache of an accelerator or a CPU holds
    change = jax.jit(lambda x: x + 1, donate_argnums=0)  # as a copy, but one that no compiler leaves out
    x = jax.block_until_ready(change(jnp.zeros(count, jnp.float32)))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(10):
            x = change(x)
        jax.block_until_ready(x)
        best = min(best, (time.perf_counter() - began) / 10)
    return 2 * x.nbytes / best


Window = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def window_of(state: DecodeState) -> Window:
    """What a forward needs of the state, the same for every strategy: tokens, positions, what is cached, and which blocks are active."""
    return state.tokens, state.positions, state.written_upto, state.active


def touch_counter(program: decode.Program) -> tuple[Callable[..., jax.Array], list[int]]:
    """A forward over the window that counts the experts its tokens go to.

    Returns:
      ``(forward(params, pool, window_of(state), page_table), counts)``; each run appends a number for each mixture-of-experts layer to
      ``counts`` by the time ``jax.effects_barrier`` returns.
    """
    counts: list[int] = []

    def spy(x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, **rest: Any) -> jax.Array:
        touched = (ids.reshape(-1, 1) == jnp.arange(program.config.num_experts)).any(0).sum()
        jax.debug.callback(lambda count: counts.append(int(count)), touched)
        return grouped_matmul.expert_mlp(x, ids, weights, gate_up, down, **rest, backend=program.kernels.grouped_matmul)

    def forward(params: llada2.Params, pool: KVPool, window: Window, page_table: jax.Array) -> jax.Array:
        tokens, positions, written_upto, active = window
        slots = len(tokens)
        attend = functools.partial(
            block_attention.block_attention,
            keys=block_attention.Keys(pool.k, pool.v, page_table, written_upto, active),
            block=program.dims.block,
            backend=program.kernels.block_attention,
        )
        return llada2.hidden(
            params,
            program.config,
            llada2.embed(params, tokens.reshape(slots, -1)),
            positions.reshape(slots, -1),
            lambda layer, heads: (attend(heads, layer=layer), ()),
            experts=spy,
            streamed=not program.kernels.for_layers(params["embed"].dtype, shared=False).rows_apart,
        )[0]

    return forward, counts


def expert_bytes(config: ModelConfig, itemsize: int) -> int:
    """Of one routed expert."""
    return 3 * config.hidden_size * config.moe_intermediate_size * itemsize


def step_bytes(config: ModelConfig, itemsize: int, *, batch: int, context: int, experts: float) -> float:
    """What a denoise step must read: each weight once, of the routed experts ``experts`` a layer, and the cached context once.

    Activations stay in caches and are not counted.
    """
    embed, heads = config.hidden_size, config.num_key_value_heads * config.head_dim
    attention = embed * heads * (config.queries_per_kv + 2) + embed * heads * config.queries_per_kv
    dense = 3 * embed * config.intermediate_size
    moe = embed * config.num_experts + 3 * embed * config.moe_intermediate_size * config.num_shared_experts
    weights = config.num_hidden_layers * attention + config.num_dense_layers * dense + config.num_moe_layers * moe
    weights += config.vocab_size * embed
    cache = 2 * config.num_hidden_layers * heads * context * batch
    return (weights + cache) * itemsize + config.num_moe_layers * experts * expert_bytes(config, itemsize)
