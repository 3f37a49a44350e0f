"""The experts on a Hopper GPU: routing by counting, then two grouped matmuls that stream each wanted expert once.

With a few tokens an expert, a layer costs what reading its experts costs, so everything here serves that one stream. The tokens'
rows, sorted by expert, are the narrow operand of the tensor cores and the weights the wide one (a tile of 64 output columns by as
few as 16 rows), one warpgroup copies tiles from memory while the others multiply, and blocks go on from tile to tile without a
pause. SwiGLU happens before the first product leaves the registers. A shared expert, if there is one, is one more group that
every token belongs to.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.gpu_kernel import Groups, Tile, fits, matmul
from pallas_kernels.grouped_matmul.reference import add_shared
from pallas_kernels.grouped_matmul.routing import combine
from pallas_kernels.grouped_matmul.xla import ragged


_COMPARED_PAIRS = 4096
"""Up to this many (token, expert) pairs, comparing all with all is the quickest way to count."""


class _Plan(NamedTuple):
    """Where rows go: ``source [P]`` the token of each row, ``place [T, k]`` the row of each pair."""

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
        return add_shared(routed, x, shared, layer=layer, valid=valid)
    if layer is None:
        layer, gate_up, down = 0, gate_up[None], down[None]
        shared = None if shared is None else (shared[0][None], shared[1][None])
    num_groups, mean = gate_up.shape[1], expert_ids.size / gate_up.shape[1]
    if shared is not None:  # one more expert, of which every token is sure
        shared = (shared[0].reshape(*shared[0].shape[:2], -1), shared[1])
        expert_ids = jnp.pad(expert_ids, ((0, 0), (0, 1)), constant_values=num_groups)
        weights = jnp.pad(weights, ((0, 0), (0, 1)), constant_values=1)
        num_groups += 1
    rows = _rows_per_tile(mean)
    plan = _plan(expert_ids, valid, num_groups=num_groups, tile_rows=rows)
    index, extra = jnp.asarray(layer, jnp.int32), shared or (None, None)
    hidden = matmul(x[_padded(plan.source)], gate_up, extra[0], index, plan.groups, swiglu=True, tile=Tile(rows, 128))
    out = matmul(hidden, down, extra[1], index, plan.groups, swiglu=False, tile=Tile(rows, 256))
    return combine(out, plan.place, weights, valid=valid).astype(x.dtype)


def _rows_per_tile(mean: float) -> int:
    """Rows of a tile by the mean number of an expert's rows: large enough that nearly every expert is one tile, read once.

    Measured on an H100 with LLaDA2-mini's experts at 32, 64, 256 and 1024 tokens (1, 2, 8 and 32 rows an expert).
    """
    return next((rows for most, rows in ((4, 16), (12, 32), (48, 64)) if mean <= most), 128)


def _plan(expert_ids: jax.Array, valid: jax.Array | None, *, num_groups: int, tile_rows: int) -> _Plan:
    """Sorts pairs by expert by counting: a pair's place is how many come before it. Few kernels, each over all pairs at once."""
    pairs, per_token = expert_ids.size, expert_ids.shape[1]
    if valid is not None:
        expert_ids = jnp.where(valid[:, None], expert_ids, num_groups)
    of, index = expert_ids.reshape(-1), jnp.arange(pairs, dtype=jnp.int32)
    groups = jnp.arange(num_groups, dtype=jnp.int32)
    token = np.arange(pairs, dtype=np.int32) // per_token
    if pairs <= _COMPARED_PAIRS:
        # Groups and pairs are counted for alike: behind the groups' starts come the pairs' places.
        key, own = jnp.concatenate([groups, of])[:, None], jnp.arange(num_groups + pairs, dtype=jnp.int32)[:, None] - num_groups
        same = of == key
        start, size = _counts((of < key) | (same & (index < own)), same)
        place = start[num_groups:]
        source = jnp.sum(jnp.where(place == index[:, None], token, 0), 1, dtype=jnp.int32)
    else:
        # Per token and group first: the sum over earlier tokens is a matmul, exact in float32. Pairs of invalid tokens are a group too.
        start, size = _counts(of < groups[:, None], of == groups[:, None])
        groups = jnp.arange(num_groups + 1)
        chosen = jnp.sum(expert_ids[..., None] == groups, 1, dtype=jnp.bfloat16)
        earlier = jnp.tril(jnp.ones((len(chosen), len(chosen)), jnp.bfloat16), -1)
        before = jnp.matmul(earlier, chosen, preferred_element_type=jnp.float32).astype(jnp.int32)
        begin = jnp.append(start, size[-1] + start[-1])
        place = begin[expert_ids] + jnp.take_along_axis(before, expert_ids, 1)
        place = jnp.where(expert_ids == num_groups, place + jnp.arange(per_token), place).reshape(-1)
        source = jnp.zeros_like(index).at[place].set(token, unique_indices=True, mode="promise_in_bounds")
    return _Plan(Groups.of(start, size, num_groups, tile_rows), source, place.reshape(expert_ids.shape))


def _counts(*where: jax.Array) -> tuple[jax.Array, ...]:
    """How many are true in each row; all in one pass."""
    ones, zeros = tuple(w.astype(jnp.int32) for w in where), (jnp.int32(0),) * len(where)
    return tuple(lax.reduce(ones, zeros, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), (1,)))


_STREAMED_ROWS = 1024
"""Up to this many rows a matmul is bound by its weights."""


def from_stack(x: jax.Array, stack: jax.Array, layer: jax.Array) -> jax.Array:
    """See ``linear``: a grouped matmul with one group."""
    axes = x.ndim - 2
    rows, depth, width = math.prod(x.shape[:2]), math.prod(x.shape[2:]), math.prod(stack.shape[1 + axes :])
    shape = (*x.shape[:2], *stack.shape[1 + axes :])
    if x.dtype != jnp.bfloat16 or stack.dtype != x.dtype or rows > _STREAMED_ROWS or depth % 64 or width % 64:
        return jnp.tensordot(x, stack[layer], axes)
    tile = min(128, max(8, 1 << (rows - 1).bit_length()))
    one = [jnp.array([n], jnp.int32) for n in (0, rows, -(-rows // tile))]
    flat, weights = _padded(x.reshape(rows, depth)), stack.reshape(len(stack), 1, depth, width)
    return matmul(flat, weights, None, layer, Groups(*one), swiglu=False, tile=Tile(tile, 64 if rows <= 512 else 128))[:rows].reshape(shape)


def _padded(rows: jax.Array) -> jax.Array:
    """``rows`` and as many zeros as make them a multiple of 8: what the kernels' tiles are made of."""
    return jnp.pad(rows, [(0, -len(rows) % 8)] + [(0, 0)] * (rows.ndim - 1)) if len(rows) % 8 else rows
