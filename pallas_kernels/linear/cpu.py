"""Quantised matrices of a stack on a CPU: some rows at a time become float32 in the caches, and are multiplied there.

A layer made float32 whole would be written to memory and read from it again, which takes several times as long as reading its bytes does.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.cpu import float8
from pallas_kernels.linear import reference
from pallas_kernels.linear.stacks import Stack
from pallas_kernels.quantised import Quantised, in_int8
from pallas_kernels.quantised.matrices import Matrices


ROWS = 256
"""Most rows at a time. Of 2048 x 6144 in int8, 4 tokens take a processor 2.3, 2.1, 1.6 and 1.6 ms with 64, 128, 256 and 512, 32 tokens 7.5,
6.2, 5.2 and 5.2; in float32, as a slice and a matmul, 8.7 and 12."""


def linear(x: jax.Array, stack: Stack, layer: ArrayLike) -> jax.Array:
    """See the package's ``linear``. What is not quantised, or packed for tensor cores, is a slice and a matmul."""
    if not isinstance(stack, Matrices) or stack.packed:
        return reference.linear(x, stack, layer)
    flat = stack.flat()
    assert isinstance(flat, Quantised)
    rows = x.reshape(x.shape[0] * x.shape[1], -1).astype(jnp.float32)
    return _product(rows, in_int8(flat), jnp.asarray(layer, jnp.int32)).astype(x.dtype).reshape(*x.shape[:2], *stack.columns)


mlp = functools.partial(reference.mlp, linear=linear)


def _product(x: jax.Array, stack: Quantised, layer: jax.Array) -> jax.Array:
    """``[T, N]`` float32: ``x [T, K]`` times matrix ``layer`` of ``stack [L, K, N]``, all numbers in int8."""
    (_, depth, width), groups = stack.shape, stack.scales.shape[1]
    group, step = depth // groups, math.gcd(depth, ROWS)
    if step % group and group % step:
        step = group

    def part(of: jax.Array, first: jax.Array, count: int) -> jax.Array:
        return lax.dynamic_slice(of, (layer, first, jnp.int32(0)), (1, count, width))[0]

    def one_step(i: jax.Array, total: jax.Array) -> jax.Array:
        numbers = part(stack.values, i * step, step)
        w = float8(numbers) if stack.form == "fp8" else numbers.astype(jnp.float32)
        if groups > 1:
            scales = part(stack.scales, i * step // group, max(1, step // group)).astype(jnp.float32)
            w = (w.reshape(len(scales), -1, width) * scales[:, None]).reshape(step, width)
        return total + lax.dynamic_slice_in_dim(x, i * step, step, 1) @ w

    total = lax.fori_loop(0, depth // step, one_step, jnp.zeros((len(x), width), jnp.float32))
    return total * stack.scales[layer].astype(jnp.float32) if groups == 1 else total
