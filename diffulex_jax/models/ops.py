"""How one machine computes the parts of a layer. A network sees no backend and no mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffulex_jax.models.adapted import Adapted, product
from diffulex_jax.parallel.mesh import add_up, first_index, shared_by
from pallas_kernels import Kernels, expert_choice, grouped_matmul, norm, rotary
from pallas_kernels import linear as linear_kernels
from pallas_kernels.expert_choice import Router
from pallas_kernels.norm import Scales
from pallas_kernels.parts import summed


class At(NamedTuple):
    """Where in the network a layer is.

    Attributes:
      layer: int32 scalar, its number among all layers.
      pool: what the layer before it made of ``Ops.pool``; None where there is none.
    """

    layer: jax.Array
    pool: Any = None


Attend = Callable[[At, jax.Array], tuple[jax.Array, Any]]
"""``attend(at, heads [R, T, KV, G + 2, H]) -> (out [R, T, KV, G, H], kept)``. ``heads`` are the queries, the key and the value of
each key/value head; ``kept`` is what the caller wants of the layer, or, where there is an ``Ops.pool``, the pool for the next layer."""


class Stream(NamedTuple):
    """The residual stream where something is still to be added to it: whoever norms it does so on the way.

    Attributes:
      x: ``[R, T, D]``.
      parts: ``[P, R, T, D]``.
    """

    x: jax.Array
    parts: jax.Array


class Ops(NamedTuple):
    """The operations of a layer. A stack of ``linear`` and ``mlp``, and of the shared expert, may be an ``adapted.Adapted``.

    Products are ``[P, R, T, ...]``: P parts to be added up, which ``rotate`` and ``add`` take as they are, and of which
    ``pallas_kernels.parts.summed`` makes an array.

    Attributes:
      norm: ``norm(x, stack [L, D], layer, eps) -> (x [R, T, D], normed [R, T, D])``: what was put off is added to ``x``, an array or a
        :class:`Stream`, and the root mean square of that is made 1 and multiplied with scales ``layer`` of ``stack``.
      linear: ``linear(x [R, T, ...], stack [L, ..., ...], layer) -> [P, R, T, ...]``: the last axes of ``x`` contracted with the first of
        matrix ``layer``. The stack may be quantised, as ``weights.quantise`` keeps it, here and below.
      mlp: ``mlp(x [R, T, D], stacks, layer) -> [P, R, T, D]``: ``(silu(x Wg) * (x Wu)) Wd``; ``stacks`` are ``[L, D, 2, F]``, which holds
        Wg and Wu, and ``[L, F, D]``.
      experts: ``experts(x [R, T, D], stacks, layer, router) -> [P, R, T, D]``: a mixture of experts, its router and its shared expert, if
        ``stacks`` has one.
      attend: see :data:`Attend`.
      add: ``add(x, y [P, R, T, D], axis)``: ``x`` and ``y``, the latter summed over the devices that share a logical axis; a
        :class:`Stream` where nobody shares it.
      rotate: ``rotate(heads, table, norms, bias)``: see ``rotary.rotate``.
      layers_per_turn: layers in each turn of the loop over layers.
      pool: the KV pool, where layers write their keys and values into it: each is given what the one before it made of it.
    """

    linear: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    mlp: Callable[[jax.Array, tuple[jax.Array, jax.Array], jax.Array], jax.Array]
    experts: Callable[[jax.Array, dict[str, jax.Array], jax.Array, Router], jax.Array]
    attend: Attend
    add: Callable[[jax.Array | Stream, jax.Array, str], jax.Array | Stream]
    norm: Callable[..., tuple[jax.Array, jax.Array]]
    rotate: Callable[..., jax.Array] = functools.partial(rotary.rotate, backend="reference")
    layers_per_turn: int = 1
    pool: Any = None


def machine_ops(kernels: Kernels, attend: Attend, *, pending: int = 0, valid: jax.Array | None = None, pool: Any = None) -> Ops:
    """The operations by the backends of ``kernels``.

    Args:
      kernels: what the machine has.
      attend: see :data:`Attend`.
      pending: so many first tokens of every row may be there or not. Where ``kernels.rows_apart``, they go through matmuls of their
        own: a matmul's rounding may change with its shape, and what the other tokens give must not.
      valid: ``[R, T]`` bool; the experts leave False tokens out, whose output means nothing.
      pool: see :class:`Ops`.
    """

    def apart(f: Callable[..., Any], *arrays: jax.Array | None, axis: int = 1) -> Any:
        if not pending or not kernels.rows_apart:
            return f(*arrays)
        first, rest = (jax.tree.map(lambda a, at=at: a[:, at], arrays) for at in (slice(pending), slice(pending, None)))
        return jax.tree.map(lambda *both: jnp.concatenate(both, axis), f(*first), f(*rest))

    def linear(x: jax.Array, stack: Any, layer: jax.Array) -> jax.Array:
        return apart(lambda x: times(x, stack, layer, backend=kernels.linear), x, axis=2)

    def mlp(x: jax.Array, stacks: tuple[Any, Any], layer: jax.Array) -> jax.Array:
        return apart(lambda x: gated(x, stacks, layer, backend=kernels.linear), x, axis=2)

    def experts(x: jax.Array, stacks: dict[str, jax.Array], layer: jax.Array, router: Router) -> jax.Array:
        def flat(a: jax.Array) -> jax.Array:
            return a.reshape(-1, a.shape[-1])

        kept = None if valid is None else valid.reshape(-1)
        matrix, bias = stacks["router"][layer], stacks["router_bias"][layer] if "router_bias" in stacks else None
        choose = functools.partial(expert_choice.choose, router=router, backend=kernels.expert_choice)

        def choose_rows(x: jax.Array, valid: jax.Array | None) -> Any:
            ids, weights = choose(flat(x), matrix, bias, valid=None if valid is None else valid.reshape(-1))
            return ids.reshape(*x.shape[:2], -1), weights.reshape(*x.shape[:2], -1)

        if kernels.rows_apart:
            ids, weights = map(flat, apart(choose_rows, x, valid))
        else:
            ids, weights = choose(flat(x), matrix, bias, valid=kept)
        # A device that has a part of the shared expert has other widths of it than of a routed one, and it is never quantised.
        shared = (stacks["shared_gate_up"], stacks["shared_down"]) if "shared_down" in stacks else None
        alone = kernels.rows_apart or bool(shared_by("mlp")) or grouped_matmul.is_quantised(stacks["experts_down"])
        alone |= any(isinstance(stack, Adapted) for stack in shared or ())
        y = grouped_matmul.expert_mlp(
            flat(x),
            ids,
            weights,
            stacks["experts_gate_up"],
            stacks["experts_down"],
            layer=layer,
            valid=kept,
            first_expert=first_index("expert", stacks["experts_down"].shape[1]) if shared_by("expert") else None,
            shared=None if alone else shared,
            backend=kernels.grouped_matmul,
        ).reshape(x.shape)
        return (y + summed(mlp(x, shared, layer)) if shared is not None and alone else y)[None]

    rotate, normed = functools.partial(rotary.rotate, backend=kernels.rotary), functools.partial(norm_stream, backend=kernels.norm)
    return Ops(linear, mlp, experts, attend, add, normed, rotate, kernels.layers_per_turn, pool)


def add(x: jax.Array | Stream, y: jax.Array, axis: str) -> jax.Array | Stream:
    """``Ops.add``. What one device has all of is put off; a sum over devices is of an array."""
    x = settled(x)
    return x + add_up(summed(y), axis) if shared_by(axis) else Stream(x, y)


def settled(x: jax.Array | Stream) -> jax.Array:
    """The residual stream with everything added."""
    return x.x + summed(x.parts) if isinstance(x, Stream) else x


def norm_stream(
    x: jax.Array | Stream, stack: jax.Array, layer: jax.Array, eps: float, *, backend: str = "reference"
) -> tuple[jax.Array, jax.Array]:
    """``Ops.norm`` by one backend of the ``norm`` kernels."""
    x, parts = x if isinstance(x, Stream) else (x, None)
    return norm.add_and_norm(x, parts, Scales(stack, layer, eps), backend=backend)


def times(x: jax.Array, stack: Any, layer: jax.Array, *, backend: str) -> jax.Array:
    """``Ops.linear`` by one backend of the ``linear`` kernels."""
    if isinstance(stack, Adapted):
        return (summed(times(x, stack.matrix, layer, backend=backend)) + product(x, stack, layer))[None]
    return linear_kernels.linear(x, stack, layer, parts=True, backend=backend)


def gated(x: jax.Array, stacks: tuple[Any, Any], layer: jax.Array, *, backend: str) -> jax.Array:
    """``Ops.mlp`` by one backend of the ``linear`` kernels."""
    if not any(isinstance(stack, Adapted) for stack in stacks):
        return linear_kernels.mlp(x, *stacks, layer, parts=True, backend=backend)
    h = summed(times(x, stacks[0], layer, backend=backend))
    return times(jax.nn.silu(h[..., 0, :]) * h[..., 1, :], stacks[1], layer, backend=backend)
