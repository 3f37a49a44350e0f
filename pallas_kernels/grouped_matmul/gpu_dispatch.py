"""Where each token's row lies among those of its experts, and the copy that puts it there, with Mosaic GPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@functools.partial(jax.jit, static_argnames=("count", "shared"))  # traced once for all its uses
def dispatch(
    x: jax.Array, ids: jax.Array, nth: jax.Array, start: jax.Array, valid: jax.Array | None, *, count: int, shared: bool
) -> tuple[jax.Array, jax.Array]:
    """Copies each token's row to the rows of its experts, a thread block a token.

    Args:
      x: ``[T, D]``, D a multiple of 128.
      ids, nth: ``[T, k]`` int32, the experts of each token, and which of an expert's rows are its.
      start: ``[G]`` int32, the first row of each expert; of the shared one last.
      valid: ``[T]`` bool; others are not copied.
      count: M, rows there is room for.
      shared: whether all tokens go to one more expert.

    Returns:
      ``(rows [M, D], place [T, k] int32)``: the rows by expert, of which those of no token are not written, and the row of each pair; with
      a column more for the shared expert, and 0 for tokens that are not valid.
    """
    tokens, width = x.shape
    top_k = ids.shape[1]

    def body(x_g: Any, ids_g: Any, nth_g: Any, start_g: Any, valid_g: Any, rows_g: Any, place_g: Any) -> None:
        token = lax.axis_index("token")
        row, valid = x_g[token], valid_g[token]
        for j in range(top_k + shared):
            at = start_g[ids_g[token, j]] + nth_g[token, j] if j < top_k else start_g[len(start) - 1] + token
            place_g[token, j] = jnp.where(valid, at, 0)

            @pl.when(valid)
            def copy(at: jax.Array = at) -> None:
                rows_g[at] = row

    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((count, width), x.dtype),
            jax.ShapeDtypeStruct((tokens, top_k + shared), jnp.int32),
        ],
        grid=(tokens,),
        grid_names=("token",),
        kernel_name="dispatch_rows",
    )
    rows, place = kernel(x, ids, nth, start, jnp.ones(tokens, bool) if valid is None else valid)
    return rows, place
