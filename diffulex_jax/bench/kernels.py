"""Each operation of a denoise step by itself: its time against what its memory traffic alone takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.bench.forward import expert_stacks
from diffulex_jax.models.base import Model, Params
from pallas_kernels import Kernels, block_attention, grouped_matmul, prediction, token_merge
from pallas_kernels.token_merge import MergeSpec


def measure(
    model: Model, params: Params, kernels: Kernels, *, batch: int, context: int, block: int, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """Times one layer's routed experts with uniform routing, the vocabulary's prediction, token merge, and one layer's attention.

    Each runs many times in one program, layer after layer, on inputs that depend on the result before.

    Yields:
      ``kernel``, ``tokens``, ``ms``, ``floor_ms`` (weights and cached keys and values, or gathered rows, read once at ``bandwidth``
      bytes a second), ``floor_ratio``, and for the experts ``experts_touched``.
    """
    spec = model.spec
    tokens, embed, dtype = batch * block, spec.hidden_size, params["embed"].dtype
    x = jax.random.normal(jax.random.key(0), (tokens, embed), dtype)

    def result(kernel: str, ms: float, bytes_read: float, touched: float | None = None) -> dict[str, Any]:
        floor = 1e3 * bytes_read / bandwidth
        return {"kernel": kernel, "tokens": tokens, "ms": ms, "floor_ms": floor, "floor_ratio": ms / floor, "experts_touched": touched}

    if stacks := expert_stacks(params):
        layers, count = stacks[0].shape[:2]
        scores = jax.random.uniform(jax.random.key(1), (layers, tokens, count))
        weights, ids = lax.top_k(scores, spec.experts_per_token)
        expert_bytes = sum(stack.nbytes for stack in stacks) / (layers * count)

        def experts(x: jax.Array, i: jax.Array, stacks: list[grouped_matmul.Stack], ids: jax.Array, weights: jax.Array) -> jax.Array:
            return x + grouped_matmul.expert_mlp(x, ids[i], weights[i], *stacks, layer=i, backend=kernels.grouped_matmul) * 1e-3

        touched = statistics.mean(len(set(layer.reshape(-1).tolist())) for layer in jax.device_get(ids))
        yield result("experts", _ms(experts, x, layers, stacks, ids, weights), touched * expert_bytes, touched)

    current = jnp.zeros(tokens, jnp.int32)

    def predict(x: jax.Array, i: jax.Array, params: Params, current: jax.Array) -> jax.Array:
        still = jnp.zeros(tokens, jnp.float32)
        best = prediction.predict_from_hidden(
            x,
            model.head(params),
            current,
            forbidden_id=spec.mask_id,
            sampling=prediction.Sampling(jax.random.split(jax.random.key(0), tokens), still, still + 1, current),
            backend=kernels.prediction,
        )
        return x + (best.prob * 1e-3).astype(dtype)[:, None]

    yield result("prediction", _ms(predict, x, 8, params, current), model.head(params).nbytes)

    def merge(x: jax.Array, i: jax.Array, params: Params, ids: jax.Array) -> jax.Array:
        probs = jax.nn.sigmoid(x[:, :1].astype(jnp.float32))
        soft = jnp.ones(tokens, bool)
        mixed = token_merge.merge(
            params["embed"],
            ids[i],
            mask_id=spec.mask_id,
            ids=ids[i][:, None],
            probs=probs,
            soft=soft,
            spec=MergeSpec(),
            backend=kernels.token_merge,
        )
        return x + mixed

    merged = jax.random.randint(jax.random.key(2), (64, tokens), 0, spec.vocab_size)
    yield result("token merge", _ms(merge, x, 64, params, merged), 2 * tokens * embed * dtype.itemsize)

    layers, groups, head = spec.layers.count, spec.layers.kv_heads, spec.layers.head_dim
    pages = context // block
    pool = jax.random.normal(jax.random.key(3), (layers, batch * pages, block, groups, head), dtype)
    heads = jax.random.normal(jax.random.key(4), (batch, block, groups, spec.layers.query_heads // groups + 2, head), dtype)
    table = jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages)

    def attention(heads: jax.Array, i: jax.Array, pool: jax.Array, table: jax.Array) -> jax.Array:
        out = block_attention.block_attention(
            heads,
            block_attention.Keys(pool, pool, table, jnp.full(batch, context, jnp.int32), jnp.ones((batch, 1), bool)),
            layer=i,
            block=block,
            backend=kernels.block_attention,
        )
        return heads + jnp.pad(out * jnp.asarray(1e-3, dtype), [(0, 0)] * 3 + [(0, 2), (0, 0)])

    cached = 2 * batch * context * groups * head * dtype.itemsize
    yield result("block attention", _ms(attention, heads, layers, pool, table), cached)


def _ms(body: Callable[..., jax.Array], carry: jax.Array, count: int, *args: Any, rounds: int = 7) -> float:
    """Milliseconds of one ``body(carry, i, *args)``: the median over rounds of a program that runs it for ``i`` below ``count`` twice."""

    @jax.jit
    def loop(carry: jax.Array, *args: Any) -> jax.Array:
        return lax.fori_loop(0, 2 * count, lambda i, c: body(c, lax.rem(i, jnp.int32(count)), *args).astype(c.dtype), carry)

    jax.block_until_ready(loop(carry, *args))
    spent = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(loop(carry, *args))
        spent.append(1e3 * (time.perf_counter() - began) / (2 * count))
    return statistics.median(spent)
