"""From chosen experts to rows sorted by expert and back, by sorts and gathers alone: scatters are slow."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class Routing(NamedTuple):
    """The ``P = T * k`` (token, expert) pairs, sorted by expert; pairs of invalid tokens last.

    Attributes:
      token: ``[P]`` int32, the token of each sorted pair.
      expert: ``[P]`` int32, its expert, never decreasing; ``E`` for invalid tokens.
      place: ``[T, k]`` int32, where each pair went: ``expert[place[t, j]] == expert_ids[t, j]`` for valid tokens.
    """

    token: jax.Array
    expert: jax.Array
    place: jax.Array


def route(expert_ids: jax.Array, *, num_experts: int, valid: jax.Array | None) -> Routing:
    """Sorts the pairs of ``expert_ids [T, k]``; ``valid [T]`` bool or None."""
    if valid is not None:
        expert_ids = jnp.where(valid[:, None], expert_ids, num_experts)
    pairs = expert_ids.reshape(-1)
    order = jnp.argsort(pairs).astype(jnp.int32)
    place = jnp.argsort(order).astype(jnp.int32).reshape(expert_ids.shape)
    return Routing(order // expert_ids.shape[1], pairs[order], place)


def held_here(expert_ids: jax.Array, first_expert: ArrayLike, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """``expert_ids`` counted from ``first_expert`` on, ``num_experts`` for those beyond; and which are not."""
    expert_ids = expert_ids - first_expert
    held = (expert_ids >= 0) & (expert_ids < num_experts)
    return jnp.where(held, expert_ids, num_experts), held


def combine(rows: jax.Array, place: jax.Array, weights: jax.Array, *, valid: jax.Array | None, held: jax.Array | None = None) -> jax.Array:
    """``[T, D]`` float32: each token's weighted sum of its ``rows[place[t]]``, added in the order of its choices.

    Where ``place`` has more columns than ``weights``, what is there counts whole. ``held [T, k]`` bool: other choices add nothing.
    """
    total = jnp.zeros((weights.shape[0], rows.shape[1]), jnp.float32)
    for j in range(place.shape[1]):
        row, whole = rows[place[:, j]], j >= weights.shape[1]
        if held is not None and not whole:
            row = jnp.where(held[:, j, None], row, 0)
        total += row if whole else weights[:, j, None] * row
    # A select, not a product: what stands in rows that were never computed may be NaN.
    return total if valid is None else jnp.where(valid[:, None], total, 0)
