"""What stands in for products with an operand in registers, which Mosaic GPU's simulator does not know."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.grouped_matmul import gpu_weights
from pallas_kernels.quantised import dequantise
from pallas_kernels.quantised.words import STEP, TILE, Packed, unpack


def operand_in_shared_memory(weights, *, parts, columns):
    """``gpu_weights.words`` with words unpacked by plain code, and stored before they are multiplied."""
    stream = gpu_weights.words(weights, parts=parts, columns=columns)

    def multiply(sums, shared, rows, slot, worker):
        left = shared["left_s"].at[worker]

        def product(sums, packed, scales, rows, form):
            tile = dequantise(unpack(Packed(packed[...][None], jnp.ones((1, TILE), jnp.bfloat16), form))).T
            if scales:
                tile *= jnp.repeat(jnp.stack(scales, 1).astype(jnp.float32), STEP // len(scales), axis=1)
            left[...] = tile.astype(jnp.bfloat16)
            mosaic_gpu.wgmma(sums, left, rows.T)
            mosaic_gpu.wgmma_wait(0)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(gpu_weights, "unpacked_product", product)
            stream.multiply(sums, shared, rows, slot, worker)

    left = gpu_weights.staged((columns // TILE, TILE, STEP))
    return stream._replace(multiply=multiply, scratch=lambda stages: stream.scratch(stages) | {"left_s": left})
