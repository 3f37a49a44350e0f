"""The experts by ``lax.ragged_dot``: sort by expert, two grouped matmuls, put back. For TPU and GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.routing import combine, held_here, route


def ragged(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    layer: ArrayLike | None = None,
    valid: jax.Array | None = None,
    first_expert: ArrayLike | None = None,
) -> jax.Array:
    """See ``expert_mlp``. Right on every platform; on the CPU ``ragged_dot`` is a dense loop and slow.

    With ``first_expert`` the matrices hold only the experts from that id on, and what the others would add is left out.
    """
    num_experts = gate_up.shape[-3]
    held = None
    if first_expert is not None:
        expert_ids, held = held_here(expert_ids, first_expert, num_experts)
    routing = route(expert_ids, num_experts=num_experts, valid=valid)
    sizes = jnp.sum(routing.expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    if layer is not None:
        # The other layers' experts are groups without rows. Slicing the layer out would copy all its weights.
        sizes = lax.dynamic_update_slice(jnp.zeros(gate_up.shape[0] * num_experts, jnp.int32), sizes, (jnp.int32(layer) * num_experts,))
        gate_up, down = (a.reshape(-1, *a.shape[2:]) for a in (gate_up, down))
    both = lax.ragged_dot(x[routing.token], gate_up, sizes, preferred_element_type=jnp.float32)
    gate, up = jnp.split(both, 2, axis=-1)
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    out = lax.ragged_dot(hidden, down, sizes, preferred_element_type=jnp.float32)
    return combine(out, routing.place, weights, valid=valid, held=held).astype(x.dtype)
