"""One matrix of a stack, and one gated MLP, in plain jnp."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.xla import read_in_bytes
from pallas_kernels.linear.stacks import Stack
from pallas_kernels.quantised import Quantised, of_bits
from pallas_kernels.quantised.matrices import Matrices
from pallas_kernels.quantised.words import Packed, unpack


def linear(x: jax.Array, stack: Stack, layer: ArrayLike) -> jax.Array:
    """See the package's ``linear``: a slice and a matmul. Of quantised ones no more than the layer's matrix is ever made plain."""
    if not isinstance(stack, Matrices):
        return jnp.tensordot(x, stack[layer], x.ndim - 2)
    rows = x.reshape(*x.shape[:2], -1)
    return _product(rows, _of_layer(stack, layer)).reshape(*x.shape[:2], *stack.columns).astype(x.dtype)


def mlp(x: jax.Array, gate_up: Stack, down: Stack, layer: ArrayLike, *, linear: Callable[..., jax.Array] = linear) -> jax.Array:
    """See the package's ``mlp``; both products by ``linear``."""
    h = linear(x, gate_up, layer)
    return linear(jax.nn.silu(h[..., 0, :]) * h[..., 1, :], down, layer)


def _of_layer(stack: Matrices, layer: ArrayLike) -> Quantised:
    """``values [K, N, ...]`` and ``scales [G, N, ...]``, or with all columns in one axis. Not flattened before they are sliced: on a TPU
    other axes are another order in memory, of a whole stack."""
    if stack.packed:
        flat = stack.flat()
        assert isinstance(flat, Packed)
        return unpack(flat[layer])
    return Quantised(stack.numbers[layer], stack.scales[layer], stack.form)


def _product(rows: jax.Array, matrix: Quantised) -> jax.Array:
    """``[R, T, N, ...]`` float32: ``rows [R, T, K]`` times a matrix of :func:`_of_layer`."""
    scales, (groups, *columns) = matrix.scales, matrix.scales.shape
    values = of_bits(read_in_bytes(matrix)).values.astype(rows.dtype)
    if groups > 1:
        values = (values.reshape(groups, -1, *columns) * scales[:, None].astype(rows.dtype)).reshape(values.shape)
    out = jnp.tensordot(rows, values, 1, preferred_element_type=jnp.float32)
    return out if groups > 1 else out * scales[0].astype(jnp.float32)
