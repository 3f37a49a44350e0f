"""The two objectives of the embedded model, block diffusion and on-policy uniform training, on the layout [noisy ; clean].

Both feed ``2 L`` tokens: a noisy canvas that is scored, then the clean one it conditions on, at repeated positions. A noisy
block sees itself (both directions) and the clean blocks before it; the clean half is block-causal. That is exactly what a
decoder sees that denoises one block over a cache of finished ones (DMax, arXiv 2604.08302; block diffusion, arXiv 2503.09573).

Letters in shapes: R rows, L canvas tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffulex_jax.models.attention import AttentionPolicy, positions_of
from diffulex_jax.models.base import Model, Params, logits
from diffulex_jax.models.ops import At, Ops
from pallas_kernels import expert_choice
from pallas_kernels.block_attention import masked_attention, split_heads
from pallas_kernels.linear import linear, mlp


BLOCK = 32
SCORED_EOS = 32  # trailing end-of-sequence tokens that count
NOISE = (0.5, 1.25)  # of on-policy rows: uniform, clipped at 1; DMax uses 0.75 throughout, decoding starts from 1


Score = tuple[jax.Array, jax.Array]
"""``(loss, accuracy)``, both means over the positions that count."""


class Batch(NamedTuple):
    """tokens: ``[R, L]`` int32 canvases; start: ``[R]`` first answer position; end: ``[R]`` first end-of-sequence position."""

    tokens: jax.Array
    start: jax.Array
    end: jax.Array


def scored(batch: Batch) -> jax.Array:
    """``[R, L]`` bool: the response, that is the answer and the first :data:`SCORED_EOS` end-of-sequence tokens."""
    at = jnp.arange(batch.tokens.shape[1])
    return (at >= batch.start[:, None]) & (at < batch.end[:, None] + SCORED_EOS)


def attention_mask(length: int, block: int = BLOCK) -> jax.Array:
    """``[2 length, 2 length]`` bool (query, key) of the layout [noisy ; clean]."""
    blocks = positions_of(jnp.tile(jnp.arange(length) // block, 2))
    noisy = jnp.arange(2 * length) < length
    upto = AttentionPolicy().mask(blocks, blocks)
    own = upto & upto.T
    from_noisy = jnp.where(noisy[None], own, upto & ~own)
    return jnp.where(noisy[:, None], from_noisy, ~noisy[None] & upto)


def predict(params: Params, model: Model, noisy: jax.Array, clean: jax.Array, *, balance: float = 0.0) -> jax.Array:
    """Logits ``[R, L, V]`` (float32) of the noisy half; ``noisy`` and ``clean`` are ``[R, L]`` token ids.

    Raises:
      ValueError: for a model whose outputs speak of the next position, or which sees its whole canvas: no objective here is made for it.
    """
    if model.spec.attention.canvas == "whole":
        raise ValueError("a model that sees its whole canvas cannot be trained here, only one that is block-causal")
    if model.spec.predicts != "same":
        raise ValueError(f"a model that predicts={model.spec.predicts!r} cannot be trained here, only one that predicts='same'")
    rows, length = noisy.shape
    # A one-hot product, not a gather: the gradient of a gather is a scatter in which most tokens (masks, end of sequence)
    # fight over the same two rows.
    tokens = jnp.concatenate([noisy, clean], 1)
    x = jax.nn.one_hot(tokens, model.spec.vocab_size, dtype=params["embed"].dtype) @ params["embed"]
    positions = jnp.broadcast_to(jnp.tile(jnp.arange(length, dtype=jnp.int32), 2), (rows, 2 * length))
    h, _ = model.layers(params, x, positions, differentiable_ops(attention_mask(length), balance=balance))
    z = logits(model, params, h[:, :length])
    return z.at[..., model.spec.mask_id].set(-jnp.inf)  # never a label, never drafted


def differentiable_ops(mask: jax.Array, *, balance: float = 0.0) -> Ops:
    """A layer's operations in forms that have gradients; ``mask`` ``[T, T]`` bool says what each query sees."""

    def attend(at: At, heads: jax.Array) -> tuple[jax.Array, tuple[()]]:
        del at
        return masked_attention(*split_heads(heads), mask), ()

    def experts(x: jax.Array, stacks: Params, layer: jax.Array, router: expert_choice.Router) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])
        bias = stacks["router_bias"][layer] if "router_bias" in stacks else None
        ids, weights, _ = expert_choice.choose(flat, stacks["router"][layer], bias, router, backend="sorted")
        y = dense_experts(flat, ids, weights, stacks["experts_gate_up"][layer], stacks["experts_down"][layer], balance=balance)
        y = y.reshape(x.shape)
        shared = (stacks["shared_gate_up"], stacks["shared_down"]) if "shared_down" in stacks else None
        return y if shared is None else y + mlp(x, *shared, layer, backend="sliced")

    def plain_mlp(x: jax.Array, stacks: tuple[jax.Array, jax.Array], layer: jax.Array) -> jax.Array:
        return mlp(x, *stacks, layer, backend="sliced")

    return Ops(functools.partial(linear, backend="sliced"), plain_mlp, experts, attend, lambda x, axis: x)


def dense_experts(
    x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, *, balance: float = 0.0
) -> jax.Array:
    """Every expert on every token, weighted: differentiable, and the fastest form for a few narrow experts.

    Args:
      x: ``[N, D]``.
      ids, weights: ``[N, k]``, the chosen experts of each token and how much each counts.
      gate_up, down: ``[E, D, 2 F]`` and ``[E, F, D]``.
      balance: scales the gradient of the load-balancing loss ``E sum_e load_e mean_weight_e`` (Switch Transformer, arXiv 2101.03961),
        which is added to that of ``weights``.
    """
    experts = gate_up.shape[0]
    load = jax.nn.one_hot(ids, experts, dtype=jnp.float32).mean((0, 1))
    weights = _add_gradient(weights, balance * experts * (load[ids] - 1 / experts) / ids.shape[0])
    combine = jnp.einsum("nk,nke->ne", weights, jax.nn.one_hot(ids, experts, dtype=weights.dtype)).astype(x.dtype)
    gate, up = jnp.split(jnp.einsum("nd,edf->nef", x, gate_up), 2, -1)
    return jnp.einsum("nef,efd->nd", jax.nn.silu(gate) * up * combine[..., None], down)


@jax.custom_vjp
def _add_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """``x``, whose cotangent is increased by ``gradient``."""
    del gradient
    return x


_add_gradient.defvjp(lambda x, gradient: (x, gradient), lambda gradient, g: (g + gradient, jnp.zeros_like(gradient)))


def masked(params: Params, model: Model, batch: Batch, key: jax.Array, *, balance: float = 0.0) -> Score:
    """Block diffusion: each block is masked with its own ratio, uniform in (0, 1]; the masked tokens are predicted.

    Returns:
      ``(loss, accuracy)`` over masked response positions.
    """
    rows, length = batch.tokens.shape
    block_key, token_key = jax.random.split(key)
    ratio = 1 - jax.random.uniform(block_key, (rows, length // BLOCK))
    hidden = scored(batch) & (jax.random.uniform(token_key, (rows, length)) < jnp.repeat(ratio, BLOCK, 1))
    noisy = jnp.where(hidden, model.spec.mask_id, batch.tokens)
    return _mean(predict(params, model, noisy, batch.tokens, balance=balance), batch.tokens, hidden)


def on_policy(params: Params, model: Model, batch: Batch, key: jax.Array, *, balance: float = 0.0) -> Score:
    """DMax's on-policy uniform training: the model repairs its own drafts.

    Response tokens are masked, one forward without gradient fills the masks with the model's choices, and the training forward
    must predict the whole response from that. In half of the rows only choices above a random confidence are filled in and
    the rest stay masked, as in the middle of decoding with a threshold.

    Returns:
      ``(loss, accuracy)`` over all response positions.
    """
    rows = batch.tokens.shape[0]
    ratio_key, token_key, threshold_key = jax.random.split(key, 3)
    ratio = jax.random.uniform(ratio_key, (rows, 1), minval=NOISE[0], maxval=NOISE[1])
    hidden = scored(batch) & (jax.random.uniform(token_key, batch.tokens.shape) < ratio)
    noisy = jnp.where(hidden, model.spec.mask_id, batch.tokens)
    z = jax.lax.stop_gradient(predict(params, model, noisy, batch.tokens))
    sure = jax.nn.softmax(z).max(-1) >= jax.random.uniform(threshold_key, (rows, 1), minval=-1.0)
    noisy = jnp.where(hidden & sure, z.argmax(-1), noisy)
    return _mean(predict(params, model, noisy, batch.tokens, balance=balance), batch.tokens, scored(batch))


def _mean(z: jax.Array, labels: jax.Array, where: jax.Array) -> Score:
    """Mean cross-entropy and accuracy of ``z [R, L, V]`` at the positions ``where``."""
    count = jnp.maximum(where.sum(), 1)
    loss = jnp.sum(optax.softmax_cross_entropy_with_integer_labels(z, labels), where=where) / count
    return loss, jnp.sum(z.argmax(-1) == labels, where=where) / count
