"""One matrix of a stack, and one gated MLP, in plain jnp."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.xla import product
from pallas_kernels.linear.stacks import Stack
from pallas_kernels.quantised.matrices import Matrices
from pallas_kernels.quantised.words import Packed, unpack


def linear(x: jax.Array, stack: Stack, layer: ArrayLike) -> jax.Array:
    """See the package's ``linear``: a slice and a matmul. Of quantised ones no more than the layer's matrix is ever made plain."""
    if not isinstance(stack, Matrices):
        return jnp.tensordot(x, stack[layer], x.ndim - 2)
    rows = x.reshape(1, x.shape[0] * x.shape[1], -1)
    matrix = stack.flat()[layer]
    matrix = unpack(matrix) if isinstance(matrix, Packed) else matrix
    return product(rows, jax.tree.map(lambda a: a[None], matrix)).astype(x.dtype).reshape(*x.shape[:2], *stack.columns)


def mlp(x: jax.Array, gate_up: Stack, down: Stack, layer: ArrayLike, *, linear: Callable[..., jax.Array] = linear) -> jax.Array:
    """See the package's ``mlp``; both products by ``linear``."""
    h = linear(x, gate_up, layer)
    return linear(jax.nn.silu(h[..., 0, :]) * h[..., 1, :], down, layer)
