"""Attention without a cache, over all of a canvas or under any mask: XLA's own, differentiable."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.target import current_target


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention of every query over the keys that its mask allows; by cuDNN on a GPU in bfloat16, else by plain XLA.

    Args:
      q: ``[R, T, KV, G, H]``.
      k, v: ``[R, S, KV, H]``.
      mask: ``[T, S]`` or ``[R, T, S]`` bool, true where a query sees a key.

    Returns:
      ``[R, T, KV, G, H]``.
    """
    mask = mask[..., None, :, :]  # the same for all heads
    return _attention(q, k, v, fused=current_target().platform == "gpu", mask=mask.reshape(-1, *mask.shape[-3:]))


def canvas_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, length: jax.Array, backend: str) -> jax.Array:
    """Softmax attention of every query over the first ``length [R]`` positions of its row.

    Args:
      q: ``[R, T, KV, G, H]``.
      k, v: ``[R, T, KV, H]``.
      length: int32; of a row of none the result means nothing.
      backend: as in ``block_attention``: ``"gpu"`` in bfloat16 is cuDNN, all else plain XLA.

    Returns:
      ``[R, T, KV, G, H]``.
    """
    lengths = {"key_value_seq_lengths": jnp.maximum(length, 1), "query_seq_lengths": jnp.full_like(length, q.shape[1])}
    return _attention(q, k, v, fused=backend == "gpu", **lengths)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, *, fused: bool, **masks: Any) -> jax.Array:
    merged = q.reshape(*q.shape[:2], -1, q.shape[-1])
    implementation: Literal["cudnn", "xla"] = "cudnn" if fused and q.dtype == jnp.bfloat16 else "xla"
    return jax.nn.dot_product_attention(merged, k, v, implementation=implementation, **masks).reshape(q.shape)
