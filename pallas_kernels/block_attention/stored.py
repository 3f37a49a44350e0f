"""Keys and values as a pool holds them: as they are, rounded to another type, or in 8 bits.

What a pool holds of a position follows from that position's own key and value, whatever is written beside it and whenever. So pages are
the same however requests are batched, cut and resumed. (A scale for a whole page would change with each block that is written to it.)
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax


__all__ = ["KV", "KV_FORMS", "Scaled", "empty", "held", "kv_dtype", "plain", "rounded", "vector_bytes"]

KV = Literal["bfloat16", "fp8", "int8"]
"""``"fp8"``: float8_e4m3fn, without a scale; what is beyond 448 is clipped to it. ``"int8"``: with a scale for each vector of a head."""
KV_FORMS: tuple[KV, ...] = get_args(KV)

_DTYPES = {"bfloat16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
_MOST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """Vectors of integers, each with a scale: two arrays of one tree, which a pool indexes alike.

    Attributes:
      values: ``[..., H]`` int8.
      scales: ``[...]`` bfloat16.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the vectors that it stands for."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """Of the integers: no dtype of activations."""
        return self.values.dtype


Stored = jax.Array | Scaled


def kv_dtype(form: KV | None, dtype: jax.typing.DTypeLike) -> Any:
    """The dtype of what a pool of ``form`` holds; of None that is ``dtype``."""
    return jnp.dtype(dtype if form is None else _DTYPES[form])


def vector_bytes(width: int, form: KV | None, dtype: jax.typing.DTypeLike) -> int:
    """What a pool of ``form`` takes for a vector of ``width`` numbers."""
    return width * kv_dtype(form, dtype).itemsize + (2 if form == "int8" else 0)


def empty(shape: tuple[int, ...], form: KV | None, dtype: jax.typing.DTypeLike) -> Stored:
    """Zeros of ``shape``, held as ``form`` says."""
    values = jnp.zeros(shape, kv_dtype(form, dtype))
    return Scaled(values, jnp.zeros(shape[:-1], jnp.bfloat16)) if form == "int8" else values


def held(fresh: jax.Array, pool: Stored) -> Stored:
    """Vectors ``fresh [..., H]`` in the form in which ``pool`` holds them. What is not finite makes its own vector so, or is clipped."""
    if isinstance(pool, Scaled):
        wide = fresh.astype(jnp.float32)
        # Not a conversion to bfloat16 and back, which XLA is free to leave out where it compiles both at once.
        scales = lax.reduce_precision(jnp.abs(wide).max(-1) * (1 / _MOST), exponent_bits=8, mantissa_bits=7)
        values = jnp.clip(jnp.round(wide / jnp.where(scales == 0, 1, scales)[..., None]), -_MOST, _MOST)
        return Scaled(values.astype(jnp.int8), scales.astype(jnp.bfloat16))
    if pool.dtype == jnp.float8_e4m3fn:
        most = float(jnp.finfo(pool.dtype).max)  # what is larger would become NaN
        fresh = jnp.clip(fresh.astype(jnp.float32), -most, most)
    return fresh.astype(pool.dtype)


def plain(stored: Stored, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The vectors that ``stored`` stands for, rounded to ``dtype``."""
    if isinstance(stored, Scaled):
        return (stored.values.astype(jnp.float32) * stored.scales.astype(jnp.float32)[..., None]).astype(dtype)
    return stored.astype(dtype)


def rounded(heads: jax.Array, pool: Stored) -> jax.Array:
    """``heads [..., KV, G + 2, H]`` with keys and values as whoever reads them from ``pool`` will see them."""
    if heads.dtype == pool.dtype:
        return heads
    seen = plain(held(heads[..., -2:, :], pool), heads.dtype)
    return jnp.concatenate([heads[..., :-2, :], seen], -2)
