"""Choosing experts by sorting, in plain jnp."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Router(NamedTuple):
    """How a network's tokens choose their experts: static.

    Attributes:
      top_k: k, experts of a token.
      score: what an expert's logit becomes. ``"sigmoid"`` looks at each expert by itself (DeepSeek-V3, arXiv 2412.19437; LLaDA2);
        ``"softmax"`` is over all experts (Qwen3-MoE, arXiv 2505.09388; SDAR-MoE).
      groups: the experts lie in so many groups of the same size, one after the other.
      kept: a token's experts come from so many groups: those with the largest sum of their two best.
      normalise: whether a token's weights are divided by their sum; to that of sigmoids 1e-20 is added, as DeepSeek-V3 does.
      scale: what weights are multiplied by.
      capacity: so many experts are admitted for all tokens of a block together, those with the largest score that any of them gives;
        each token's experts come from these (LLaDA2.2's block routing). 0 admits all experts.
      block: tokens of such a block.
    """

    top_k: int
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    groups: int = 1
    kept: int = 1
    normalise: bool = True
    scale: float = 1.0
    capacity: int = 0
    block: int = 1


class Choice(NamedTuple):
    """The experts of N tokens.

    Attributes:
      ids: ``[N, k]`` int32, best first.
      weights: ``[N, k]`` float32.
    """

    ids: jax.Array
    weights: jax.Array


def choose(x: jax.Array, matrix: jax.Array, bias: jax.Array | None, router: Router, *, valid: jax.Array | None = None) -> Choice:
    """See the package's ``choose``; differentiable."""
    score = scores(jnp.einsum("nd,de->ne", x.astype(jnp.float32), matrix.astype(jnp.float32)), router)
    compared = score if bias is None else score + bias.astype(jnp.float32)
    if router.kept < router.groups:
        grouped = compared.reshape(len(x), router.groups, -1)
        best_two = lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
        kept = jax.nn.one_hot(lax.top_k(best_two, router.kept)[1], router.groups, dtype=jnp.bool_).any(-2)
        compared = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(compared.shape)
    if router.capacity:
        compared = _admitted(compared, valid, router)
    ids = lax.top_k(compared, router.top_k)[1]
    weights = jnp.take_along_axis(score, ids, -1)
    if router.normalise:
        weights = weights / (weights.sum(-1, keepdims=True) + epsilon(router))
    return Choice(ids.astype(jnp.int32), weights * router.scale)


def _admitted(compared: jax.Array, valid: jax.Array | None, router: Router) -> jax.Array:
    """``compared [N, E]`` with minus infinity for the experts that a token's block does not admit; of equals the lower is admitted."""
    blocks = compared.reshape(-1, router.block, compared.shape[-1])
    heard = blocks if valid is None else jnp.where(valid.reshape(-1, router.block, 1), blocks, -jnp.inf)
    pool = jax.nn.one_hot(lax.top_k(heard.max(1), router.capacity)[1], compared.shape[-1], dtype=jnp.bool_).any(-2)
    return jnp.where(pool[:, None], blocks, -jnp.inf).reshape(compared.shape)


def scores(logits: jax.Array, router: Router) -> jax.Array:
    """``[N, E]`` float32: the experts' scores."""
    return jax.nn.sigmoid(logits) if router.score == "sigmoid" else jax.nn.softmax(logits, -1)


def epsilon(router: Router) -> float:
    """What is added to a token's sum of scores before its weights are divided by it."""
    return 1e-20 if router.score == "sigmoid" else 0.0
