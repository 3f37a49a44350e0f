"""One matrix of a stack, and one gated MLP, in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def linear(x: jax.Array, stack: jax.Array, layer: ArrayLike) -> jax.Array:
    """See the package's ``linear``: a slice and a matmul."""
    return jnp.tensordot(x, stack[layer], x.ndim - 2)


def mlp(x: jax.Array, gate_up: jax.Array, down: jax.Array, layer: ArrayLike) -> jax.Array:
    """See the package's ``mlp``."""
    h = linear(x, gate_up, layer)
    return linear(jax.nn.silu(h[..., 0, :]) * h[..., 1, :], down, layer)
