"""Sum and norm in plain XLA."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.parts import summed


class Scales(NamedTuple):
    """The scales of one layer's norm.

    Attributes:
      stack: ``[L, D]``, those of all layers.
      layer: int32 scalar, which of them.
      eps: what is added to the mean square.
    """

    stack: jax.Array
    layer: jax.Array
    eps: float


def add_and_norm(x: jax.Array, parts: jax.Array | None, scales: Scales) -> tuple[jax.Array, jax.Array]:
    """See the package's ``add_and_norm``."""
    x = x if parts is None else x + summed(parts)
    return x, rms_norm(x, scales.stack[scales.layer], scales.eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale
