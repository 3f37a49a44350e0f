"""Quantised matrices: small numbers and the scales that they are multiplied by, one for each column or for each group of a column.

Weights alone are quantised, symmetrically, with no calibration; activations never are. A matrix ``[..., K, N]`` is one that a product
contracts over K. Kinds of ``Form``:

* ``"int8"``: integers up to 127, one scale a column. The scale can be applied to a finished sum, and so costs nothing.
* ``"int4"``: integers up to 7, one scale for :data:`GROUP` rows of a column. With one a column a sixth of what was there is lost; with
  groups a ninth.
* ``"fp8"``: float8_e4m3fn up to 448, one scale a column. A weight loses a sixteenth of itself at most, where int8 loses a part of the
  column's largest: int8 is the nearer of the two unless a column's weights differ by far. For devices and checkpoints that have it.

Scales are bfloat16: a number times its scale is exact in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike


__all__ = ["FORMS", "GROUP", "Form", "Quantised", "dequantise", "dtype_of", "in_int8", "of_bits", "quantise"]

Form = Literal["int8", "int4", "fp8"]
FORMS: tuple[Form, ...] = get_args(Form)

GROUP = 64
"""Most rows of a column that share a scale of ``"int4"``; fewer, half as often as it takes, where the rows do not divide."""

_MOST = {"int8": 127, "int4": 7, "fp8": 448}
_DTYPES = {"int8": jnp.int8, "int4": jnp.int4, "fp8": jnp.float8_e4m3fn}


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=("form",))
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Matrices ``[..., K, N]`` in a quantised form: two arrays of one tree.

    Attributes:
      values: ``[..., K, N]`` of :func:`dtype_of` the form; in int8, int4 as such and fp8 as its bits, where a device reads those.
      scales: ``[..., G, N]`` bfloat16; rows ``[g K / G, (g + 1) K / G)`` of a column have scale g of it.
      form: what they were made by.
    """

    values: jax.Array
    scales: jax.Array
    form: Form

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices that it stands for."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """What the device holds, two int4 in a byte."""
        return self.values.size * (4 if self.values.dtype == jnp.int4 else 8) // 8 + self.scales.size * 2

    def __getitem__(self, at: ArrayLike) -> Quantised:
        """Entry ``at`` of the first axis, which is not K."""
        return Quantised(self.values[at], self.scales[at], self.form)


def dtype_of(form: Form) -> jnp.dtype:
    """Of the values of a form, where a device holds int4 two in a byte."""
    return jnp.dtype(_DTYPES[form])


def in_int8(q: Quantised) -> Quantised:
    """``q`` with values in int8: those of fp8 are its bits."""
    if q.values.dtype == dtype_of("fp8"):
        return Quantised(lax.bitcast_convert_type(q.values, jnp.int8), q.scales, q.form)
    return Quantised(q.values.astype(jnp.int8), q.scales, q.form)


def of_bits(q: Quantised) -> Quantised:
    """``q`` with values of fp8 in float8: those held as its bits in int8 become it."""
    if q.form != "fp8" or q.values.dtype != jnp.int8:
        return q
    return Quantised(lax.bitcast_convert_type(q.values, dtype_of("fp8")), q.scales, q.form)


def quantise(w: jax.Array, form: Form, *, dtype: jax.typing.DTypeLike | None = None) -> Quantised:
    """The nearest values of ``w [..., K, N]`` in units of scales that the largest weight of a column, or of a group, decides.

    ``|w - dequantise(quantise(w, form))|`` is at most half a scale for integers. Values are of ``dtype``; default: as the form says. What
    is not finite makes its whole group so.

    Raises:
      ValueError: for an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"unknown quantised form {form!r}; choose one of {', '.join(FORMS)}")
    *others, depth, width = w.shape
    group = math.gcd(depth, GROUP) if form == "int4" else depth
    parts = w.astype(jnp.float32).reshape(*others, depth // group, group, width)
    largest = jnp.abs(parts).max(-2) * (1 / _MOST[form])
    # Not a conversion to bfloat16 and back, which XLA is free to leave out where it compiles both at once (and does).
    scales = lax.reduce_precision(largest, exponent_bits=8, mantissa_bits=7)
    scales = jnp.where(scales == 0, 1, scales)
    values = parts / scales[..., None, :]
    if form != "fp8":  # whose conversion rounds; beyond its largest it would give what is not a number
        values = jnp.round(values)
    values = jnp.clip(values, -_MOST[form], _MOST[form])
    return Quantised(values.astype(dtype or dtype_of(form)).reshape(w.shape), scales.astype(jnp.bfloat16), form)


def dequantise(q: Quantised, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The matrices ``[..., K, N]`` that ``q`` stands for; exact in float32, else the nearest that there are."""
    *others, depth, width = q.shape
    wide = jnp.promote_types(dtype, jnp.bfloat16)  # which holds all values and scales
    parts = of_bits(q).values.astype(wide).reshape(*others, q.scales.shape[-2], -1, width)
    return (parts * q.scales.astype(wide)[..., None, :]).astype(dtype).reshape(*others, depth, width)
