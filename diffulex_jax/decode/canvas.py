"""One pass of the network over whole canvases, prompt and masks included, in which every position sees all others (LLaDA)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from diffulex_jax.decode.program import Program
from diffulex_jax.models.base import Params
from diffulex_jax.models.ops import Ops, machine_ops
from diffulex_jax.parallel.mesh import shared_by
from diffulex_jax.state import DecodeState
from pallas_kernels.block_attention import canvas_attention, split_heads
from pallas_kernels.target import anywhere


def canvas_forward(program: Program, params: Params, state: DecodeState, *, watch: Callable[[Ops], Ops] = lambda ops: ops) -> jax.Array:
    """Hidden states ``[S, B, D]`` of the window, after a forward over each row's canvas ``[0, limit)``.

    Where ``cfg_scale`` is w > 0, a second forward has masks for all that the caller gave, and its hidden states u move the others by
    classifier-free guidance: ``u + (w + 1) (h - u)``. The output matrix is linear, so that is the guidance of LLaDA's logits.
    ``watch`` is that of ``decode.forward``.
    """
    slots, _, block = state.tokens.shape
    row, at = jnp.arange(slots)[:, None], state.positions.reshape(slots, block)
    tokens = state.sequence.tokens.at[row, at].set(state.tokens.reshape(slots, block), mode="drop")
    hidden = functools.partial(_hidden, program, params, state, jnp.minimum(at, tokens.shape[1] - 1), watch=watch)
    found, scale = hidden(tokens), state.settings.cfg_scale
    guided = (scale > 0) & state.live

    def guide() -> jax.Array:
        bare = hidden(jnp.where(state.given, program.dims.mask_id, tokens)).astype(jnp.float32)
        moved = bare + (scale[:, None, None] + 1) * (found.astype(jnp.float32) - bare)
        return jnp.where(guided[:, None, None], moved.astype(found.dtype), found)

    return lax.cond(anywhere(guided.any()), guide, lambda: found)


def _hidden(
    program: Program, params: Params, state: DecodeState, at: jax.Array, tokens: jax.Array, *, watch: Callable[[Ops], Ops]
) -> jax.Array:
    """Hidden states ``[S, B, D]`` at positions ``at [S, B]`` of ``tokens [S, T]``."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    exists = positions < state.limit[:, None]
    kernels = program.kernels.for_layers(params["embed"].dtype, shared=any(map(shared_by, ("expert", "mlp", "kv_heads"))))

    def attend(layer: jax.Array, heads: jax.Array) -> tuple[jax.Array, Any]:
        del layer  # nothing is kept of one
        return canvas_attention(*split_heads(heads), length=state.limit, backend=kernels.block_attention), ()

    ops = machine_ops(kernels, attend, valid=exists & state.live[:, None])
    hidden, _ = program.model.layers(params, params["embed"][tokens], positions, watch(ops))
    return jnp.take_along_axis(hidden, at[..., None], 1)
