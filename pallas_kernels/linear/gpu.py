"""Matrices of a stack on a Hopper GPU, read where they lie: grouped matmuls whose groups are parts of the depth."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.gpu import padded
from pallas_kernels.grouped_matmul.gpu_kernel import Tile, matmul
from pallas_kernels.grouped_matmul.gpu_weights import UNIT
from pallas_kernels.linear import reference
from pallas_kernels.linear.stacks import Stack
from pallas_kernels.quantised.matrices import Matrices
from pallas_kernels.quantised.words import STEP, Packed


_STREAMED_ROWS = 1024
"""Up to this many rows a matmul is bound by its weights."""


def linear(x: jax.Array, stack: Stack, layer: ArrayLike) -> jax.Array:
    """See the package's ``linear``. Many rows, and other dtypes, are a slice and a matmul."""
    depth = math.prod(x.shape[2:])
    columns = stack.columns if isinstance(stack, Matrices) else stack.shape[x.ndim - 1 :]
    if not _streams(x, stack, depth, math.prod(columns)):
        return reference.linear(x, stack, layer)
    rows = x.reshape(-1, depth)
    parts = _parts(len(rows), depth, math.prod(columns), step=STEP if isinstance(stack, Matrices) else UNIT)
    out = _product(rows, _in_parts(stack, parts, depth), layer)
    return out.reshape(*x.shape[:2], *columns)


def mlp(x: jax.Array, gate_up: Stack, down: Stack, layer: ArrayLike) -> jax.Array:
    """See the package's ``mlp``. Many rows, and other dtypes, go through :func:`linear`."""
    depth, width = gate_up.shape[1], gate_up.shape[3]
    if not _streams(x, gate_up, depth, width):
        return reference.mlp(x, gate_up, down, layer)
    rows = x.reshape(-1, depth)
    hidden = _product(rows, _in_parts(gate_up, 1, depth), layer, swiglu=True)
    return linear(hidden.reshape(*x.shape[:2], width), down, layer)


def _streams(x: jax.Array, stack: Stack, depth: int, width: int) -> bool:
    if x.dtype != jnp.bfloat16 or math.prod(x.shape[:2]) > _STREAMED_ROWS:
        return False
    if isinstance(stack, Matrices):
        return stack.packed
    return stack.dtype == jnp.bfloat16 and depth % UNIT == 0 and width % UNIT == 0


def _in_parts(stack: Stack, parts: int, depth: int) -> jax.Array | Packed:
    """``[L, parts, depth / parts, N]``; scales of whole columns are those of all parts."""
    if not isinstance(stack, Matrices):
        return stack.reshape(len(stack), parts, depth // parts, -1)
    flat = stack.flat()
    assert isinstance(flat, Packed)
    (layers, steps, *tiles), (groups, columns) = flat.words.shape, flat.scales.shape[1:]
    of_part = (1, 1) if groups == 1 else (parts, groups // parts)
    return Packed(flat.words.reshape(layers, parts, steps // parts, *tiles), flat.scales.reshape(layers, *of_part, columns), flat.form)


def _parts(rows: int, depth: int, width: int, *, step: int = UNIT) -> int:
    """Parts of the depth, of whole steps: two where the columns give work to few multiprocessors, and there is enough of it to be worth a
    sum.

    With what adds them up, an H100 takes for 32 rows of 1536 x 1536 5 microseconds less, of 2048 x 3072 2; of 8960 x 1536 12, not 21.
    """
    narrow = width <= (3072 if rows <= 64 else 2048) and depth >= (1024 if rows <= 256 else 6144)
    return 2 if narrow and depth % (2 * step) == 0 else 1


def _product(rows: jax.Array, weights: jax.Array | Packed, layer: ArrayLike, *, swiglu: bool = False) -> jax.Array:
    """``[N, D]`` times ``weights [L, P, D / P, F]``, the sum over the P parts: ``[N, F]``, half as wide with ``swiglu``."""
    count, parts = len(rows), weights.shape[1]
    tile = min(128, max(8, 1 << (count - 1).bit_length()))
    flat = padded(rows)
    columns = 64 if count <= 512 and not swiglu else 128
    out = matmul(flat, weights, None, jnp.asarray(layer, jnp.int32), None, swiglu=swiglu, tile=Tile(tile, columns))
    if parts > 1:
        out = out.reshape(parts, len(flat), -1).astype(jnp.float32).sum(0).astype(rows.dtype)
    return out[:count]
