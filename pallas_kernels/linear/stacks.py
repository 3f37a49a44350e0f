"""What ``linear`` takes for a stack of matrices: an array, or quantised ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
from jax import lax

from pallas_kernels.grouped_matmul import stacks
from pallas_kernels.quantised import Form, Quantised
from pallas_kernels.quantised.matrices import Matrices, matrices
from pallas_kernels.quantised.words import Packed, packs


Stack = jax.Array | Matrices


def stored(w: jax.Array, form: Form, *, rows: int, backend: str, dtype: jax.typing.DTypeLike, part: tuple[int, int]) -> Matrices:
    """Matrices quantised, layer after layer, in the order and the dtype that the experts' ``backend`` reads (``grouped_matmul.stored``).

    Args:
      w: ``[L, ..., N, ...]``: behind L so many axes that products contract as ``rows`` says, then those of the columns.
      form: of the numbers.
      rows: see ``w``.
      backend, dtype: see ``grouped_matmul.stored``.
      part: ``(K, N)`` of a matrix's part that may lie by itself, on a device of its own: tiles lie in one.
    """
    one = functools.partial(stacks.stored, form=form, backend=_order(backend, part), dtype=dtype)
    return _by_layer(lambda w: one(_flat(w, rows)), (w,), w.shape[1 + rows :])


def arranged(
    values: jax.Array,
    scales: jax.Array,
    form: Form,
    *,
    rows: int,
    groups: int,
    backend: str,
    dtype: jax.typing.DTypeLike,
    part: tuple[int, int],
) -> Matrices:
    """What :func:`stored` makes, of numbers that were quantised elsewhere.

    Args:
      values: ``[L, ..., N, ...]``, as ``w`` of :func:`stored`.
      scales: of the same shape: that of each number.
      form, rows, backend, dtype, part: see :func:`stored`.
      groups: runs of rows of a column, each of which shares a scale.
    """

    def one(values: jax.Array, scales: jax.Array) -> Quantised | Packed:
        values, scales = _flat(values, rows), _flat(scales, rows)
        q = Quantised(values, scales[:: len(scales) // groups], form)
        return stacks.arranged(q, backend=_order(backend, part), dtype=dtype)

    return _by_layer(one, (values, scales), values.shape[1 + rows :])


def _by_layer(one: Callable[..., Quantised | Packed], arrays: tuple[jax.Array, ...], columns: tuple[int, ...]) -> Matrices:
    # What is put into another order takes several times its room while that is done.
    return matrices(lax.map(lambda layer: one(*layer), arrays), columns)


def _flat(matrix: jax.Array, rows: int) -> jax.Array:
    """``[K, N]``."""
    return matrix.reshape(math.prod(matrix.shape[:rows]), -1)


def _order(backend: str, part: tuple[int, int]) -> str:
    return backend if packs(part) or backend == "cpu" else "ragged"
