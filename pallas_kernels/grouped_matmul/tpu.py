"""The experts on a TPU7x, by the grouped matmul that comes with JAX's Pallas (megablox).

XLA's own, ``lax.ragged_dot``, takes stacked weights in other tiles there than parameters have, and so copies all of them. This kernel
reads them where they lie.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

from pallas_kernels.grouped_matmul.xla import ragged


_ROWS = 32  # of a tile: few of an expert's, and a multiple of what a tile of bfloat16 has
_TILE = 2**20  # weights of a tile; it is as high as a matrix, so that an expert's are read once however many rows it has


def tiled(*args: jax.Array, interpret: bool = False, **options: Any) -> jax.Array:
    """See ``expert_mlp``; ``interpret`` runs it on any device."""
    return ragged(*args, multiply=functools.partial(_multiply, interpret=interpret), **options)


def _multiply(rows: jax.Array, matrices: jax.Array, sizes: jax.Array, *, preferred_element_type: Any, interpret: bool) -> jax.Array:
    """As ``lax.ragged_dot`` ``[R, K] x [G, K, N] -> [R, N]``; what rows get that are in no group means nothing."""
    count, depth = rows.shape
    rows = jnp.pad(rows, ((0, -count % _ROWS), (0, 0)))
    width = min(matrices.shape[-1], max(128, _TILE // depth // 128 * 128))
    return gmm(rows, matrices, sizes, preferred_element_type, (_ROWS, depth, width), interpret=interpret)[:count]
