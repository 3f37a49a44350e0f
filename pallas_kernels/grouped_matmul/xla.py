"""The experts by ``lax.ragged_dot``: sort by expert, two grouped matmuls, put back. For TPU and GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.routing import combine, route


def ragged(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    layer: ArrayLike | None = None,
    valid: jax.Array | None = None,
) -> jax.Array:
    """See ``expert_mlp``. Right on every platform; on the CPU ``ragged_dot`` is a dense loop and slow."""
    if layer is not None:
        gate_up, down = gate_up[layer], down[layer]
    num_experts = gate_up.shape[0]
    routing = route(expert_ids, num_experts=num_experts, valid=valid)
    sizes = jnp.sum(routing.expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    both = lax.ragged_dot(x[routing.token], gate_up, sizes, preferred_element_type=jnp.float32)
    gate, up = jnp.split(both, 2, axis=-1)
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    out = lax.ragged_dot(hidden, down, sizes, preferred_element_type=jnp.float32)
    return combine(out, routing, weights, valid=valid).astype(x.dtype)
