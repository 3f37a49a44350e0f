"""Norms of heads and their rotation with Mosaic GPU: one kernel, a warp a vector, which reads the scales in their stacks.

A vector is cut into pieces as wide as half of what is rotated. All have the same layout, so that an element and the one that it turns
with are in one thread, and nothing but the sum of squares goes from lane to lane.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.rotary import reference
from pallas_kernels.rotary.reference import HeadNorms


_WARPS, _LANES = 4, 32


def rotate(heads: jax.Array, table: tuple[jax.Array, jax.Array], norms: HeadNorms | None, bias: jax.Array | None) -> jax.Array:
    """See the package's ``rotate``. Without norms one kernel of XLA does it; other dtypes and widths are the reference's, too."""
    tokens, head, half = math.prod(heads.shape[1:3]), heads.shape[-1], table[0].shape[-1] // 2
    if norms is None or bias is not None or heads.dtype != jnp.bfloat16 or half % _LANES or head % half or tokens % _WARPS:
        return reference.rotate(heads, table, norms, bias)
    return _rotate(heads, table, norms[:3], eps=norms.eps)


@functools.partial(jax.jit, static_argnames="eps")  # traced, and made a kernel of, once for all its uses
def _rotate(
    heads: jax.Array, table: tuple[jax.Array, jax.Array], norms: tuple[jax.Array, jax.Array, jax.Array], *, eps: float
) -> jax.Array:
    parts, *rows, kv, packed, head = heads.shape
    tokens = math.prod(rows)
    kernel = plgpu.kernel(
        functools.partial(_body, group=packed - 2, head=head, eps=eps),
        out_type=jax.ShapeDtypeStruct((tokens, kv * packed * head), heads.dtype),
        grid=(tokens // _WARPS, kv * packed),
        grid_names=("tokens", "head"),
        kernel_name="rotate_heads",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    cos, sin = (t.reshape(tokens, -1) for t in table)
    queries, keys, layer = norms
    out = kernel(heads.reshape(parts, tokens, -1), cos, sin, queries, keys, layer.reshape(1))
    return out.reshape(heads.shape[1:])


def _body(heads: Any, cos: Any, sin: Any, queries: Any, keys: Any, layer: Any, out: Any, *, group: int, head: int, eps: float) -> None:
    half = cos.shape[1] // 2
    layout = plgpu.Layout.TILED(Tiling(((_WARPS, half), (half // _LANES,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    load: Any = plgpu.load  # JAX 0.10 types its index as required
    rows, number = pl.ds(lax.axis_index("tokens") * _WARPS, _WARPS), lax.axis_index("head")
    kind = lax.rem(number, jnp.int32(group + 2))

    def piece(j: int) -> Any:
        return pl.ds(number * head + j * half, half)

    def total(columns: Any) -> jax.Array:
        terms = [load(heads.at[part, rows, columns], layout=layout, optimized=False) for part in range(heads.shape[0])]
        if len(terms) == 1:
            return terms[0]
        return functools.reduce(jnp.add, [term.astype(jnp.float32) for term in terms]).astype(out.dtype)

    came = [total(piece(j)) for j in range(head // half)]

    def write(pieces: list[jax.Array]) -> None:
        for j, values in enumerate(pieces):
            out.at[rows, piece(j)][...] = values.astype(out.dtype)

    def normed_and_rotated(scales: Any) -> None:
        wide = [values.astype(jnp.float32) for values in came]
        square = functools.reduce(jnp.add, [(values * values).sum(1) for values in wide])
        inverse = lax.broadcast_in_dim(lax.rsqrt(square / head + eps), (_WARPS, half), (0,))
        turned = []
        for j, values in enumerate(wide):
            scale = load(scales.at[layer[0], pl.ds(j * half, half)], layout=layout.reduce(0), optimized=False).astype(jnp.float32)
            # Rounded where the reference rounds.
            values = (values * inverse).astype(out.dtype).astype(jnp.float32)
            values = (values * lax.broadcast_in_dim(scale, values.shape, (1,))).astype(out.dtype).astype(jnp.float32)
            turned.append(values)
        c, s = (load(t.at[rows, pl.ds(0, half)], layout=layout, optimized=False) for t in (cos, sin))
        first, second = turned[:2]
        write([first * c - second * s, second * c + first * s, *turned[2:]])

    pl.when(kind < group)(functools.partial(normed_and_rotated, queries))
    pl.when(kind == group)(functools.partial(normed_and_rotated, keys))
    pl.when(kind > group)(functools.partial(write, came))
