"""A network as a pure function of arrays, without caches, pages or requests: for losses, scores, and experiments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from diffulex_jax.models.base import Model, Params, logits
from diffulex_jax.models.ops import At, machine_ops
from pallas_kernels import REFERENCE, Kernels
from pallas_kernels.block_attention import masked_attention, split_heads


def pure(model: Model, *, kernels: Kernels = REFERENCE) -> Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]:
    """``f(params, tokens, positions, mask) -> logits`` of a network.

    ``f`` takes ``tokens [R, T]`` and ``positions [R, T]`` (int32) and ``mask``, ``[T, T]`` or ``[R, T, T]`` bool: what each query sees.
    It gives ``[R, T, V]`` float32; row i speaks of the token at i, or at i + 1 where ``model.spec.predicts`` is ``"next"``. Nothing is
    hidden in it: it can be jitted, mapped and, with the reference kernels, differentiated. ``model.spec.attention.mask`` makes the mask a
    model was trained with.

    Args:
      model: the network.
      kernels: what it computes with.
    """

    def f(params: Params, tokens: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        return logits(model, params, hidden_states(model, params, tokens, positions, mask, kernels=kernels))

    return f


def hidden_states(
    model: Model,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    *,
    kernels: Kernels = REFERENCE,
    valid: jax.Array | None = None,
) -> jax.Array:
    """What ``models.base.logits`` takes: ``[R, T, D]`` after the final norm. See :func:`pure`; ``valid`` as in ``ops.machine_ops``."""

    def attend(at: At, heads: jax.Array) -> tuple[jax.Array, Any]:
        del at
        return masked_attention(*split_heads(heads), mask), ()

    ops = machine_ops(kernels, attend, valid=valid)
    return model.layers(params, params["embed"][tokens], positions, ops)[0]
