"""Quantised matrices of a stack of layers, as leaves of a parameter tree that any of their axes may be split over devices."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantised import Form, Quantised
from pallas_kernels.quantised.words import STEP, Packed


@functools.partial(jax.tree_util.register_dataclass, data_fields=("numbers", "scales"), meta_fields=("form", "packed"))
@dataclasses.dataclass(frozen=True)
class Matrices:
    """A matrix ``[K, N, ...]`` of each of L layers, whose columns have one axis or several. K is all that a product contracts, in one axis.

    Attributes:
      numbers: ``[L, K, N, ...]``, the ``values`` of a ``Quantised``; or, where ``packed``, the ``words`` of a ``Packed``:
        ``[L, K / STEP, tiles * rows, 128]``, or ``[L, K / STEP, N, tiles * rows, 128]``, the tiles those of what follows N.
      scales: ``[L, G, N, ...]``, as of both.
      form: as of both.
      packed: which of the two it is.
    """

    numbers: jax.Array
    scales: jax.Array
    form: Form
    packed: bool

    @property
    def columns(self) -> tuple[int, ...]:
        """The axes of a matrix behind K."""
        return self.scales.shape[2:]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(L, K, N, ...)``."""
        return (*self.numbers.shape[:1], self.numbers.shape[1] * (STEP if self.packed else 1), *self.columns)

    @property
    def nbytes(self) -> int:
        """What the device holds, two int4 in a byte."""
        bits = 32 if self.packed else 4 if self.numbers.dtype == jnp.int4 else 8
        return self.numbers.size * bits // 8 + self.scales.size * 2

    def flat(self) -> Quantised | Packed:
        """The same with all columns in one axis: ``[L, K, N]``."""
        scales = self.scales.reshape(*self.scales.shape[:2], math.prod(self.columns))
        if self.packed:
            return Packed(self.numbers.reshape(*self.numbers.shape[:2], math.prod(self.numbers.shape[2:-1]), 128), scales, self.form)
        return Quantised(self.numbers.reshape(*self.numbers.shape[:2], math.prod(self.columns)), scales, self.form)

    def axes(self, rows: str | None, columns: tuple[str | None, ...]) -> Matrices:
        """What each axis of the arrays is called, where those of a matrix are called ``rows`` and ``columns``: tuples in their place."""
        behind = columns[: self.numbers.ndim - 3] if self.packed else columns
        grouped = rows if self.scales.shape[1] > 1 else None
        numbers: Any = ("layer", rows, *behind)
        scales: Any = ("layer", grouped, *columns)
        return dataclasses.replace(self, numbers=numbers, scales=scales)


def matrices(stack: Quantised | Packed, columns: tuple[int, ...]) -> Matrices:
    """``stack [L, K, N]`` with columns of these axes.

    Where it is packed, what follows the first of several must consist of whole tiles.
    """
    lead = stack.scales.shape[:2]
    scales = stack.scales.reshape(*lead, *columns)
    if isinstance(stack, Quantised):
        return Matrices(stack.values.reshape(*stack.values.shape[:2], *columns), scales, stack.form, packed=False)
    words = stack.words
    if len(columns) > 1:
        words = words.reshape(*words.shape[:2], columns[0], words.shape[2] // columns[0], 128)
    return Matrices(words, scales, stack.form, packed=True)


def is_quantised(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is one of the quantised forms."""
    return isinstance(leaf, (Quantised, Packed, Matrices))
