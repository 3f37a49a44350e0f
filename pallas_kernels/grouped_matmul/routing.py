"""From chosen experts to rows sorted by expert and back, by sorts and gathers alone: scatters are slow."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


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


def combine(rows: jax.Array, place: jax.Array, weights: jax.Array, *, valid: jax.Array | None) -> jax.Array:
    """``[T, D]`` float32: each token's weighted sum of its ``rows[place[t]]``, added in the order of its choices.

    Where ``place`` has more columns than ``weights``, what is there counts whole.
    """
    total = jnp.zeros((weights.shape[0], rows.shape[1]), jnp.float32)
    for j in range(place.shape[1]):
        row = rows[place[:, j]]
        total += weights[:, j, None] * row if j < weights.shape[1] else row
    # A select, not a product: what stands in rows that were never computed may be NaN.
    return total if valid is None else jnp.where(valid[:, None], total, 0)
