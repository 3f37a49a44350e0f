"""Norms of heads and their rotation in plain XLA."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.norm.reference import rms_norm
from pallas_kernels.parts import summed


class HeadNorms(NamedTuple):
    """Norms of the queries and of the keys of one layer.

    Attributes:
      queries, keys: ``[L, H]``, scales of all layers.
      layer: int32 scalar, which of them.
      eps: what is added to the mean square.
    """

    queries: jax.Array
    keys: jax.Array
    layer: jax.Array
    eps: float


def rotate(heads: jax.Array, table: tuple[jax.Array, jax.Array], norms: HeadNorms | None, bias: jax.Array | None) -> jax.Array:
    """See the package's ``rotate``. All heads go through it together, which makes two kernels of it on a GPU; the values then are taken
    as they came."""
    heads = summed(heads) if bias is None else summed(heads) + bias
    head = jnp.arange(heads.shape[-2])[:, None]
    normed = heads
    if norms is not None:
        # Selected, not concatenated: no kernel of its own.
        scale = jnp.where(head < heads.shape[-2] - 2, norms.queries[norms.layer], norms.keys[norms.layer])
        normed = rms_norm(heads, scale, norms.eps)
    return jnp.where(head == heads.shape[-2] - 1, heads, _rope(normed, *(t[:, :, None, None] for t in table)))


def _rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first ``cos.shape[-1]`` dimensions of the last axis; the rest pass through."""
    dim = cos.shape[-1]
    r = x[..., :dim].astype(jnp.float32)
    half = jnp.concatenate([-r[..., dim // 2 :], r[..., : dim // 2]], -1)
    return jnp.concatenate([(r * cos + half * sin).astype(x.dtype), x[..., dim:]], -1)
