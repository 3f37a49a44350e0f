"""Small arrays from the host as one: each transfer to a device costs as much as kilobytes do."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax import lax


class Words:
    """How trees of one structure go into one array of int32: leaves of 32 bits as they are, bool as 0 and 1."""

    def __init__(self, example: Any):
        leaves, self._structure = jax.tree.flatten(example)
        self._leaves = [(np.shape(leaf), np.asarray(leaf).dtype) for leaf in leaves]

    def pack(self, tree: Any) -> np.ndarray:
        """``[n]`` int32."""
        return np.concatenate([_as_words(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)])

    def unpack(self, words: jax.Array) -> Any:
        """What :meth:`pack` packed."""
        leaves, at = [], 0
        for shape, dtype in self._leaves:
            part = words[at : at + math.prod(shape)].reshape(shape)
            leaves.append(part != 0 if dtype.kind == "b" else lax.bitcast_convert_type(part, dtype))
            at += math.prod(shape)
        return jax.tree.unflatten(self._structure, leaves)


def _as_words(leaf: np.ndarray) -> np.ndarray:
    return leaf.reshape(-1).astype(np.int32) if leaf.dtype.kind == "b" else leaf.reshape(-1).view(np.int32)
