"""What ``expert_mlp`` takes for a stack of matrices: an array, or one of its quantised forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quantised import Form, Quantised, dequantise, dtype_of, in_int8, quantise
from pallas_kernels.quantised.matrices import is_quantised
from pallas_kernels.quantised.words import STEP, Packed, pack, packs, unpack


__all__ = ["Stack", "arranged", "is_quantised", "plain", "stored"]

Stack = jax.Array | Quantised | Packed


def stored(w: jax.Array, form: Form, *, backend: str, dtype: jax.typing.DTypeLike) -> Quantised | Packed:
    """Matrices ``w [..., K, N]`` quantised, in the order and the dtype that ``backend`` reads.

    A CPU holds all forms in int8: XLA would widen the whole stack of a program to that, or to float16, before its first layer. The tensor
    cores of Hopper read words of their own, where activations are bfloat16 and the matrices consist of whole tiles.
    """
    return arranged(quantise(w, form, dtype=jnp.int8 if form == "int4" else None), backend=backend, dtype=dtype)


def arranged(q: Quantised, *, backend: str, dtype: jax.typing.DTypeLike) -> Quantised | Packed:
    """Quantised matrices in the order and the dtype that ``backend`` reads; see :func:`stored`."""
    depth, groups = q.shape[-2], q.scales.shape[-2]
    if backend == "gpu" and jnp.dtype(dtype) == jnp.bfloat16 and packs(q.shape) and (groups == 1 or groups * STEP % depth == 0):
        return pack(q)
    return in_int8(q) if backend == "cpu" else Quantised(q.values.astype(dtype_of(q.form)), q.scales, q.form)


def plain(stack: Stack, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The matrices that a stack stands for; arrays keep their own dtype."""
    if isinstance(stack, Packed):
        stack = unpack(stack)
    return dequantise(stack, dtype) if isinstance(stack, Quantised) else stack
