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

_MULTIPROCESSORS = 132  # of an H100 or H200

_SHALLOW = 384
"""Least depth of a part: what is less takes no longer."""


def linear(x: jax.Array, stack: Stack, layer: ArrayLike) -> jax.Array:
    """See the package's ``linear``, as parts. Many rows, and other dtypes, are a slice and a matmul."""
    depth = math.prod(x.shape[2:])
    columns = stack.columns if isinstance(stack, Matrices) else stack.shape[x.ndim - 1 :]
    if not _streams(x, stack, depth, math.prod(columns)):
        return reference.linear(x, stack, layer)[None]
    rows = x.reshape(-1, depth)
    parts = _parts(len(rows), depth, math.prod(columns), step=STEP if isinstance(stack, Matrices) else UNIT)
    out = _product(rows, _in_parts(stack, parts, depth), layer)
    return out.reshape(parts, *x.shape[:2], *columns)


def mlp(x: jax.Array, gate_up: Stack, down: Stack, layer: ArrayLike) -> jax.Array:
    """See the package's ``mlp``, as parts. Many rows, and other dtypes, go through plain matmuls."""
    depth, width = gate_up.shape[1], gate_up.shape[3]
    if not _streams(x, gate_up, depth, width):
        return reference.mlp(x, gate_up, down, layer)[None]
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
    """Parts of the depth, of whole steps, where the columns by themselves give work to few multiprocessors.

    Who reads the product adds the parts up. The table of what was measured is in the README.
    """
    if rows > 64:
        return 2 if width <= 2048 and depth >= (1024 if rows <= 256 else 6144) and depth % (2 * step) == 0 else 1
    tiles = width // UNIT
    return next((n for n in (4, 2) if n * tiles <= _MULTIPROCESSORS and depth >= n * _SHALLOW and depth % (n * step) == 0), 1)


def _product(rows: jax.Array, weights: jax.Array | Packed, layer: ArrayLike, *, swiglu: bool = False) -> jax.Array:
    """``[N, D]`` times ``weights [L, P, D / P, F]``, part by part: ``[P, N, F]``, half as wide with ``swiglu``."""
    count, parts = len(rows), weights.shape[1]
    tile = min(128, max(8, 1 << (count - 1).bit_length()))
    flat = padded(rows)
    columns = 64 if count <= 512 and not swiglu else 128
    out = matmul(flat, weights, None, jnp.asarray(layer, jnp.int32), None, swiglu=swiglu, tile=Tile(tile, columns))
    return out.reshape(parts, len(flat), -1)[:, :count]
