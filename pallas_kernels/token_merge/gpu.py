"""DMax's token merge in one launch on Hopper GPUs (Mosaic GPU): a thread block gathers, mixes and writes one position."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.token_merge import reference
from pallas_kernels.token_merge.reference import MergeSpec


def _body(table: Any, tokens: Any, ids: Any, probs: Any, soft: Any, out: Any, *, mask_id: int, spec: MergeSpec) -> None:
    from jax.experimental import pallas as pl

    row = lax.axis_index("row")

    def length(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(x * x))

    @pl.when(~soft[row])
    def _() -> None:
        out[row] = table[tokens[row]]

    # Candidates of hard positions mean nothing and are not read.
    @pl.when(soft[row])
    def _() -> None:
        embeddings = [table[token].astype(jnp.float32) for token in (*(ids[row, j] for j in range(spec.top_k)), mask_id)]
        weights = [probs[row, j] for j in range(spec.top_k)]
        weights.append(jnp.maximum(1 - sum(weights), 0))
        mix = sum(w * e for w, e in zip(weights, embeddings, strict=True))
        if spec.renormalize:
            norm = sum(w * length(e) for w, e in zip(weights, embeddings, strict=True))
            mix = mix * (norm / (length(mix) + 1e-6))
        out[row] = mix.astype(out.dtype)


def merge(
    table: jax.Array, tokens: jax.Array, *, mask_id: int, ids: jax.Array, probs: jax.Array, soft: jax.Array, spec: MergeSpec, **debug: Any
) -> jax.Array:
    """See the package's ``merge``.

    Mode ``iter_smooth_topk``, which XLA computes in one launch by itself, and embeddings whose size 128 does not divide take the reference.
    """
    rows, width = tokens.size, table.shape[1]
    if spec.mode != "dmax_topk" or width % 128:
        return reference.merge(table, tokens, mask_id=mask_id, ids=ids, probs=probs, soft=soft, spec=spec)
    from jax.experimental.pallas import mosaic_gpu as plgpu

    kernel = plgpu.kernel(
        functools.partial(_body, mask_id=mask_id, spec=spec),
        out_type=jax.ShapeDtypeStruct((rows, width), table.dtype),
        grid=(rows,),
        grid_names=("row",),
        kernel_name="token_merge",
        **debug,
    )
    flat = tokens.reshape(rows), ids.reshape(rows, spec.top_k), probs.reshape(rows, spec.top_k), soft.reshape(rows)
    return kernel(table, *flat).reshape(*tokens.shape, width)
