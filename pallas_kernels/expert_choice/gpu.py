"""Choosing experts on a Hopper GPU, where XLA takes many kernels for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.expert_choice import compared, gpu_kernel
from pallas_kernels.expert_choice.reference import Choice, Router


def choose(x: jax.Array, matrix: jax.Array, bias: jax.Array | None, router: Router, *, valid: jax.Array | None = None) -> Choice:
    """See the package's ``choose``. Numbers of experts that do not suit the kernel are compared."""
    if not gpu_kernel.fits(matrix.shape[1], router):
        return compared.choose(x, matrix, bias, router, valid=valid)
    # In parts of the depth, for a product of few columns would be work for few multiprocessors; the kernel adds them up.
    parts = next(p for p in ((16, 4, 1) if len(x) <= 128 else (4, 1)) if x.shape[1] % (p * 128) == 0 or p == 1)
    deep, wide = x.reshape(len(x), parts, -1), matrix.astype(x.dtype).reshape(parts, -1, matrix.shape[1])
    logits = jnp.einsum("npd,pde->pne", deep, wide, preferred_element_type=jnp.float32)  # products of bfloat16 are exact in float32
    return gpu_kernel.choose(logits, bias, router)
