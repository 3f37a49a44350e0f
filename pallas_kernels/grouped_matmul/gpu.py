"""The experts on a Hopper GPU: routing by counting, then two grouped matmuls that stream each wanted expert once.

With a few tokens an expert, a layer costs what reading its experts costs, so everything here serves that one stream. The tokens'
rows, sorted by expert, are the narrow operand of the tensor cores and the weights the wide one (a tile of 64 output columns by as
few as 16 rows), one warpgroup copies tiles from memory while the others multiply, and blocks go on from tile to tile without a
pause. SwiGLU happens before the first product leaves the registers. A shared expert, if there is one, is one more group that
every token belongs to.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.gpu_dispatch import dispatch
from pallas_kernels.grouped_matmul.gpu_kernel import Groups, Tile, fits, matmul
from pallas_kernels.grouped_matmul.reference import add_shared
from pallas_kernels.grouped_matmul.routing import combine, held_here
from pallas_kernels.grouped_matmul.stacks import Stack, is_quantised
from pallas_kernels.grouped_matmul.xla import ragged
from pallas_kernels.quantised import Quantised
from pallas_kernels.quantised.words import Packed


COMPARED_PAIRS = 4096
"""Up to this many (token, expert) pairs, comparing all with all is the quickest way to sort them."""


def hopper(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: Stack,
    down: Stack,
    *,
    layer: ArrayLike | None = None,
    valid: jax.Array | None = None,
    first_expert: ArrayLike | None = None,
    shared: tuple[jax.Array, jax.Array] | None = None,
    counted: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """See ``expert_mlp``. For bfloat16 and widths that tiles of 64 divide, or weights packed for it; else by ``lax.ragged_dot``."""
    streams = x.dtype == jnp.bfloat16 and _streams(gate_up, down)
    alike = shared is None or (not is_quantised(down) and shared[1].shape[-2] == down.shape[-2])
    if not (streams and alike):
        routed = (hopper if streams else ragged)(x, expert_ids, weights, gate_up, down, layer=layer, valid=valid, first_expert=first_expert)
        return add_shared(routed, x, shared, layer=layer, valid=valid)
    if layer is None:
        layer, (gate_up, down, shared) = 0, jax.tree.map(lambda a: a[None], (gate_up, down, shared))
    num_groups, mean, along = gate_up.shape[1], expert_ids.size / gate_up.shape[1], int(shared is not None)
    if shared is not None:
        shared = (shared[0].reshape(*shared[0].shape[:2], -1), shared[1])
    tile, held = _rows_per_tile(mean), None
    if first_expert is not None:
        expert_ids, held = held_here(expert_ids, first_expert, num_groups)
    place_rows = _sorted_by_comparing if expert_ids.size <= COMPARED_PAIRS else functools.partial(_sorted_by_counting, counted=counted)
    rows, place, groups = place_rows(x, expert_ids, valid, held=held, num_groups=num_groups, along=along, tile_rows=tile)
    index, extra = jnp.asarray(layer, jnp.int32), shared or (None, None)
    hidden = matmul(rows, gate_up, extra[0], index, groups, swiglu=True, tile=Tile(tile, 128))
    out = matmul(hidden, down, extra[1], index, groups, swiglu=False, tile=Tile(tile, 256))
    return combine(out, place, weights, valid=valid, held=held).astype(x.dtype)


def _streams(gate_up: Stack, down: Stack) -> bool:
    """Whether the kernels read such stacks."""
    if isinstance(gate_up, (Quantised, Packed)) or isinstance(down, (Quantised, Packed)):
        return isinstance(gate_up, Packed) and isinstance(down, Packed)
    return gate_up.dtype == down.dtype == jnp.bfloat16 and fits(gate_up.shape[-2:], down.shape[-2:])


def _rows_per_tile(mean: float) -> int:
    """Rows of a tile by the mean number of an expert's rows: large enough that nearly every expert is one tile, read once.

    Measured on an H100 with LLaDA2-mini's experts at 32, 64, 256 and 1024 tokens (1, 2, 8 and 32 rows an expert).
    """
    return next((rows for most, rows in ((4, 16), (12, 32), (48, 64)) if mean <= most), 128)


Sorted = tuple[jax.Array, jax.Array, Groups]
"""Rows sorted by group, the row of each pair ``[T, k]`` (``[T, k + 1]`` with a shared expert), and the groups."""


def _sorted_by_comparing(
    x: jax.Array,
    expert_ids: jax.Array,
    valid: jax.Array | None,
    *,
    held: jax.Array | None = None,
    num_groups: int,
    along: int,
    tile_rows: int,
) -> Sorted:
    """A pair's place is how many come before it. Few kernels, each over all pairs at once."""
    if held is not None:
        expert_ids = jnp.where(held, expert_ids, num_groups + along)  # behind the shared expert
    expert_ids = jnp.pad(expert_ids, ((0, 0), (0, along)), constant_values=num_groups)  # of a shared expert every token is sure
    num_groups += along
    if valid is not None:
        expert_ids = jnp.where(valid[:, None], expert_ids, num_groups)
    pairs, of = expert_ids.size, expert_ids.reshape(-1)
    index, token = jnp.arange(pairs, dtype=jnp.int32), np.arange(pairs, dtype=np.int32) // expert_ids.shape[1]
    # Groups and pairs are counted for alike: behind the groups' starts come the pairs' places.
    key, own = jnp.append(jnp.arange(num_groups), of)[:, None], jnp.arange(num_groups + pairs)[:, None] - num_groups
    same = of == key
    start, size = _counts((of < key) | (same & (index < own)), same)
    place = start[num_groups:]
    source = jnp.sum(jnp.where(place == index[:, None], token, 0), 1, dtype=jnp.int32)
    return x[padded(source)], place.reshape(expert_ids.shape), Groups.of(start, size, num_groups, tile_rows)


def _sorted_by_counting(
    x: jax.Array,
    expert_ids: jax.Array,
    valid: jax.Array | None,
    *,
    held: jax.Array | None = None,
    num_groups: int,
    along: int,
    tile_rows: int,
    counted: tuple[jax.Array, jax.Array] | None,
) -> Sorted:
    """Experts one after the other, the tokens of each in their order, behind them all tokens for a shared expert. Of experts that are
    not ``held``, the rows go to one behind all others, which nobody reads."""
    nth, size = counted if counted and held is None else _count(expert_ids, valid, num_groups)
    size = jnp.append(size, jnp.full(along, len(x)))
    group = jnp.arange(len(size))
    start = jnp.sum(jnp.where(group < group[:, None], size, 0), 1, dtype=jnp.int32)
    ids, starts, room = expert_ids, start, expert_ids.size + along * len(x)
    if held is not None:
        ids, nth, room = jnp.where(held, ids, len(size)), jnp.where(held, nth, 0), room + 1
        starts = jnp.concatenate([start, size.sum(dtype=jnp.int32)[None], start[num_groups:]])  # the shared expert's stays the last
    rows, place = dispatch(x, ids, nth, starts, valid, count=-(-room // 8) * 8, shared=bool(along))
    return rows, place, Groups.of(start, size, len(size), tile_rows)


def _count(expert_ids: jax.Array, valid: jax.Array | None, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """``Counted`` of experts chosen elsewhere."""
    chosen = (expert_ids[..., None] == jnp.arange(num_experts)).any(1)
    upto = jnp.cumsum(chosen if valid is None else chosen & valid[:, None], 0, dtype=jnp.int32)
    return jnp.take_along_axis(upto, expert_ids, 1, mode="clip") - 1, upto[-1]


def _counts(*where: jax.Array) -> tuple[jax.Array, ...]:
    """How many are true in each row; all in one pass."""
    ones, zeros = tuple(w.astype(jnp.int32) for w in where), (jnp.int32(0),) * len(where)
    return tuple(lax.reduce(ones, zeros, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), (1,)))


def padded(rows: jax.Array) -> jax.Array:
    """``rows`` and as many zeros as make them a multiple of 8: what the kernels' tiles are made of."""
    return jnp.pad(rows, [(0, -len(rows) % 8)] + [(0, 0)] * (rows.ndim - 1)) if len(rows) % 8 else rows
