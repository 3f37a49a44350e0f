"""How probable tokens are, given what a canvas shows: one forward over whole canvases, without a cache.

Letters in shapes: R rows, L positions of a canvas, V vocabulary, D hidden size.
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
from diffulex_jax.parallel.mesh import add_up, first_index, shared_by


_AT_ONCE = 128  # positions whose logits are held together: 80 MB in a vocabulary of 157 k


class Canvases(NamedTuple):
    """What is asked of R sequences, the same positions of which all are of one compiled length L, whole blocks.

    Attributes:
      noisy: ``[R, L]`` int32, what stands on the canvas, with masks.
      clean: ``[R, L]`` int32, the tokens themselves, which later blocks see in the place of noisy ones; None: there is but one canvas, and
        every block sees what stands there. Only for block-causal canvases.
      target: ``[R, L]`` int32, the tokens whose probabilities are asked for.
      begin: ``[R]`` int32, how many positions are the prompt's.
      length: ``[R]`` int32, how many there are. Behind it masks stand: to the end of a block they are seen, as a decoder's are, unless
        the canvas is seen whole.
    """

    noisy: Any
    clean: Any
    target: Any
    begin: Any
    length: Any


def log_probs(program: Program, params: Params, canvases: Canvases) -> jax.Array:
    """Log probability of each target at its position, ``[R, L]`` float32; at position 0 of models that speak of the next, it means nothing.

    Probabilities are shares of what a decoder may choose, which a mask is not; only where the program's confidences count it (LLaDA's and
    Dream's), they do.
    """
    noisy, clean, target, begin, length = canvases
    rows, size = noisy.shape
    at = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (rows, size))
    where, valid = _places(program, at, begin[:, None], length[:, None])
    mask = program.attention.mask(where, where)
    if program.attention.canvas == "whole":
        mask &= valid[:, None]
    tokens, positions = noisy, at
    if clean is not None:
        own = where.block[:, None] == where.block[..., None]
        below = mask & (where.block[:, None] < where.block[..., None])
        mask = jnp.concatenate([jnp.concatenate([own, below], 2), jnp.concatenate([jnp.zeros_like(mask), mask], 2)], 1)
        tokens, positions, valid = (jnp.concatenate(pair, 1) for pair in ((noisy, clean), (at, at), (valid, valid)))
    kernels = program.kernels.for_layers(params["embed"].dtype)
    hidden = hidden_states(program.model, params, tokens, positions, mask, kernels=kernels, valid=valid)
    if program.model.spec.predicts == "next":
        source = jnp.maximum(at - 1, 0)
        if clean is not None:  # the first token of a block is decided by what is final before it
            first = jnp.concatenate([jnp.ones_like(at[:, :1], bool), where.block[:, 1:] != where.block[:, :-1]], 1)
            source = jnp.where(first, size + source, source)
        hidden = jnp.take_along_axis(hidden, source[..., None], 1)
    return _log_probs(program, params, hidden[:, :size].reshape(rows * size, -1), target.reshape(-1)).reshape(rows, size)


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
