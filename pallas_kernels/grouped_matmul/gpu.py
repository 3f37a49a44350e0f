"""The experts on a Hopper GPU: routing by counting, then two grouped matmuls that stream each wanted expert once.

With a few tokens an expert, a layer costs what reading its experts costs, so everything here serves that one stream. The tokens'
rows, expert by expert, are the narrow operand of the tensor cores and the weights the wide one (a tile of 64 output columns by as
few as 16 rows), one warpgroup copies tiles of weights and fetches rows by their numbers while the others multiply, and blocks go on
from tile to tile without a pause. SwiGLU happens before the first product leaves the registers. A shared expert, if there is one, is
one more group that every token belongs to.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.gpu_kernel import Tile, fits, matmul
from pallas_kernels.grouped_matmul.gpu_places import place_rows
from pallas_kernels.grouped_matmul.reference import add_shared
from pallas_kernels.grouped_matmul.routing import combine, held_here
from pallas_kernels.grouped_matmul.stacks import Stack, is_quantised
from pallas_kernels.grouped_matmul.xla import ragged
from pallas_kernels.quantised import Quantised
from pallas_kernels.quantised.words import Packed


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
) -> jax.Array:
    """See ``expert_mlp``. For bfloat16 and widths that tiles of 64 divide, or weights packed for it; else by ``lax.ragged_dot``."""
    streams = x.dtype == jnp.bfloat16 and _streams(gate_up, down)
    alike = shared is None or (not is_quantised(down) and shared[1].shape[-2] == down.shape[-2])
    if not (streams and alike):
        routed = (hopper if streams else ragged)(x, expert_ids, weights, gate_up, down, layer=layer, valid=valid, first_expert=first_expert)
        return add_shared(routed, x, shared, layer=layer, valid=valid)
    if layer is None:
        layer, (gate_up, down, shared) = 0, jax.tree.map(lambda a: a[None], (gate_up, down, shared))
    num_groups, mean, along = gate_up.shape[1], expert_ids.size / gate_up.shape[1], shared is not None
    if shared is not None:
        shared = (shared[0].reshape(*shared[0].shape[:2], -1), shared[1])
    tile, held = _rows_per_tile(mean), None
    if first_expert is not None:
        expert_ids, held = held_here(expert_ids, first_expert, num_groups)
        expert_ids = jnp.where(held, expert_ids, -1)  # ``num_groups`` is the shared expert's
    placed, groups = place_rows(expert_ids, valid, groups=num_groups, shared=along, tile_rows=tile)
    index, extra = jnp.asarray(layer, jnp.int32), shared or (None, None)
    hidden = matmul(x, gate_up, extra[0], index, groups, swiglu=True, tile=Tile(tile, 128), numbers=placed.token)
    out = matmul(hidden, down, extra[1], index, groups, swiglu=False, tile=Tile(tile, 256))
    return combine(out, placed.row, weights, valid=valid, held=held).astype(x.dtype)


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


def padded(rows: jax.Array) -> jax.Array:
    """``rows`` and as many zeros as make them a multiple of 8: what the kernels' tiles are made of."""
    return jnp.pad(rows, [(0, -len(rows) % 8)] + [(0, 0)] * (rows.ndim - 1)) if len(rows) % 8 else rows
