"""The network by itself, in plain jnp: what kernels, caches and windows are held to."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from diffulex_jax.models.attention import AttentionPolicy, positions_of
from diffulex_jax.models.base import logits
from diffulex_jax.models.ops import Ops, machine_ops
from pallas_kernels import REFERENCE, prediction
from pallas_kernels.block_attention import split_heads


_CHOICES = ("forbidden_id", "top_k", "tempered", "cut", "entropy", "counts_all", "narrowed", "margin")
predict = functools.partial(jax.jit, static_argnames=_CHOICES)(prediction.predict)
"""What a forward says, as one program."""


def sees(length: int, block: int, policy: AttentionPolicy | None = None):
    """``[T, T]`` bool: attention over one sequence, block-causal unless ``policy`` says otherwise."""
    where = positions_of(jnp.arange(length) // block)
    return (policy or AttentionPolicy()).mask(where, where)


def attend_to(mask, prefix=None):
    """Dense attention over ``prefix`` (keys and values of each layer) and what ``mask`` ``[T, T]`` shows; keeps keys and values."""

    def attend(at, heads):
        q, *own = split_heads(heads)
        (k, v), seen = own, mask
        if prefix is not None:
            k, v = (jnp.concatenate([p[at.layer], a], 1) for p, a in zip(prefix, own, strict=True))
            seen = jnp.concatenate([jnp.ones((len(mask), k.shape[1] - len(mask)), bool), mask], 1)
        score = jnp.where(seen, jnp.einsum("rtkgh,rskh->rkgts", q, k) / q.shape[-1] ** 0.5, -jnp.inf)
        return jnp.einsum("rkgts,rskh->rtkgh", jax.nn.softmax(score, -1), v), tuple(own)

    return attend


def plain_ops(attend) -> Ops:
    """The operations of a layer in plain XLA."""
    return machine_ops(REFERENCE._replace(grouped_matmul="dense"), attend)


def logits_of(model, params, ids, attend, *, first: int = 0):
    """Logits ``[T, V]`` of ``ids`` at positions from ``first`` on, and what ``attend`` kept."""
    positions = first + jnp.arange(len(ids))[None]
    hidden, kept = model.layers(params, params["embed"][jnp.asarray(ids)[None]], positions, plain_ops(attend))
    return logits(model, params, hidden)[0], kept


def probabilities(model, params, ids, attend, *, first: int = 0):
    """Probabilities ``[T, V]`` without the mask id, and what ``attend`` kept."""
    found, kept = logits_of(model, params, ids, attend, first=first)
    return jax.nn.softmax(found.at[:, model.spec.mask_id].set(-jnp.inf), -1), kept
