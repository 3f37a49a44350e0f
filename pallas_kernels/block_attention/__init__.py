"""Block attention: a window of blocks over a paged prefix and itself, and the write of finished blocks into the pool."""

from __future__ import annotations

from typing import Any, Literal

import jax

from pallas_kernels.block_attention import gpu, reference, tpu
from pallas_kernels.block_attention.masked import masked_attention
from pallas_kernels.block_attention.reference import split_heads
from pallas_kernels.target import Target, is_hopper, pick


__all__ = ["Backend", "block_attention", "choose_backend", "masked_attention", "pool_order", "split_heads", "write_blocks"]

Backend = Literal["reference", "gpu", "tpu"]

_ATTENTION = {"reference": reference.block_attention, "gpu": gpu.block_attention, "tpu": tpu.block_attention}
_WRITE = {"reference": reference.write_blocks, "gpu": reference.write_blocks, "tpu": tpu.write_blocks}


def choose_backend(target: Target) -> Backend:
    """The backend used on ``target`` unless told otherwise."""
    return "gpu" if is_hopper(target) else "tpu" if target.platform == "tpu" else "reference"


def pool_order(backend: str) -> tuple[int, ...] | None:
    """Dimensions of the pool from major to minor, as ``backend`` reads it where it lies; None: in their order."""
    return tpu.POOL_ORDER if backend == "tpu" else None


def block_attention(
    heads: jax.Array,
    *,
    pool_k: jax.Array,
    pool_v: jax.Array,
    layer: jax.Array,
    page_table: jax.Array,
    prefix_len: jax.Array,
    lanes: jax.Array,
    before: tuple[jax.Array, jax.Array] | None = None,
    visible: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Block-causal attention: queries see the cached prefix, the live blocks before theirs, and their own block.

    Args:
      heads: ``[R, W, KV, G + 2, H]`` of W = lanes x B window positions: for each key/value head its G query heads, its key, its value.
      pool_k, pool_v: ``[L, N, B, KV, H]`` the paged pool; a page holds one block.
      layer: int32 scalar, which layer of the pool.
      page_table: ``[R, P]`` int32, the pages of a row's positions; entries at or past N are not read into any result.
      prefix_len: ``[R]`` int32, how many positions from 0 on are cached, a multiple of B.
      lanes: ``[R, W / B]`` bool, blocks of the window that exist; no other block sees a lane that does not.
      before: ``(heads [R, C, KV, G + 2, H], live [R] bool)``: positions between prefix and window whose KV is not in the pool yet;
        seen by all queries of rows where ``live``. Their queries are not read.
      visible: ``[R, W]`` bool; where given, all queries see just these positions of the window, whatever their blocks. Plain XLA.
      backend: see :data:`Backend`; None chooses by the current mesh.

    Returns:
      ``[R, W, KV, G, H]`` in the dtype of ``heads``; rows of lanes that do not exist mean nothing.

    Raises:
      ValueError: for an unknown backend.
    """
    options: dict[str, Any] = {"pool_k": pool_k, "pool_v": pool_v, "layer": layer, "page_table": page_table}
    options |= {"prefix_len": prefix_len, "lanes": lanes, "before": before}
    if visible is not None:
        return reference.block_attention(heads, visible=visible, **options)
    return pick("block_attention", backend, choose_backend, _ATTENTION)(heads, **options)


def write_blocks(pool: jax.Array, fresh: jax.Array, pages: jax.Array, *, backend: str | None = None) -> jax.Array:
    """Writes whole blocks into their pages; with the pool donated this happens in place.

    Args:
      pool: ``[L, N, B, KV, H]``.
      fresh: ``[L, R, B, KV, H]``, one block a row.
      pages: ``[R]`` int32; rows with a page at or past N write nothing.
      backend: as in :func:`block_attention`.
    """
    return pick("block_attention", backend, choose_backend, _WRITE)(pool, fresh, pages)
