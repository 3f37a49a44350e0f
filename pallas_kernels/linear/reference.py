"""One matrix of a stack, in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def linear(x: jax.Array, stack: jax.Array, layer: ArrayLike) -> jax.Array:
    """See the package's ``linear``: a slice and a matmul."""
    return jnp.tensordot(x, stack[layer], x.ndim - 2)
