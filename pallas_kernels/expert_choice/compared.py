"""Choosing experts by comparing every expert with every other: for a GPU, where XLA sorts in several slow kernels.

The same choice as by sorting, in a few fused kernels, for ``E**2`` comparisons a token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.expert_choice.reference import Choice, Router, epsilon, scores


def choose(x: jax.Array, matrix: jax.Array, bias: jax.Array | None, router: Router, *, valid: jax.Array | None = None) -> Choice:
    """See the package's ``choose``. Where scores are not numbers, ids are in range all the same."""
    del valid
    # bfloat16 products are exact in float32, so the operands need not be widened.
    wide = (x, matrix) if x.dtype == jnp.bfloat16 else (x.astype(jnp.float32), matrix.astype(jnp.float32))
    score = scores(jnp.einsum("nd,de->ne", *wide, preferred_element_type=jnp.float32), router)
    compared = score if bias is None else score + bias.astype(jnp.float32)
    if router.kept < router.groups:
        grouped = compared.reshape(len(x), router.groups, -1)
        kept = jnp.stack(_among_best([*jnp.moveaxis(_sum_of_best_two(grouped), -1, 0)], router.kept), -1)
        compared = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(compared.shape)
    ids, weights = _of_rank(_rank(lax.optimization_barrier(compared)), score, router.top_k)
    if router.normalise:
        # Added up one by one, the sum is part of whatever kernel uses the weights.
        total = sum(weights[:, i : i + 1] for i in range(router.top_k))
        weights = weights / (total + epsilon(router))
    return Choice(ids.astype(jnp.int32), weights * router.scale)


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
