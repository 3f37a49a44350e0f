"""Grouped matmul: the SwiGLU experts of a mixture-of-experts layer, each token through its own few experts.

``expert_mlp`` computes ``y[t] = sum_k weights[t, k] * (silu(x[t] Wg) * (x[t] Wu)) Wd`` over the ``k`` experts that
token ``t`` chose. Nothing is ever dropped: any routing is computed exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.cpu import streamed
from pallas_kernels.grouped_matmul.reference import add_shared, dense
from pallas_kernels.grouped_matmul.stacks import Stack, arranged, is_quantised, plain, stored
from pallas_kernels.grouped_matmul.xla import ragged
from pallas_kernels.target import Target, is_hopper, pick


__all__ = ["Backend", "Stack", "arranged", "choose_backend", "dense", "expert_mlp", "is_quantised", "plain", "stored"]

Backend = Literal["dense", "ragged", "cpu", "gpu", "tpu"]


def _hopper(*args: Any, **kwargs: Any) -> jax.Array:
    from pallas_kernels.grouped_matmul.gpu import hopper  # Mosaic GPU is imported where it is used

    return hopper(*args, **kwargs)


def _tiled(*args: Any, **kwargs: Any) -> jax.Array:
    from pallas_kernels.grouped_matmul.tpu import tiled  # Pallas for TPUs likewise

    return tiled(*args, **kwargs)


_BACKENDS: dict[str, Callable[..., jax.Array]] = {"dense": dense, "ragged": ragged, "cpu": streamed, "gpu": _hopper, "tpu": _tiled}
assert tuple(_BACKENDS) == get_args(Backend)


def choose_backend(target: Target) -> Backend:
    """The backend used on ``target`` unless told otherwise."""
    if target.platform == "cpu":
        return "cpu"
    return "gpu" if is_hopper(target) else "tpu" if target.kind == "TPU7x" else "ragged"


def expert_mlp(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: Stack,
    down: Stack,
    *,
    layer: ArrayLike | None = None,
    valid: jax.Array | None = None,
    first_expert: ArrayLike | None = None,
    shared: tuple[jax.Array, jax.Array] | None = None,
    backend: str | None = None,
) -> jax.Array:
    """The experts of one layer: the routed ones, and with ``shared`` the one that every token goes through.

    A token's output depends on its own row alone; with backend ``"cpu"`` to the last bit, whatever the batch holds.
    Sums over the contracted axes are in float32; the activated hidden values are rounded to ``x.dtype``.

    Args:
      x: ``[T, D]`` activations.
      expert_ids: ``[T, k]`` int32 in ``[0, E)``: the experts of each token, in any order.
      weights: ``[T, k]`` float32: how much of each goes into the sum.
      gate_up: ``[E, D, 2F]``, gate columns first, then up; ``[L, E, D, 2F]`` with ``layer``. An array, or what :func:`stored` makes of it.
      down: likewise ``[E, F, D]``; ``[L, E, F, D]`` with ``layer``.
      layer: int32 scalar, may be traced: use this layer of stacked weights. Inside a ``lax.scan`` over layers pass the
        whole stack and the layer number instead of scanning over the weights: a scanned slice is copied on the CPU
        backend, which reads the stack in place.
      valid: ``[T]`` bool; False rows route nowhere, give zeros, and their ``x``, ids and weights mean nothing.
      first_expert: int32 scalar: the matrices hold only the experts from this id on, and the result is their share of the sum. Devices
        that share the experts add theirs up. By ``"gpu"`` or ``"tpu"``, else ``"ragged"``.
      shared: ``(gate_up [D, 2, S], down [S, D])`` of an expert that is added, unweighted, for every token; with ``layer`` both
        have a leading L.
      backend: ``"dense"`` (every expert for every token), ``"ragged"`` (``lax.ragged_dot``; these two can be differentiated), ``"cpu"``,
        ``"gpu"`` (Hopper) or ``"tpu"`` (TPU7x); None chooses by the current mesh's devices, else the default one.

    Returns:
      ``[T, D]`` in ``x.dtype``.

    Raises:
      ValueError: for an unknown backend, or shapes that do not fit together.
    """
    compute = pick("grouped_matmul", backend, choose_backend, _BACKENDS)
    _check_shapes(x, expert_ids, weights, (gate_up, down), layer=layer, valid=valid)
    with jax.named_scope("expert_mlp"):
        if compute is _hopper:
            hints = {"first_expert": first_expert, "shared": shared}
            return compute(x, expert_ids, weights, gate_up, down, layer=layer, valid=valid, **hints)
        if first_expert is not None:
            shares = compute if compute is _tiled else ragged
            routed = shares(x, expert_ids, weights, gate_up, down, layer=layer, valid=valid, first_expert=first_expert)
        else:
            routed = compute(x, expert_ids, weights, gate_up, down, layer=layer, valid=valid)
        return add_shared(routed, x, shared, layer=layer, valid=valid)


def _check_shapes(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    stacks: tuple[Stack, Stack],
    *,
    layer: ArrayLike | None,
    valid: jax.Array | None,
) -> None:
    gate_up, down = stacks
    stacked = () if layer is None else gate_up.shape[:1]
    tokens, embed = x.shape
    experts, width = down.shape[-3], down.shape[-2]
    wanted = {
        "gate_up": (gate_up, (*stacked, experts, embed, 2 * width)),
        "down": (down, (*stacked, experts, width, embed)),
        "expert_ids": (expert_ids, (tokens, expert_ids.shape[-1])),
        "weights": (weights, expert_ids.shape),
    }
    if valid is not None:
        wanted["valid"] = (valid, (tokens,))
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(f"expert_mlp: {name} has shape {array.shape}, expected {shape}")
