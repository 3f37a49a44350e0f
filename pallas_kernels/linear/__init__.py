"""Linear: activations times one matrix of a stack of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.typing import ArrayLike

from pallas_kernels.linear import reference
from pallas_kernels.target import Target, is_hopper, pick


__all__ = ["Backend", "choose_backend", "linear"]

Backend = Literal["sliced", "gpu"]


def _hopper(*args: Any) -> jax.Array:
    from pallas_kernels.linear import gpu  # Mosaic GPU is imported where it is used

    return gpu.linear(*args)


_BACKENDS: dict[str, Callable[..., jax.Array]] = {"sliced": reference.linear, "gpu": _hopper}
assert tuple(_BACKENDS) == get_args(Backend)


def choose_backend(target: Target) -> Backend:
    """The backend used on ``target`` unless told otherwise."""
    return "gpu" if is_hopper(target) else "sliced"


def linear(x: jax.Array, stack: jax.Array, layer: ArrayLike, *, backend: str | None = None) -> jax.Array:
    """``x`` times matrix ``layer`` of ``stack``: the last axes of x contracted with the first of the matrix.

    Args:
      x: ``[R, T, ...]``.
      stack: ``[L, ..., ...]``: behind L the axes of x behind T, and then those of the result.
      layer: int32 scalar, may be traced.
      backend: ``"sliced"`` slices the matrix out, which a loop over layers on a GPU pays for with a copy; ``"gpu"`` reads few rows'
        matrices where they lie (Hopper, bfloat16). None chooses by the current mesh's devices, else the default one.

    Returns:
      ``[R, T, ...]`` in the dtype of ``x``.

    Raises:
      ValueError: for an unknown backend.
    """
    return pick("linear", backend, choose_backend, _BACKENDS)(x, stack, layer)
