"""Which experts a token goes to (DeepSeek-V3's scheme, as LLaDA2 uses it)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.config import ModelConfig
from pallas_kernels import grouped_matmul


def route(x: jax.Array, router: jax.Array, bias: jax.Array, config: ModelConfig, *, by_rank: bool = False) -> tuple[jax.Array, jax.Array]:
    """Group-limited top-k routing with a selection-only bias (DeepSeek-V3's scheme, as LLaDA2 uses it), in float32.

    Scores are sigmoids. Bias added, the ``topk_group`` groups with the largest sum of their two best experts stay, and
    the top-k experts among them are taken; ties go to the lower index. Weights are the unbiased scores, normalised and
    scaled.

    Args:
      x: ``[N, D]``.
      router: ``[D, E]``.
      bias: ``[E]``.
      by_rank: compare every expert with every other instead of sorting: the same choice, in a few fused kernels where sorting takes
        several slow ones, for ``E**2`` comparisons a token.

    Returns:
      ``(expert ids [N, k] int32, weights [N, k] float32)``.
    """
    c = config
    # bfloat16 products are exact in float32, so that on an accelerator the operands need not be widened.
    wide = (x, router) if by_rank and x.dtype == jnp.bfloat16 else (x.astype(jnp.float32), router.astype(jnp.float32))
    score = jax.nn.sigmoid(jnp.einsum("nd,de->ne", *wide, preferred_element_type=jnp.float32))
    biased = score + bias.astype(jnp.float32)
    if c.topk_group < c.n_group:
        grouped = biased.reshape(-1, c.n_group, c.num_experts // c.n_group)
        if by_rank:
            kept = jnp.stack(_among_best([*jnp.moveaxis(_sum_of_best_two(grouped), -1, 0)], c.topk_group), -1)
        else:
            best_two = lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
            kept = jax.nn.one_hot(lax.top_k(best_two, c.topk_group)[1], c.n_group, dtype=jnp.bool_).any(-2)
        biased = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(biased.shape)
    if by_rank:
        ids, weights = _of_rank(_rank(lax.optimization_barrier(biased)), score, c.num_experts_per_tok)
    else:
        ids = lax.top_k(biased, c.num_experts_per_tok)[1]
        weights = jnp.take_along_axis(score, ids, -1)
    if c.norm_topk_prob:
        # Added up one by one, the sum is part of whatever kernel uses the weights.
        total = sum(weights[:, i : i + 1] for i in range(weights.shape[1])) if by_rank else weights.sum(-1, keepdims=True)
        weights = weights / (total + 1e-20)
    return ids.astype(jnp.int32), weights * c.routed_scaling_factor


def route_streamed(
    x: jax.Array, router: jax.Array, bias: jax.Array, config: ModelConfig, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """:func:`route` on a Hopper GPU: by rank, or for many tokens by a kernel that counts as well: ``(ids, weights, counted)``."""
    c = config
    chosen = grouped_matmul.choose(
        jnp.matmul(x, router.astype(x.dtype), preferred_element_type=jnp.float32),  # products of bfloat16 are exact in float32
        bias,
        valid,
        top_k=c.num_experts_per_tok,
        groups=c.n_group,
        kept=c.topk_group,
        normalise=c.norm_topk_prob,
        scale=c.routed_scaling_factor,
    )
    return chosen or (*route(x, router, bias, config, by_rank=True), None)


def _rank(x: jax.Array) -> jax.Array:
    """``[N, n]`` int32: how many come before each in a descending sort of its row; of equals the first comes first."""
    index = jnp.arange(x.shape[-1])
    larger, same = x[:, None] > x[..., None], (x[:, None] == x[..., None]) & (index < index[:, None])
    # Two sums in one pass, for XLA's sake: it compiles a single one on a GPU as a tile of all n * n pairs, for minutes.
    ones, none = (larger.astype(jnp.int32), same.astype(jnp.int32)), (jnp.int32(0), jnp.int32(0))
    ahead, level = lax.reduce(ones, none, lambda a, b: (a[0] + b[0], a[1] + b[1]), (2,))
    return ahead + level


def _among_best(values: Sequence[jax.Array], count: int) -> list[jax.Array]:
    """Which of a few arrays are, at each position, among the ``count`` largest; of equals the first. Elementwise: no kernel of its own."""

    def ahead(i: int, j: int) -> jax.Array:
        return values[j] >= values[i] if j < i else values[j] > values[i]

    ranks = (functools.reduce(jnp.add, [ahead(i, j).astype(jnp.int32) for j in range(len(values)) if j != i]) for i in range(len(values)))
    return [rank < count for rank in ranks]


def _sum_of_best_two(x: jax.Array) -> jax.Array:
    """Of the last axis, as ``lax.top_k(x, 2)[0].sum(-1)``; of the only one where there is just one."""
    none = jnp.float32(-jnp.inf)

    def best(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.maximum(a[0], b[0]), jnp.maximum(jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1]))

    first, second = lax.reduce((x, jnp.full_like(x, none)), (none, none), best, (x.ndim - 1,))
    return first + second if x.shape[-1] > 1 else first


def _of_rank(rank: jax.Array, score: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """``[N, count]`` each: index and score of those ranked below ``count``, in order. Where a score is NaN, so are its row's."""
    hit = rank[:, None] == jnp.arange(count)[:, None]
    index = jnp.arange(rank.shape[-1], dtype=jnp.int32)

    def join(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.maximum(a[0], b[0]), a[1] + b[1]  # one hit each; none out of range even where NaN breaks the order

    parts = (jnp.where(hit, index, 0), jnp.where(hit, score[:, None], 0.0))
    return tuple(lax.reduce(parts, (jnp.int32(0), jnp.float32(0)), join, (2,)))
