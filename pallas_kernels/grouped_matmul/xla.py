"""The experts by ``lax.ragged_dot``: sort by expert, two grouped matmuls, put back. For TPU and GPU."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.routing import combine, held_here, route
from pallas_kernels.grouped_matmul.stacks import Stack, is_quantised, plain
from pallas_kernels.quantised import Quantised
from pallas_kernels.target import current_target, multiplies


def ragged(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: Stack,
    down: Stack,
    *,
    layer: ArrayLike | None = None,
    valid: jax.Array | None = None,
    first_expert: ArrayLike | None = None,
    multiply: Callable[..., jax.Array] = lax.ragged_dot,
) -> jax.Array:
    """See ``expert_mlp``. Right on every platform; on the CPU ``ragged_dot`` is a dense loop and slow.

    With ``first_expert`` the matrices hold only the experts from that id on, and what the others would add is left out. Quantised
    matrices are multiplied as they are where the device does that; elsewhere one layer of them at a time is made plain. ``multiply``
    stands in for ``lax.ragged_dot`` on plain ones, and need not say what rows get that are in no group.
    """
    num_experts = gate_up.shape[-3]
    held = None
    if first_expert is not None:
        expert_ids, held = held_here(expert_ids, first_expert, num_experts)
    routing = route(expert_ids, num_experts=num_experts, valid=valid)
    if _as_they_are(x, gate_up) and _as_they_are(x, down):
        multiply = lax.ragged_dot
    elif is_quantised(gate_up) or is_quantised(down):
        gate_up, down = (plain(stack if layer is None else stack[layer], x.dtype) for stack in (gate_up, down))
        layer = None
    sizes = jnp.sum(routing.expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    expert = jnp.minimum(routing.expert, num_experts - 1)
    if layer is not None:
        # The other layers' experts are groups without rows. Slicing the layer out would copy all its weights.
        sizes = lax.dynamic_update_slice(jnp.zeros(gate_up.shape[0] * num_experts, jnp.int32), sizes, (jnp.int32(layer) * num_experts,))
        expert += jnp.asarray(layer, jnp.int32) * num_experts

    def product(x: jax.Array, stack: Stack) -> jax.Array:
        matrices, scales = (stack.values, stack.scales) if isinstance(stack, Quantised) else (plain(stack, x.dtype), None)
        out = multiply(x, matrices.reshape(-1, *matrices.shape[-2:]), sizes, preferred_element_type=jnp.float32)
        return out if scales is None else out * scales.reshape(-1, scales.shape[-1])[expert].astype(jnp.float32)

    gate, up = jnp.split(product(x[routing.token], gate_up), 2, axis=-1)
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    return combine(product(hidden, down), routing.place, weights, valid=valid, held=held).astype(x.dtype)


def _as_they_are(x: jax.Array, stack: Stack) -> bool:
    """Whether ``lax.ragged_dot`` takes the values of ``stack``, and a sum over K can be scaled when it is done."""
    if not isinstance(stack, Quantised) or stack.scales.shape[-2] != 1 or stack.form == "int4":
        return False
    return x.dtype == jnp.bfloat16 and stack.values.dtype.name == multiplies(current_target())
