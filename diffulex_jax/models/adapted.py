"""Matrices with low-rank products beside them: each row of a batch adds the product of its own adapter, or none (S-LoRA, arXiv 2311.03285).

Letters in shapes: R rows, T tokens, L layers, N adapters, r their rank: the largest of all, times the matrices that share a leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


ADAPTERS = "adapters"  # where a parameter tree holds Factors, at the paths of the leaves that they adapt


class Factors(NamedTuple):
    """The low-rank matrices of all adapters of a leaf ``[L, ..., ...]``; zeros where an adapter is narrower, or leaves a layer as it is.

    Attributes:
      a: ``[L, (axes that a product contracts), N, r]``.
      b: ``[L, N, r, (axes of the result)]``, already scaled.
    """

    a: Any
    b: Any


class Adapted(NamedTuple):
    """A leaf that ``ops.Ops.linear`` and ``ops.Ops.mlp`` take in the place of the plain one.

    Attributes:
      matrix: the leaf itself.
      factors: see :class:`Factors`.
      rows: ``[R]`` int32, or ``[1]`` for all, the adapter of each row of the batch, counted from 1; 0: none.
    """

    matrix: Any
    factors: Factors
    rows: jax.Array


Tree = dict[str, Any]


def for_rows(params: Tree, rows: jax.Array | None) -> Tree:
    """What a network takes where row i of its batch has adapter ``rows[i]`` (``[R]`` int32; 0, or None for all: none).

    A tree without adapters comes back as it is.
    """
    if ADAPTERS not in params:
        return params
    plain = without(params)
    if rows is None:
        return plain

    def merged(node: Tree, factors: Tree) -> Tree:
        own = {
            name: merged(node[name], below) if isinstance(below, dict) else Adapted(node[name], below, rows)
            for name, below in factors.items()
        }
        return node | own

    return merged(plain, params[ADAPTERS])


def without(params: Tree) -> Tree:
    """The parameters alone; a tree without adapters comes back as it is."""
    return {name: node for name, node in params.items() if name != ADAPTERS} if ADAPTERS in params else params


def product(x: jax.Array, adapted: Adapted, layer: ArrayLike) -> jax.Array:
    """What the rows' adapters add to ``x [R, T, ...]`` times the matrix, in the dtype of ``x``.

    All adapters' A are multiplied at once, and what is not the row's own is dropped before B: with few adapters that reads less than a pair
    of matrices for each row. What a row gets does not depend on what others have, to the bit: theirs adds zeros.
    """
    with jax.named_scope("adapters"):
        a, b = (stack[layer] for stack in adapted.factors)
        within = jnp.tensordot(x, a, x.ndim - 2)
        own = adapted.rows[:, None] == jnp.arange(1, a.shape[-2] + 1)
        return jnp.tensordot(jnp.where(own[:, None, :, None], within, 0), b, 2)


def with_axes(function: Callable[[Factors, Factors], Any], schema: Tree, factors: Tree) -> Tree:
    """The tree of ``function(factors, axes)`` of each leaf that is adapted; ``axes`` are the logical ones of both arrays.

    Args:
      function: gives what stands for a leaf's factors.
      schema: of the model, by which the axes of a leaf are known.
      factors: the tree at ``ADAPTERS``.
    """

    def one(param: Any, own: Factors) -> Any:
        layer, *rest = param.axes
        contracted = own.a.ndim - 3
        return function(own, Factors((layer, *rest[:contracted], None, None), (layer, None, None, *rest[contracted:])))

    return {
        name: with_axes(function, schema[name], below) if isinstance(below, dict) else one(schema[name], below)
        for name, below in factors.items()
    }
