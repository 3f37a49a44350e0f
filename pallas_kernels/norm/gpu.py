"""Sum and norm with Mosaic GPU: one kernel, a block of four warps a row, which reads the scales in their stack.

Small as it is, it is there for what it saves: kernels of XLA that slice the scales out of the stack, add up the parts of a product and
add them to the residual stream.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.norm import reference
from pallas_kernels.norm.reference import Scales


_WARPS, _LANES = 4, 32
_NARROW = 2 * _WARPS * _LANES
"""Columns that the threads of a block hold at once, two each."""


def add_and_norm(x: jax.Array, parts: jax.Array | None, scales: Scales) -> tuple[jax.Array, jax.Array]:
    """See the package's ``add_and_norm``. Other dtypes and widths are the reference's."""
    if x.dtype != jnp.bfloat16 or x.shape[-1] % _NARROW:
        return reference.add_and_norm(x, parts, scales)
    return _add_and_norm(x, parts, scales.stack, scales.layer, eps=scales.eps)


@functools.partial(jax.jit, static_argnames="eps")  # traced, and made a kernel of, once for all its uses
def _add_and_norm(x: jax.Array, parts: jax.Array | None, stack: jax.Array, layer: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    row = jax.ShapeDtypeStruct((rows, width), x.dtype)
    kernel = plgpu.kernel(
        functools.partial(_body, added=parts is not None, eps=eps),
        out_type=[row] * (1 if parts is None else 2),
        grid=(rows,),
        grid_names=("row",),
        kernel_name="add_and_norm",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    flat = x.reshape(rows, width)
    if parts is None:
        return x, kernel(flat, stack, layer.reshape(1))[0].reshape(x.shape)
    total, normed = kernel(flat, parts.reshape(-1, rows, width), stack, layer.reshape(1))
    return total.reshape(x.shape), normed.reshape(x.shape)


def _body(x: Any, *refs: Any, added: bool, eps: float) -> None:
    (parts,), (stack, layer, *out) = (refs[:1], refs[1:]) if added else ((None,), refs)
    row, width = lax.axis_index("row"), x.shape[1]
    step = next(n for n in (8, 4, 2) if width % (n * _WARPS * _LANES) == 0)
    tiling = Tiling(((step * _WARPS * _LANES,), (step * _LANES,), (step,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    load: Any = plgpu.load  # JAX 0.10 types its index as required

    def wide(ref: Any) -> jax.Array:
        return load(ref, layout=layout, optimized=False).astype(jnp.float32)

    def rounded(values: jax.Array) -> jax.Array:
        """Rounded where the reference rounds."""
        return values.astype(x.dtype).astype(jnp.float32)

    total = wide(x.at[row])
    scale = wide(stack.at[layer[0]])
    if parts is not None:
        terms = [wide(parts.at[part, row]) for part in range(parts.shape[0])]
        total = rounded(total + (terms[0] if len(terms) == 1 else rounded(functools.reduce(jnp.add, terms))))
        out[0].at[row][...] = total.astype(x.dtype)
    inverse = lax.rsqrt((total * total).sum() / width + eps)
    out[-1].at[row][...] = (rounded(total * inverse) * scale).astype(x.dtype)
