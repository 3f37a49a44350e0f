"""What ``expert_mlp`` takes for a stack of matrices: an array, or one of its quantised forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quantised import Form, Quantised, dequantise, quantise
from pallas_kernels.quantised.words import Packed, pack, packs, unpack


Stack = jax.Array | Quantised | Packed


def stored(w: jax.Array, form: Form, *, backend: str, dtype: jax.typing.DTypeLike) -> Quantised | Packed:
    """Matrices ``w [..., K, N]`` quantised, in the order and the integers that ``backend`` reads.

    A CPU holds ``"int4"`` in int8: XLA would widen the whole stack of a program to that before its first layer. The tensor cores of Hopper
    read words of their own, where activations are bfloat16 and the matrices consist of whole tiles.
    """
    if backend == "gpu" and jnp.dtype(dtype) == jnp.bfloat16 and packs(w.shape):
        return pack(quantise(w, form, dtype=jnp.int8))
    return quantise(w, form, dtype=jnp.int8 if backend == "cpu" else None)


def plain(stack: Stack, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The matrices that a stack stands for; arrays keep their own dtype."""
    if isinstance(stack, Packed):
        stack = unpack(stack)
    return dequantise(stack, dtype) if isinstance(stack, Quantised) else stack


def is_quantised(stack: Stack) -> bool:
    """Whether a stack is one of the quantised forms."""
    return isinstance(stack, (Quantised, Packed))
