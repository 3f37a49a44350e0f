"""Block attention: a window of blocks over a paged prefix and itself, and the write of finished blocks into the pool.

A page of the pool need not be a block of the window: one of them is a multiple of the other.
"""

from __future__ import annotations

from typing import Any, Literal

import jax

from pallas_kernels.block_attention import gpu, reference, tpu
from pallas_kernels.block_attention.masked import canvas_attention, masked_attention
from pallas_kernels.block_attention.reference import Keys, split_heads, write_positions
from pallas_kernels.block_attention.stored import KV, KV_FORMS, Scaled, Stored, rounded, vector_bytes
from pallas_kernels.target import Target, is_hopper, pick


__all__ = [
    "KV",
    "KV_FORMS",
    "Backend",
    "Keys",
    "Scaled",
    "Stored",
    "block_attention",
    "canvas_attention",
    "choose_backend",
    "masked_attention",
    "pool_order",
    "rounded",
    "split_heads",
    "vector_bytes",
    "write_blocks",
    "write_positions",
]

Backend = Literal["reference", "gpu", "tpu"]


def _tpu_attention(heads: jax.Array, keys: Keys, **options: Any) -> jax.Array:
    whole = keys.pool_k.shape[2] % tpu.SUBLANES == 0 and keys.pool_k.dtype == heads.dtype
    return (tpu if whole else reference).block_attention(heads, keys, **options)


def _tpu_write(pool: Stored, fresh: jax.Array, pages: jax.Array, offsets: jax.Array) -> Stored:
    block, page = fresh.shape[2], pool.shape[2]
    whole = block == page or min(block, page) % tpu.SUBLANES == 0
    if not whole or isinstance(pool, Scaled) or pool.dtype != fresh.dtype:
        return reference.write_blocks(pool, fresh, pages, offsets)
    return tpu.write_blocks(pool, fresh, pages, offsets)


_ATTENTION = {"reference": reference.block_attention, "gpu": gpu.block_attention, "tpu": _tpu_attention}
_WRITE = {"reference": reference.write_blocks, "gpu": reference.write_blocks, "tpu": _tpu_write}


def choose_backend(target: Target) -> Backend:
    """The backend used on ``target`` unless told otherwise."""
    return "gpu" if is_hopper(target) else "tpu" if target.platform == "tpu" else "reference"


def pool_order(backend: str) -> tuple[int, ...] | None:
    """Dimensions of the pool from major to minor, as ``backend`` reads it where it lies; None: in their order."""
    return tpu.POOL_ORDER if backend == "tpu" else None


def block_attention(
    heads: jax.Array,
    keys: Keys,
    *,
    layer: jax.Array,
    block: int,
    pending: tuple[jax.Array, jax.Array] | None = None,
    visible: jax.Array | None = None,
    whole_blocks: bool = True,
    backend: str | None = None,
) -> jax.Array:
    """Block-causal attention: queries see the cached prefix, the pending block, the live blocks before theirs, and their own block.

    Args:
      heads: ``[R, W, KV, G + 2, H]`` of W window positions: for each key/value head its G query heads, its key, its value.
      keys: the pool, and what each row has of it.
      layer: int32 scalar, which layer of the pool.
      block: B, positions of a block; static. It divides W, and is a multiple of a page or divides it.
      pending: ``(heads [R, C, KV, G + 2, H], live [R] bool)``: positions between prefix and window whose KV is not in the pool yet;
        seen by all queries of rows where ``live``. Their queries are not read.
      visible: ``[R, W, W]`` bool (query, key) or ``[R, W]`` (key): where given, queries see just these positions of the window, whatever
        their blocks. Always plain XLA.
      whole_blocks: whether every cached prefix is a number of whole blocks; static. The GPU's kernel does without, at the price of a mask.
      backend: see :data:`Backend`; None chooses by the current mesh. What a kernel is not made for takes the reference.

    Returns:
      ``[R, W, KV, G, H]`` in the dtype of ``heads``; rows of lanes that do not exist mean nothing.

    Raises:
      ValueError: for an unknown backend, or a block that fits neither window nor pages.
    """
    page, width = keys.pool_k.shape[2], heads.shape[1]
    if width % block or (page % block and block % page) or keys.lanes.shape[1] != width // block:
        raise ValueError(f"block={block} fits neither a window of {width} in {keys.lanes.shape[1]} blocks, nor pages of {page}")
    if visible is not None:
        return reference.block_attention(heads, keys, layer=layer, block=block, pending=pending, visible=visible)
    attend = pick("block_attention", backend, choose_backend, _ATTENTION)
    if attend is gpu.block_attention:
        return attend(heads, keys, layer=layer, block=block, pending=pending, whole_blocks=whole_blocks)
    return attend(heads, keys, layer=layer, block=block, pending=pending)


def write_blocks(pool: Stored, fresh: jax.Array, pages: jax.Array, offsets: jax.Array, *, backend: str | None = None) -> Stored:
    """Writes whole blocks into their pages, in the pool's form; with the pool donated this happens in place.

    Args:
      pool: ``[L, N, P, KV, H]``; see ``stored`` for what it may be. A pool of another type than ``fresh`` is written by the reference.
      fresh: ``[L, R, B, KV, H]``, one block a row.
      pages: ``[R]`` int32, the page of each block; ``[R, B / P]`` where a block has several. Nothing is written to pages at or past N.
      offsets: ``[R]`` int32, where in its page a block begins, a multiple of B; read where a page holds several.
      backend: as in :func:`block_attention`.
    """
    return pick("block_attention", backend, choose_backend, _WRITE)(pool, fresh, pages, offsets)
