"""The layout [noisy ; clean] that every objective trains on, and the forward over it.

A row is ``2 L`` tokens: a noisy canvas that is scored, then the clean one it conditions on, at repeated positions. The clean half is
block-causal. Noisy blocks come in groups of neighbours: one sees itself (both directions), the noisy blocks of its group before it, and
the clean blocks before the group. With groups of one block that is what a decoder sees that denoises one block over a cache of finished
ones (DMax, arXiv 2604.08302; block diffusion, arXiv 2503.09573); with larger ones what it sees that denoises several together (MultiTF
of MBD-LMs).

Letters in shapes: R rows, L canvas tokens, N blocks of the canvas, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffulex_jax.models.attention import AttentionPolicy, positions_of
from diffulex_jax.models.base import Model, Params, logits
from diffulex_jax.models.ops import At, Ops, Stream, gated, norm_stream, settled, times
from pallas_kernels import expert_choice, grouped_matmul
from pallas_kernels.block_attention import masked_attention, split_heads
from pallas_kernels.parts import summed


SCORED_EOS = 32  # trailing end-of-sequence tokens that count, as in DMax's training
ONE_HOT = 4096
"""Tokens of a vocabulary up to which embeddings are a one-hot product. The gradient of a gather is a scatter in which most tokens (masks,
end of sequence) fight over the same two rows; with large vocabularies the product takes longer than that."""

DENSE = 32
"""Most experts of which every token is given to all: the fastest form for a few narrow ones."""


class Batch(NamedTuple):
    """tokens: ``[R, L]`` int32 canvases; start: ``[R]`` first answer position; end: ``[R]`` first end-of-sequence position."""

    tokens: jax.Array
    start: jax.Array
    end: jax.Array


def scored(batch: Batch) -> jax.Array:
    """``[R, L]`` bool: the response, that is the answer and the first :data:`SCORED_EOS` end-of-sequence tokens."""
    at = jnp.arange(batch.tokens.shape[1])
    return (at >= batch.start[:, None]) & (at < batch.end[:, None] + SCORED_EOS)


def attention_mask(length: int, block: int, first: jax.Array | None = None) -> jax.Array:
    """Who sees whom in the layout [noisy ; clean].

    Args:
      length: L, of each half.
      block: tokens of a block.
      first: ``[..., N]`` int32, the first block of the group that each noisy block is in; default: each is a group of its own.

    Returns:
      ``[..., 2 L, 2 L]`` bool (query, key).
    """
    number = jnp.arange(length) // block
    first = number if first is None else jnp.repeat(first, block, -1)
    upto = AttentionPolicy().mask(positions_of(number), positions_of(number))  # of noisy ones among themselves, and of clean ones
    upto = jnp.broadcast_to(upto, (*first.shape[:-1], length, length))
    to_noisy = upto & (first[..., :, None] == first[..., None, :])
    to_clean = number < first[..., :, None]
    halves = ((to_noisy, to_clean), (jnp.zeros_like(upto), upto))
    return jnp.concatenate([jnp.concatenate(half, -1) for half in halves], -2)


def predict(
    params: Params, model: Model, noisy: jax.Array, clean: jax.Array, *, first: jax.Array | None = None, balance: float = 0.0
) -> jax.Array:
    """Logits of the noisy half.

    Args:
      params, model: the network; what is quantised has no gradient, and may be adapted (``models.adapted``).
      noisy, clean: ``[R, L]`` token ids, whole blocks of the model's.
      first: ``[R, N]``, the groups of noisy blocks; see :func:`attention_mask`.
      balance: see :func:`dense_experts`.

    Returns:
      ``[R, L, V]`` float32; the mask id has minus infinity, as it is never a label and never drafted.

    Raises:
      ValueError: for a canvas that is not a number of whole blocks; for a model whose outputs speak of the next position, or which sees
        its whole canvas: no objective here is made for it.
    """
    if model.spec.attention.canvas == "whole":
        raise ValueError("a model that sees its whole canvas cannot be trained here, only one that is block-causal")
    if model.spec.predicts != "same":
        raise ValueError(f"a model that predicts={model.spec.predicts!r} cannot be trained here, only one that predicts='same'")
    rows, length = noisy.shape
    block = model.spec.block_size
    if length % block:
        raise ValueError(f"a canvas of {length} tokens is not a number of whole blocks of {block}")
    tokens = jnp.concatenate([noisy, clean], 1)
    if model.spec.vocab_size <= ONE_HOT:
        x = jax.nn.one_hot(tokens, model.spec.vocab_size, dtype=params["embed"].dtype) @ params["embed"]
    else:
        x = params["embed"][tokens]
    positions = jnp.broadcast_to(jnp.tile(jnp.arange(length, dtype=jnp.int32), 2), (rows, 2 * length))
    h, _ = model.layers(params, x, positions, differentiable_ops(attention_mask(length, block, first), balance=balance))
    z = logits(model, params, h[:, :length])
    return z.at[..., model.spec.mask_id].set(-jnp.inf)


def differentiable_ops(mask: jax.Array, *, balance: float = 0.0) -> Ops:
    """A layer's operations in forms that have gradients; ``mask``, ``[T, T]`` or ``[R, T, T]`` bool, says what each query sees."""

    def attend(at: At, heads: jax.Array) -> tuple[jax.Array, tuple[()]]:
        del at
        return masked_attention(*split_heads(heads), mask), ()

    def experts(x: jax.Array, stacks: Params, layer: jax.Array, router: expert_choice.Router) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])
        bias = stacks["router_bias"][layer] if "router_bias" in stacks else None
        ids, weights = expert_choice.choose(flat, stacks["router"][layer], bias, router, backend="sorted")
        gate_up, down = (grouped_matmul.plain(stacks[name][layer], x.dtype) for name in ("experts_gate_up", "experts_down"))
        compute = dense_experts if len(gate_up) <= DENSE else sorted_experts
        y = compute(flat, ids, weights, gate_up, down, balance=balance)
        y = y.reshape(x.shape)
        shared = (stacks["shared_gate_up"], stacks["shared_down"]) if "shared_down" in stacks else None
        return (y if shared is None else y + summed(gated(x, shared, layer, backend="sliced")))[None]

    def add(x: jax.Array | Stream, y: jax.Array, axis: str) -> jax.Array:
        del axis
        return settled(x) + summed(y)

    linear, mlp = (functools.partial(function, backend="sliced") for function in (times, gated))
    return Ops(linear, mlp, experts, attend, add, norm_stream)


def dense_experts(
    x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, *, balance: float = 0.0
) -> jax.Array:
    """Every expert on every token, weighted; differentiable.

    Args:
      x: ``[N, D]``.
      ids, weights: ``[N, k]``, the chosen experts of each token and how much each counts.
      gate_up, down: ``[E, D, 2 F]`` and ``[E, F, D]``.
      balance: scales the gradient of the load-balancing loss ``E sum_e load_e mean_weight_e`` (Switch Transformer, arXiv 2101.03961),
        which is added to that of ``weights``.
    """
    weights = _balanced(weights, ids, len(gate_up), balance)
    combine = jnp.einsum("nk,nke->ne", weights, jax.nn.one_hot(ids, len(gate_up), dtype=weights.dtype)).astype(x.dtype)
    gate, up = jnp.split(jnp.einsum("nd,edf->nef", x, gate_up), 2, -1)
    return jnp.einsum("nef,efd->nd", jax.nn.silu(gate) * up * combine[..., None], down)


def sorted_experts(
    x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, *, balance: float = 0.0
) -> jax.Array:
    """:func:`dense_experts` for many experts: tokens are sorted by expert, and each goes through its own alone."""
    weights = _balanced(weights, ids, len(gate_up), balance)
    return grouped_matmul.expert_mlp(x, ids, weights, gate_up, down, backend="ragged")


def _balanced(weights: jax.Array, ids: jax.Array, experts: int, balance: float) -> jax.Array:
    """``weights`` with the gradient of the load-balancing loss added to theirs."""
    load = jax.nn.one_hot(ids, experts, dtype=jnp.float32).mean((0, 1))
    return _add_gradient(weights, balance * experts * (load[ids] - 1 / experts) / ids.shape[0])


@jax.custom_vjp
def _add_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """``x``, whose cotangent is increased by ``gradient``."""
    del gradient
    return x


_add_gradient.defvjp(lambda x, gradient: (x, gradient), lambda gradient, g: (g + gradient, jnp.zeros_like(gradient)))
