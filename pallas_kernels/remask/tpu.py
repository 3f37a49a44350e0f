"""The decision on TPU: one small kernel behind the prediction.

Not a last stage of the prediction's kernel: where devices share the vocabulary, a prediction is complete only after they exchanged
their parts; and a block lies along the lanes here, where its tokens can be ranked, but along the sublanes there.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.remask import decision
from pallas_kernels.remask.decision import Decision


_BLOCKS = 256  # blocks of a tile


def decide(*arrays: jax.Array, at_most: int, interpret: Any = False) -> Decision:
    """See ``remask.decide``; arrays as in ``decision.settle``: eight ``[S, K, B]``, then four that broadcast against ``[S, K, 1]``."""
    slots, window, block = shape = arrays[0].shape
    total = slots * window

    def flat(a: jax.Array) -> jax.Array:
        wide = shape[:2] + a.shape[2:]
        return jnp.broadcast_to(a, wide).reshape(total, -1).astype(jnp.int32 if a.dtype == bool else a.dtype)

    height = min(_BLOCKS, total)

    def per_block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((height, width), lambda i: (i, 0))

    kinds = [((total, block), jnp.int32), ((total, block), jnp.int32), ((total, block), jnp.float32)] + [((total, 1), jnp.int32)] * 3
    tokens, masked, confidence, *counts = pl.pallas_call(
        functools.partial(_kernel, at_most=at_most),
        grid=(pl.cdiv(total, height),),
        in_specs=[per_block(block)] * 8 + [per_block(1)] * 4,
        out_specs=[per_block(s[1]) for s, _ in kinds],
        out_shape=[jax.ShapeDtypeStruct(s, kind) for s, kind in kinds],
        name="remask_decide",
        interpret=interpret,
    )(*(flat(a) for a in arrays))
    accepted, revised, remasked = (c.reshape(slots, window).sum(1) for c in counts)
    return Decision(tokens.reshape(shape), masked.reshape(shape) != 0, confidence.reshape(shape), accepted, revised, remasked)


def _kernel(*refs: Any, at_most: int) -> None:
    ins, outs = refs[:12], refs[12:]
    values = [ref[...] for ref in ins]
    for bool_ in (1, 3):
        values[bool_] = values[bool_] != 0
    tokens, masked, _, editable = values[:4]
    new, masks, confidence = decision.settle(*values, at_most=at_most, rank=_rank)
    outs[0][...], outs[1][...], outs[2][...] = new, masks.astype(jnp.int32), confidence
    for ref, event in zip(outs[3:], decision.events(tokens, masked, editable, new, masks), strict=True):
        ref[...] = jnp.sum(event.astype(jnp.int32), 1, keepdims=True)


def _rank(confidence: jax.Array) -> jax.Array:
    """``decision.confidence_rank`` of ``[N, B]`` without a third dimension, which the vector unit would have to lay out anew."""
    at = lax.broadcasted_iota(jnp.int32, confidence.shape, 1)
    rank = jnp.zeros(confidence.shape, jnp.int32)
    for j in range(confidence.shape[1]):
        other = confidence[:, j : j + 1]
        rank += ((other > confidence) | ((other == confidence) & (at > j))).astype(jnp.int32)
    return rank
