"""Objectives: functions ``(params, model, batch, key, *, balance=0.0) -> (loss, accuracy)`` over the layout [noisy ; clean].

Each draws noise from ``key``, and asks the model for the clean tokens. The response is what counts: the answer and some tokens behind
it (``layout.scored``), never the prompt. ``functools.partial`` gives an objective other settings than its own, and any function of
this form is one.

Letters in shapes: R rows, L canvas tokens, N blocks of the canvas.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import lax

from diffulex_jax.models.base import Model, Params
from diffulex_jax.training.layout import Batch, predict, scored


Score = tuple[jax.Array, jax.Array]
"""``(loss, accuracy)``, both means over the positions that count."""

NOISE = (0.5, 1.25)
"""Share of a row's response that is drawn, clipped at 1. DMax uses 0.75 throughout; decoding starts from 1."""


def masked(
    params: Params,
    model: Model,
    batch: Batch,
    key: jax.Array,
    *,
    noise: tuple[float, float] = (0.0, 1.0),
    all_count: bool = False,
    balance: float = 0.0,
) -> Score:
    """Block diffusion: each block is masked with a ratio of its own, and the masked tokens are predicted (arXiv 2503.09573).

    Args:
      params, model, batch, key: what is trained, on what, with which noise.
      noise: low and high; ratios are uniform in (low, high].
      all_count: count all of the response, not just what is masked (DMax's rows without drafts).
      balance: see ``layout.dense_experts``.
    """
    rows, length = batch.tokens.shape
    low, high = noise
    block_key, token_key = jax.random.split(key)
    ratio = high - (high - low) * jax.random.uniform(block_key, (rows, length // model.spec.block_size))
    hidden = scored(batch) & (jax.random.uniform(token_key, (rows, length)) < jnp.repeat(ratio, model.spec.block_size, 1))
    noisy = jnp.where(hidden, model.spec.mask_id, batch.tokens)
    z = predict(params, model, noisy, batch.tokens, balance=balance)
    return _mean(z, batch.tokens, scored(batch) if all_count else hidden)


def uniform(
    params: Params, model: Model, batch: Batch, key: jax.Array, *, noise: tuple[float, float] = NOISE, balance: float = 0.0
) -> Score:
    """Uniform training: part of the response is replaced by random tokens of the vocabulary, and all of it is predicted.

    What DMax compares its on-policy drafts with (arXiv 2604.08302): such noise looks like nothing a decoder sees.

    Args:
      params, model, batch, key, balance: as for :func:`masked`.
      noise: low and high of the share of a row that is replaced, uniform and clipped at 1.
    """
    ratio_key, token_key, draw_key = jax.random.split(key, 3)
    hidden = _hidden(batch, ratio_key, token_key, noise)
    random = jax.random.randint(draw_key, batch.tokens.shape, 0, model.spec.vocab_size - 1)
    random += random >= model.spec.mask_id  # any token but the mask
    noisy = jnp.where(hidden, random, batch.tokens)
    return _mean(predict(params, model, noisy, batch.tokens, balance=balance), batch.tokens, scored(batch))


def on_policy(
    params: Params,
    model: Model,
    batch: Batch,
    key: jax.Array,
    *,
    noise: tuple[float, float] = NOISE,
    some_stay: bool = True,
    balance: float = 0.0,
) -> Score:
    """DMax's on-policy uniform training: the model repairs its own drafts (arXiv 2604.08302).

    Response tokens are masked, one forward without gradient fills the masks with the model's choices, and the training forward must
    predict the whole response from that.

    Args:
      params, model, batch, key, balance: as for :func:`masked`.
      noise: low and high of the share of a row that is masked, uniform and clipped at 1; DMax's is (0.75, 0.75).
      some_stay: in half of the rows fill in only choices above a random confidence and leave the others masked, as in the middle of
        decoding with a threshold. DMax fills all.
    """
    ratio_key, token_key, threshold_key = jax.random.split(key, 3)
    hidden = _hidden(batch, ratio_key, token_key, noise)
    noisy = jnp.where(hidden, model.spec.mask_id, batch.tokens)
    z = lax.stop_gradient(predict(params, model, noisy, batch.tokens))
    if some_stay:
        hidden &= jax.nn.softmax(z).max(-1) >= jax.random.uniform(threshold_key, (len(z), 1), minval=-1.0)
    noisy = jnp.where(hidden, z.argmax(-1), noisy)
    return _mean(predict(params, model, noisy, batch.tokens, balance=balance), batch.tokens, scored(batch))


def multi_block(
    params: Params,
    model: Model,
    batch: Batch,
    key: jax.Array,
    *,
    most: int = 4,
    at_random: float = 0.0,
    noise: tuple[float, float] = (0.001, 1.0),
    margin: float = 0.01,
    drafts: bool = False,
    balance: float = 0.0,
) -> Score:
    """Multi-block teacher forcing (MultiTF of MBD-LMs, SJTU-DENG-Lab/mbd-lms): groups of noisy blocks that see each other.

    Blocks of a group are the noisier the later they come, as in a window that is denoised together. The authors show every example
    in all groupings; here each draws one. They mask ``floor(ratio * n)`` tokens of a block; here each is masked with that probability, so
    that whole blocks of masks, with which decoding begins, are seen too.

    Args:
      params, model, batch, key, balance: as for :func:`masked`.
      most: blocks of the largest group; at least 2.
      at_random: share of rows whose groups are of random sizes (see :func:`noise_groups`).
      noise, margin: see :func:`chain_uniform`.
      drafts: fill the masks with the model's own choices and count all of the response, as :func:`on_policy` does without
        ``some_stay`` (the authors' branch for DMax). Otherwise masked tokens count.
    """
    rows, length = batch.tokens.shape
    block = model.spec.block_size
    group_key, ratio_key, token_key = jax.random.split(key, 3)
    first = noise_groups(group_key, rows, length // block, most=most, at_random=at_random)
    ratio = chain_uniform(ratio_key, first, noise, margin)
    hidden = scored(batch) & (jax.random.uniform(token_key, (rows, length)) < jnp.repeat(ratio, block, 1))
    noisy = jnp.where(hidden, model.spec.mask_id, batch.tokens)
    if drafts:
        z = lax.stop_gradient(predict(params, model, noisy, batch.tokens, first=first))
        noisy = jnp.where(hidden, z.argmax(-1), noisy)
    z = predict(params, model, noisy, batch.tokens, first=first, balance=balance)
    return _mean(z, batch.tokens, scored(batch) if drafts else hidden)


def noise_groups(key: jax.Array, rows: int, blocks: int, *, most: int, at_random: float = 0.0) -> jax.Array:
    """Draws how the blocks of each row lie in groups of neighbours.

    A row has a size of 2 to ``most`` blocks and a shift below it, each pair as likely as any other: its first group has as many blocks
    as the shift says, where that is not 0, and all others are of the size, up to the end. A share ``at_random`` of rows has groups of sizes
    that are each drawn from 2 to ``most``.

    Returns:
      ``[R, N]`` int32, the first block of the group that each block is in.

    Raises:
      ValueError: for groups of less than two blocks.
    """
    if most < 2:
        raise ValueError(f"most={most}: a group of blocks that are denoised together has at least 2")
    pair_key, sizes_key, which_key = jax.random.split(key, 3)
    pairs = jnp.array([(size, shift) for size in range(2, most + 1) for shift in range(size)])
    size, shift = pairs[jax.random.randint(pair_key, (rows,), 0, len(pairs))].T[..., None]
    number = jnp.arange(blocks, dtype=jnp.int32)
    starts = (number - shift) % size == 0
    begins = jnp.cumsum(jax.random.randint(sizes_key, (rows, blocks), 2, most + 1), 1)
    drawn = (begins[:, None, :] == number[:, None]).any(-1)
    starts = jnp.where(jax.random.uniform(which_key, (rows, 1)) < at_random, drawn, starts)
    return lax.cummax(jnp.where(starts, number, 0), axis=1)


def chain_uniform(key: jax.Array, first: jax.Array, noise: tuple[float, float], margin: float) -> jax.Array:
    """Draws the noise of blocks so that it rises within each group.

    With h = high - margin (high - low): a group has a floor, uniform in [low, h]; its first block's noise is uniform from the floor to h,
    and each following block's from that of the block before it to h.

    Args:
      key: of the draws.
      first: ``[R, N]``, groups, as :func:`noise_groups` gives them.
      noise: low and high.
      margin: how far below high it stays.

    Returns:
      ``[R, N]`` float32.
    """
    low, high = noise
    high -= margin * (high - low)
    floors, draws = jax.random.uniform(key, (2, *first.shape))
    begins = first == jnp.arange(first.shape[1])

    def block(before: jax.Array, of: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        begins, floor, draw = of
        least = jnp.where(begins, low + (high - low) * floor, before)
        ratio = least + (high - least) * draw
        return ratio, ratio

    _, ratios = lax.scan(block, jnp.zeros(len(first)), jax.tree.map(jnp.transpose, (begins, floors, draws)))
    return ratios.T


def _hidden(batch: Batch, ratio_key: jax.Array, token_key: jax.Array, noise: tuple[float, float]) -> jax.Array:
    """``[R, L]`` bool: response tokens that are drawn, of each row with a share of its own."""
    ratio = jax.random.uniform(ratio_key, (len(batch.tokens), 1), minval=noise[0], maxval=noise[1])
    return scored(batch) & (jax.random.uniform(token_key, batch.tokens.shape) < ratio)


def _mean(z: jax.Array, labels: jax.Array, where: jax.Array) -> Score:
    """Mean cross-entropy and accuracy of ``z [R, L, V]`` at the positions ``where``."""
    count = jnp.maximum(where.sum(), 1)
    loss = jnp.sum(optax.softmax_cross_entropy_with_integer_labels(z, labels), where=where) / count
    return loss, jnp.sum(z.argmax(-1) == labels, where=where) / count
