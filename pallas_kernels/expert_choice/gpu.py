"""Choosing experts on a Hopper GPU: many tokens by a kernel that counts as well, few by comparing."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.expert_choice import compared, gpu_kernel
from pallas_kernels.expert_choice.reference import Choice, Router
from pallas_kernels.grouped_matmul import gpu as experts


def choose(x: jax.Array, matrix: jax.Array, bias: jax.Array | None, router: Router, *, valid: jax.Array | None = None) -> Choice:
    """See the package's ``choose``. Few tokens, softmax scores, and numbers of experts that do not suit the kernel are compared."""
    if len(x) * router.top_k <= experts.COMPARED_PAIRS or not gpu_kernel.fits(matrix.shape[1], router):
        return compared.choose(x, matrix, bias, router)
    logits = jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)  # products of bfloat16 are exact in float32
    return gpu_kernel.choose(logits, jnp.zeros(matrix.shape[1]) if bias is None else bias, valid, router)
