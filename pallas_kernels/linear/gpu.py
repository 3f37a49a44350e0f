"""One matrix of a stack on a Hopper GPU, read where it lies."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.gpu import padded
from pallas_kernels.grouped_matmul.gpu_kernel import Groups, Tile, matmul
from pallas_kernels.linear import reference


_STREAMED_ROWS = 1024
"""Up to this many rows a matmul is bound by its weights."""


def linear(x: jax.Array, stack: jax.Array, layer: ArrayLike) -> jax.Array:
    """See the package's ``linear``: a grouped matmul with one group. Many rows, and other dtypes, are a slice and a matmul."""
    axes = x.ndim - 2
    rows, depth, width = math.prod(x.shape[:2]), math.prod(x.shape[2:]), math.prod(stack.shape[1 + axes :])
    shape = (*x.shape[:2], *stack.shape[1 + axes :])
    if x.dtype != jnp.bfloat16 or stack.dtype != x.dtype or rows > _STREAMED_ROWS or depth % 64 or width % 64:
        return reference.linear(x, stack, layer)
    tile = min(128, max(8, 1 << (rows - 1).bit_length()))
    one = [jnp.array([n], jnp.int32) for n in (0, rows, -(-rows // tile))]
    flat, weights = padded(x.reshape(rows, depth)), stack.reshape(len(stack), 1, depth, width)
    return matmul(
        flat, weights, None, jnp.asarray(layer, jnp.int32), Groups(*one), swiglu=False, tile=Tile(tile, 64 if rows <= 512 else 128)
    )[:rows].reshape(shape)
