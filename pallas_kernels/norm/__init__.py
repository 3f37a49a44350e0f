"""Norm: what is to be added to the residual stream is, and its root mean square becomes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from pallas_kernels.norm import reference
from pallas_kernels.norm.reference import Scales, rms_norm
from pallas_kernels.target import Target, is_hopper, pick


__all__ = ["Backend", "Scales", "add_and_norm", "choose_backend", "rms_norm"]

Backend = Literal["reference", "gpu"]


def _hopper(*args: Any) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.norm import gpu  # Mosaic GPU is imported where it is used

    return gpu.add_and_norm(*args)


_BACKENDS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {"reference": reference.add_and_norm, "gpu": _hopper}
assert tuple(_BACKENDS) == get_args(Backend)


def choose_backend(target: Target) -> Backend:
    """The backend used on ``target`` unless told otherwise."""
    return "gpu" if is_hopper(target) else "reference"


def add_and_norm(x: jax.Array, parts: jax.Array | None, scales: Scales, *, backend: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Adds ``parts`` to ``x``, and norms the sum (RMSNorm, arXiv 1910.07467), in float32.

    Args:
      x: ``[R, T, D]``.
      parts: ``[P, R, T, D]``, what is to be added, itself a sum of P parts; None for nothing.
      scales: which of a stack of scales the normed rows are multiplied with.
      backend: ``"reference"``, or ``"gpu"``, one kernel on Hopper (bfloat16, whole steps of 256 columns; else it is the reference). None
        chooses by the current mesh's devices, else the default one.

    Returns:
      ``x`` with what was added, and that normed, both ``[R, T, D]`` in the dtype of ``x``.

    Raises:
      ValueError: for an unknown backend.
    """
    return pick("norm", backend, choose_backend, _BACKENDS)(x, parts, scales)
