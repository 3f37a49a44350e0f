"""Attention under any mask, without a cache, for training: XLA's own, differentiable."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.target import current_target


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention of every query over the keys that its mask allows; by cuDNN on a GPU in bfloat16, else by plain XLA.

    Args:
      q: ``[R, T, KV, G, H]``.
      k, v: ``[R, S, KV, H]``.
      mask: ``[T, S]`` bool, true where a query sees a key.

    Returns:
      ``[R, T, KV, G, H]``.
    """
    merged = q.reshape(*q.shape[:2], -1, q.shape[-1])
    fused = current_target().platform == "gpu" and q.dtype == jnp.bfloat16
    out = jax.nn.dot_product_attention(merged, k, v, mask=mask[None, None], implementation="cudnn" if fused else "xla")
    return out.reshape(q.shape)
