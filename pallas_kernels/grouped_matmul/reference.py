"""The experts in plain jnp: every token through every expert, weighted by what it was routed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.stacks import Stack, plain


def dense(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: Stack,
    down: Stack,
    *,
    layer: ArrayLike | None = None,
    valid: jax.Array | None = None,
) -> jax.Array:
    """See ``expert_mlp``. Differentiable in ``x``, ``weights`` and both matrices; costs ``T * E`` expert rows."""
    if layer is not None:
        gate_up, down = gate_up[layer], down[layer]
    if valid is not None:
        # Before the matmuls and not only after: nothing that an invalid row holds, not even a NaN, meets a gradient.
        x = jnp.where(valid[:, None], x, 0)
        weights = jnp.where(valid[:, None], weights, 0)
    # Widened here, not by preferred_element_type: XLA on CPU has no bfloat16 matmul with a float32 result.
    gate_up, down = (plain(a, jnp.float32).astype(jnp.float32) for a in (gate_up, down))
    chosen = jax.nn.one_hot(expert_ids, gate_up.shape[0], dtype=jnp.float32)  # [T, k, E]
    share = jnp.einsum("tke,tk->te", chosen, weights)
    gate, up = jnp.split(jnp.einsum("td,edf->tef", x.astype(jnp.float32), gate_up), 2, axis=-1)
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype).astype(jnp.float32)
    out = jnp.einsum("tef,efd->ted", hidden, down)
    return jnp.einsum("te,ted->td", share, out).astype(x.dtype)


def add_shared(
    routed: jax.Array,
    x: jax.Array,
    shared: tuple[jax.Array, jax.Array] | None,
    *,
    layer: ArrayLike | None = None,
    valid: jax.Array | None = None,
) -> jax.Array:
    """``routed`` plus what ``expert_mlp``'s ``shared`` expert makes of ``x``, if there is one; nothing where not ``valid``."""
    if shared is None:
        return routed
    gate_up, down = shared if layer is None else (a[layer] for a in shared)
    h = jnp.einsum("td,dcf->tcf", x, gate_up)
    y = jnp.einsum("tf,fd->td", jax.nn.silu(h[:, 0]) * h[:, 1], down)
    return routed + (y if valid is None else jnp.where(valid[:, None], y, 0))
