"""Rotary positions: queries and keys of packed heads, with the bias or the norms per head that a network has, and rotated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.rotary import reference
from pallas_kernels.rotary.reference import HeadNorms
from pallas_kernels.target import Target, is_hopper, pick


__all__ = ["Backend", "HeadNorms", "choose_backend", "rotate", "table"]

Backend = Literal["reference", "gpu"]


def _hopper(*args: Any) -> jax.Array:
    from pallas_kernels.rotary import gpu  # Mosaic GPU is imported where it is used

    return gpu.rotate(*args)


_BACKENDS: dict[str, Callable[..., jax.Array]] = {"reference": reference.rotate, "gpu": _hopper}
assert tuple(_BACKENDS) == get_args(Backend)


def choose_backend(target: Target) -> Backend:
    """The backend used on ``target`` unless told otherwise."""
    return "gpu" if is_hopper(target) else "reference"


def rotate(
    heads: jax.Array,
    table: tuple[jax.Array, jax.Array],
    norms: HeadNorms | None = None,
    bias: jax.Array | None = None,
    *,
    backend: str | None = None,
) -> jax.Array:
    """Rotates queries and keys (RoPE, arXiv 2104.09864, halves against each other), after their norms; values stay as they come.

    Args:
      heads: ``[P, R, T, KV, G + 2, H]``, a sum of P parts: for each key/value head its G query heads, its key, its value.
      table: what :func:`table` makes of the positions.
      norms: root-mean-square norms per head; None for a network without them.
      bias: ``[KV, G + 2, H]``, added before all else; None for a network without one.
      backend: ``"reference"``, or ``"gpu"``, one kernel on Hopper (bfloat16, with norms and no bias; else it is the reference). None
        chooses by the current mesh's devices, else the default one.

    Returns:
      ``[R, T, KV, G + 2, H]``.

    Raises:
      ValueError: for an unknown backend.
    """
    return pick("rotary", backend, choose_backend, _BACKENDS)(heads, table, norms, bias)


def table(positions: jax.Array, dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines ``[R, T, dim]`` (float32) of the first ``dim`` dimensions at ``positions [R, T]``; both halves are the same."""
    exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    angle = positions[..., None].astype(jnp.float32) / theta**exponent
    return jnp.concatenate([jnp.cos(angle)] * 2, -1), jnp.concatenate([jnp.sin(angle)] * 2, -1)
