"""Linear: activations times one matrix of a stack of layers, and the gated MLP that is made of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.typing import ArrayLike

from pallas_kernels.linear import cpu, reference
from pallas_kernels.linear.stacks import Stack, arranged, stored
from pallas_kernels.parts import summed
from pallas_kernels.target import Target, is_hopper, pick


__all__ = ["Backend", "Stack", "arranged", "choose_backend", "linear", "mlp", "stored"]

Backend = Literal["sliced", "cpu", "gpu"]


def _hopper(function: str, *args: Any) -> jax.Array:
    from pallas_kernels.linear import gpu  # Mosaic GPU is imported where it is used

    return getattr(gpu, function)(*args)


def _in_one_part(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda *args: function(*args)[None]


_Backends = dict[str, Callable[..., jax.Array]]
_LINEAR: _Backends = {
    "sliced": _in_one_part(reference.linear),
    "cpu": _in_one_part(cpu.linear),
    "gpu": functools.partial(_hopper, "linear"),
}
_MLP: _Backends = {"sliced": _in_one_part(reference.mlp), "cpu": _in_one_part(cpu.mlp), "gpu": functools.partial(_hopper, "mlp")}
assert tuple(_LINEAR) == tuple(_MLP) == get_args(Backend)


def choose_backend(target: Target) -> Backend:
    """The backend used on ``target`` unless told otherwise."""
    return "cpu" if target.platform == "cpu" else "gpu" if is_hopper(target) else "sliced"


def linear(x: jax.Array, stack: Stack, layer: ArrayLike, *, parts: bool = False, backend: str | None = None) -> jax.Array:
    """``x`` times matrix ``layer`` of ``stack``: the last axes of x contracted with the first of the matrix.

    Args:
      x: ``[R, T, ...]``.
      stack: ``[L, ..., ...]``: behind L the axes of x behind T, and then those of the result. Or quantised, as :func:`stored` makes it.
      layer: int32 scalar, may be traced.
      parts: give ``[P, R, T, ...]``, the product as P parts that are still to be added up, as ``pallas_kernels.parts.summed`` does.
      backend: ``"sliced"`` slices the matrix out, which a loop over layers on a GPU pays for with a copy; ``"cpu"`` does so too, but
        makes of quantised ones some rows at a time plain; ``"gpu"`` reads few rows' matrices where they lie (Hopper; in bfloat16, or
        quantised and made of whole tiles). None chooses by the current mesh's devices, else the default one.

    Returns:
      ``[R, T, ...]`` in the dtype of ``x``.

    Raises:
      ValueError: for an unknown backend.
    """
    product = pick("linear", backend, choose_backend, _LINEAR)(x, stack, layer)
    return product if parts else summed(product)


def mlp(x: jax.Array, gate_up: Stack, down: Stack, layer: ArrayLike, *, parts: bool = False, backend: str | None = None) -> jax.Array:
    """``(silu(x Wg) * (x Wu)) Wd`` with the matrices of one layer of a stack.

    Args:
      x: ``[R, T, D]``.
      gate_up: ``[L, D, 2, F]``, Wg and Wu side by side; quantised or not, as is
      down: ``[L, F, D]``.
      layer, parts, backend: as for :func:`linear`. ``"gpu"`` gates before the first product leaves the registers.

    Returns:
      ``[R, T, D]`` in the dtype of ``x``.

    Raises:
      ValueError: for an unknown backend.
    """
    product = pick("linear", backend, choose_backend, _MLP)(x, gate_up, down, layer)
    return product if parts else summed(product)
