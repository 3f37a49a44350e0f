"""Block attention: a window of blocks over a paged prefix and itself, and the write of finished blocks into the pool."""

from pallas_kernels.block_attention.reference import block_attention, write_blocks


__all__ = ["block_attention", "write_blocks"]
