"""A network as a flax ``nnx`` module, and parameters to and from ``nnx`` states: both lie as the model's schema says."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from diffulex_jax.models.base import Model, Params
from diffulex_jax.models.functional import pure
from pallas_kernels import REFERENCE, Kernels


class Network(nnx.Module):
    """``network(tokens, positions, mask) -> logits``: see ``functional.pure``. Its parameters are ``nnx.Param`` in ``network.params``."""

    def __init__(self, model: Model, params: Params, *, kernels: Kernels = REFERENCE):
        self.model, self.kernels = nnx.static(model), nnx.static(kernels)
        self.params = to_nnx(params)

    def __call__(self, tokens: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        return pure(self.model, kernels=self.kernels)(from_nnx(self.params), tokens, positions, mask)


def to_nnx(params: Params) -> nnx.Dict:
    """Parameters as an ``nnx.Dict`` of ``nnx.Param``, which a module may hold."""
    wrapped = {name: to_nnx(node) if isinstance(node, dict) else nnx.Param(node) for name, node in params.items()}
    return nnx.Dict(wrapped)


def from_nnx(state: Any) -> Params:
    """Parameters as the plain tree that an engine takes, of a :class:`Network`, an ``nnx.State`` of one, or of what :func:`to_nnx` gave.

    What is not a parameter is left out. Plain trees come back as they are.
    """
    if isinstance(state, dict):
        return state
    tree = nnx.to_pure_dict(nnx.state(state, nnx.Param) if isinstance(state, (nnx.Module, nnx.Dict)) else state)
    return tree["params"] if set(tree) == {"params"} else tree
