"""The experts on a Hopper GPU: routing by counting, then two grouped matmuls that stream each wanted expert once.

With a few tokens an expert, a layer costs what reading its experts costs, so everything here serves that one stream. The tokens'
rows, sorted by expert, are the narrow operand of the tensor cores and the weights the wide one (a tile of 64 output columns by as
few as 16 rows), one warpgroup copies tiles from memory while the others multiply, and blocks go on from tile to tile without a
pause. SwiGLU happens before the first product leaves the registers. A shared expert, if there is one, is one more group that
every token belongs to.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.gpu_kernel import Groups, Tile, fits, matmul
from pallas_kernels.grouped_matmul.reference import swiglu
from pallas_kernels.grouped_matmul.routing import combine
from pallas_kernels.grouped_matmul.xla import ragged


_COMPARED_PAIRS = 8192
"""Up to this many (token, expert) pairs, comparing all with all is faster than sorting them."""


class _Plan(NamedTuple):
    """Where rows go: ``source [P + T]`` token of each row (the shared expert's rows last), ``place [T, k]`` row of each pair."""

    groups: Groups
    source: jax.Array
    place: jax.Array


def hopper(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    layer: ArrayLike | None = None,
    valid: jax.Array | None = None,
    shared: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """See ``expert_mlp``. For bfloat16 and widths that tiles of 64 divide; anything else goes through ``lax.ragged_dot``."""
    alike = shared is None or shared[1].shape[-2] == down.shape[-2]
    if x.dtype != jnp.bfloat16 or gate_up.dtype != x.dtype or not alike or not fits(gate_up.shape[-2:], down.shape[-2:]):
        routed = ragged(x, expert_ids, weights, gate_up, down, layer=layer, valid=valid)
        return routed if shared is None else routed + swiglu(x, *shared, layer=layer)
    if layer is None:
        layer, gate_up, down = 0, gate_up[None], down[None]
        shared = None if shared is None else (shared[0][None], shared[1][None])
    tokens, per_token = expert_ids.shape
    rows = _rows_per_tile(tokens * per_token / gate_up.shape[1])
    plan = _plan(expert_ids, valid, num_experts=gate_up.shape[1], tile_rows=rows, shared=shared is not None)
    index = jnp.asarray(layer, jnp.int32)
    wide = None if shared is None else shared[0].reshape(*shared[0].shape[:2], -1)
    hidden = matmul(x[plan.source], gate_up, wide, index, plan.groups, swiglu=True, tile=Tile(rows, 128))
    out = matmul(hidden, down, None if shared is None else shared[1], index, plan.groups, swiglu=False, tile=Tile(rows, 256))
    total = combine(out, plan.place, weights, valid=valid)
    if shared is not None:
        total += out[tokens * per_token :]
    return total.astype(x.dtype)


def _rows_per_tile(mean: float) -> int:
    """Rows of a tile by the mean number of an expert's rows: large enough that nearly every expert is one tile, read once.

    Measured on an H100 with LLaDA2-mini's experts at 32, 64, 256 and 1024 tokens (1, 2, 8 and 32 rows an expert).
    """
    return next((rows for most, rows in ((4, 16), (12, 32), (48, 64)) if mean <= most), 128)


def _plan(expert_ids: jax.Array, valid: jax.Array | None, *, num_experts: int, tile_rows: int, shared: bool) -> _Plan:
    """Sorts pairs by expert without sorting: a pair's place is how many come before it, which one fused comparison counts."""
    tokens, per_token = expert_ids.shape
    pairs = tokens * per_token
    if valid is not None:
        expert_ids = jnp.where(valid[:, None], expert_ids, num_experts)
    of, index = expert_ids.reshape(-1), jnp.arange(pairs, dtype=jnp.int32)
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    size = jnp.sum(of[None] == experts[:, None], 1, dtype=jnp.int32)
    start = jnp.sum(of[None] < experts[:, None], 1, dtype=jnp.int32)
    if pairs > _COMPARED_PAIRS:
        order = jnp.argsort(of, stable=True).astype(jnp.int32)
        source, place = order // per_token, jnp.zeros_like(order).at[order].set(index, unique_indices=True)
    else:
        before = (of[None] < of[:, None]) | ((of[None] == of[:, None]) & (index[None] < index[:, None]))
        place = jnp.sum(before, 1, dtype=jnp.int32)
        if pairs <= 1024:
            source = jnp.sum(jnp.where(place[None] == index[:, None], (index // per_token)[None], 0), 1, dtype=jnp.int32)
        else:
            source = jnp.zeros_like(index).at[place].set(index // per_token, unique_indices=True, mode="promise_in_bounds")
    if shared:
        size, start = jnp.append(size, tokens), jnp.append(start, pairs)
        source = jnp.append(source, jnp.arange(tokens, dtype=jnp.int32))
    return _Plan(Groups.of(start, size, tile_rows), source, place.reshape(expert_ids.shape))
