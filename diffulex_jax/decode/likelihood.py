"""How probable tokens are, given what a canvas shows: one forward over whole canvases, without a cache.

Letters in shapes: R rows, L positions of a sequence, M cells of canvases, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.decode.program import Program
from diffulex_jax.models.attention import Where
from diffulex_jax.models.base import Params, logits
from diffulex_jax.models.functional import hidden_states
from diffulex_jax.models.ops import At, Attend, machine_ops
from diffulex_jax.parallel.mesh import add_up, first_index, shared_by
from pallas_kernels.block_attention import masked_attention, split_heads


_AT_ONCE = 128  # positions whose logits are held together: 80 MB in a vocabulary of 157 k


class Canvases(NamedTuple):
    """What is asked of R sequences, of compiled lengths.

    Attributes:
      noisy: ``[R, M]`` int32, what stands on the canvases of a sequence, one behind the other, with masks. Of each canvas there are the
        blocks that hold masks, at least; M is a number of blocks.
      at: ``[R, M]`` int32, the position of each cell.
      canvas: ``[R, M]`` int32, which canvas it is on; -1 for none.
      clean: ``[R, L]`` int32, the sequence itself, which later blocks of all canvases see in the place of noisy ones; None: there is but
        one canvas, whole, and every block sees what stands there. Only for block-causal canvases.
      target: ``[R, M]`` int32, the tokens whose probabilities are asked for.
      begin: ``[R]`` int32, how many positions are the prompt's.
      length: ``[R]`` int32, how many there are. Behind it masks stand: to the end of a block they are seen, as a decoder's are, unless
        the canvas is seen whole.
    """

    noisy: Any
    at: Any
    canvas: Any
    clean: Any
    target: Any
    begin: Any
    length: Any


def log_probs(program: Program, params: Params, canvases: Canvases) -> jax.Array:
    """Log probability of each target at its cell, ``[R, M]`` float32; at position 0 of models that speak of the next, it means nothing.

    Probabilities are shares of what a decoder may choose, which a mask is not; only where the program's confidences count it (LLaDA's and
    Dream's), they do.
    """
    noisy, at, canvas, clean, target, begin, length = canvases
    rows, size = noisy.shape
    where, valid = _places(program, at, begin[:, None], length[:, None])
    valid &= canvas >= 0
    kernels = program.kernels.for_layers(params["embed"].dtype)
    if clean is None:
        mask = program.attention.mask(where, where)
        if program.attention.canvas == "whole":
            mask &= valid[:, None]
        hidden = hidden_states(program.model, params, noisy, at, mask, kernels=kernels, valid=valid)
    else:
        past_at = jnp.broadcast_to(jnp.arange(clean.shape[1], dtype=jnp.int32), clean.shape)
        past, there = _places(program, past_at, begin[:, None], length[:, None])
        sees = program.attention.mask(where, past) & (past.block[:, None] < where.block[..., None])
        attend = _attend(sees, program.attention.mask(past, past), block=program.dims.block)
        tokens, positions, valid = (jnp.concatenate(pair, 1) for pair in ((noisy, clean), (at, past_at), (valid, there)))
        ops = machine_ops(kernels, attend, valid=valid)
        hidden = program.model.layers(params, params["embed"][tokens], positions, ops)[0]
    if program.model.spec.predicts == "next":
        source = jnp.broadcast_to(jnp.maximum(jnp.arange(size) - 1, 0), at.shape)
        if clean is not None:  # the first token of a block is decided by what is final before it
            source = jnp.where(jnp.arange(size) % program.dims.block == 0, size + jnp.maximum(at - 1, 0), source)
        hidden = jnp.take_along_axis(hidden, source[..., None], 1)
    return _log_probs(program, params, hidden[:, :size].reshape(rows * size, -1), target.reshape(-1)).reshape(rows, size)


def _attend(sees: jax.Array, itself: jax.Array, *, block: int) -> Attend:
    """Attention of canvases ``[R, M]`` in blocks, each of which sees all of itself and of the sequence ``sees [R, M, L]``, and of the
    sequence behind them, which sees ``itself [R, L, L]``. No block is compared with others of canvases, which would be most of the work."""
    rows, size, length = sees.shape
    own = jnp.ones((rows * size // block, block, block), bool)
    mask = jnp.concatenate([own, sees.reshape(-1, block, length)], 2)

    def attend(at: At, heads: jax.Array) -> tuple[jax.Array, Any]:
        del at
        q, k, v = split_heads(heads)
        below = masked_attention(q[:, size:], k[:, size:], v[:, size:], itself)
        k, v = (jnp.concatenate([blocks(x[:, :size]), jnp.repeat(x[:, size:], size // block, 0)], 1) for x in (k, v))
        found = masked_attention(blocks(q[:, :size]), k, v, mask)
        return jnp.concatenate([found.reshape(rows, size, *found.shape[2:]), below], 1), ()

    def blocks(x: jax.Array) -> jax.Array:
        return x.reshape(-1, block, *x.shape[2:])

    return attend


def _places(program: Program, at: jax.Array, begin: jax.Array, length: jax.Array) -> tuple[Where, jax.Array]:
    """Where positions ``at [R, L]`` lie, and which exist: whole blocks of them, where blocks are seen."""
    block, apart = program.dims.block, program.dims.prompt_apart
    offset = begin if apart else jnp.zeros_like(begin)
    number = (at - offset) // block
    prompt = at < (begin if apart else begin // block * block)
    if program.attention.canvas == "whole":
        return Where(number, prompt), at < jnp.maximum(length, 1)
    return Where(number, prompt), number <= (jnp.maximum(length, 1) - 1 - offset) // block


def _log_probs(program: Program, params: Params, hidden: jax.Array, target: jax.Array) -> jax.Array:
    """``[N]`` for ``hidden [N, D]`` and ``target [N]``, some at a time."""
    counts_mask = program.confidence in ("whole", "narrowed")

    def one(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, target = row
        z = logits(program.model, params, hidden)
        ids = first_index("vocab", z.shape[-1]) + jnp.arange(z.shape[-1])
        if not counts_mask:
            z = jnp.where(ids == program.dims.mask_id, -jnp.inf, z)
        own = add_up(jnp.sum(z, where=ids == target), "vocab")
        names = shared_by("vocab")
        peak = lax.pmax(z.max(), names) if names else z.max()
        return own - peak - jnp.log(add_up(jnp.exp(z - peak).sum(), "vocab"))

    return lax.map(one, (hidden, target), batch_size=_AT_ONCE)
