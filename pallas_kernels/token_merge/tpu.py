"""Token merge on TPU: rows of the embedding table fetched by DMA, mixed, renormalised and selected in one pass.

A row of a tiled table cannot be fetched alone: what travels is the aligned group of rows that holds it, and the row is picked out in
VMEM. Rows that a position does not need (its candidates if it is hard, its token if it is a mix of others) are not fetched.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.token_merge.reference import MergeSpec


_GROUP = 16  # rows that travel together: a whole tile of 16-bit elements, two of 32-bit ones
_BUFFER_BYTES = 2 << 20  # rows of a tile of positions, in VMEM; two are in flight


def merge(
    table: jax.Array,
    tokens: jax.Array,
    *,
    mask_id: int,
    ids: jax.Array,
    probs: jax.Array,
    soft: jax.Array,
    spec: MergeSpec,
    positions: int = 32,
    interpret: Any = False,
) -> jax.Array:
    """See the package's ``merge``; at most ``positions`` are worked on together."""
    vocab, embed = table.shape
    count, candidates = tokens.size, ids.shape[-1]
    # The first row of a position is its token's, unless it is a mix of others alone. No row: -1.
    mixed = spec.mode == "dmax_topk"
    first, others = (jnp.where(soft, ids[..., 0], tokens), ids[..., 1:]) if mixed else (tokens, ids)
    rows = jnp.clip(jnp.concatenate([first[..., None], others], -1), 0, vocab - 1)
    rows = jnp.where(soft[..., None] | (jnp.arange(rows.shape[-1]) == 0), rows, -1)
    wanted = rows.shape[-1]
    fit = _BUFFER_BYTES // (wanted * _GROUP * embed * table.dtype.itemsize)
    height = min(max(8, fit // 8 * 8), positions, count)
    tiles = pl.cdiv(count, height)
    rows = jnp.pad(rows.reshape(count, wanted), ((0, tiles * height - count), (0, 0)), constant_values=-1)
    # Rows after the last whole group are a small table of their own.
    whole = vocab // _GROUP * _GROUP
    tail = jnp.pad(table[whole:], ((0, _GROUP - (vocab - whole)), (0, 0)))

    def per_position(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((height, width), lambda i, *_: (i, 0))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        functools.partial(_kernel, wanted=wanted, whole=whole, tiles=tiles, spec=spec),
        out_shape=jax.ShapeDtypeStruct((count, embed), table.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles,),
            in_specs=[per_position(candidates), per_position(1), pl.BlockSpec((1, embed), lambda i, *_: (0, 0)), anywhere, anywhere],
            out_specs=per_position(embed),
            scratch_shapes=[
                pltpu.VMEM((2, height * wanted, _GROUP, embed), table.dtype),
                pltpu.VMEM((wanted, height, embed), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=6 * count * wanted * embed,
            bytes_accessed=count * (wanted * _GROUP + 1) * embed * table.dtype.itemsize,
            transcendentals=count * (wanted + 1),
        ),
        name="token_merge",
        interpret=interpret,
    )(
        rows.reshape(-1),
        probs.reshape(count, candidates),
        soft.reshape(count, 1).astype(jnp.int32),
        table[mask_id : mask_id + 1],
        table,
        tail,
    )
    return out.reshape(*tokens.shape, embed)


def _kernel(
    rows: Any,
    probs_ref: Any,
    soft_ref: Any,
    mask_ref: Any,
    table: Any,
    tail: Any,
    out_ref: Any,
    groups: Any,
    picked: Any,
    arrived: Any,
    *,
    wanted: int,
    whole: int,
    tiles: int,
    spec: MergeSpec,
) -> None:
    i, each = pl.program_id(0), groups.shape[1]

    def copies(tile: Any, act: Any) -> None:
        """Starts, or waits for, the groups of a tile of positions."""
        slot = lax.rem(tile, 2)

        def one(n: jax.Array, _: None) -> None:
            row, to = rows[tile * each + n], groups.at[slot, n]

            @pl.when((row >= 0) & (row < whole))
            def _from_table() -> None:
                start = pl.multiple_of(row // _GROUP * _GROUP, _GROUP)
                act(pltpu.make_async_copy(table.at[pl.ds(start, _GROUP)], to, arrived.at[slot]))

            @pl.when(row >= whole)
            def _from_tail() -> None:
                act(pltpu.make_async_copy(tail, to, arrived.at[slot]))

        lax.fori_loop(0, each, one, None)

    @pl.when(i == 0)
    def _first() -> None:
        copies(i, lambda copy: copy.start())

    @pl.when(i + 1 < tiles)
    def _next() -> None:
        copies(i + 1, lambda copy: copy.start())

    copies(i, lambda copy: copy.wait())
    at = lax.broadcasted_iota(jnp.int32, (_GROUP, groups.shape[3]), 0)

    def pick(position: jax.Array, _: None) -> None:
        for j in range(wanted):
            n = position * wanted + j
            row = rows[i * each + n]
            here = (at == lax.rem(row, _GROUP)) & (row >= 0)
            group = groups[lax.rem(i, 2), n].astype(jnp.float32)
            picked[j, pl.ds(position, 1)] = jnp.sum(jnp.where(here, group, 0.0), 0, keepdims=True)

    lax.fori_loop(0, picked.shape[1], pick, None)
    out_ref[...] = _mix(picked, probs_ref[...], soft_ref[...] != 0, mask_ref[...].astype(jnp.float32), spec).astype(out_ref.dtype)


def _mix(picked: Any, probs: jax.Array, soft: jax.Array, mask: jax.Array, spec: MergeSpec) -> jax.Array:
    first = 0 if spec.mode == "dmax_topk" else 1
    mix = jnp.zeros(picked.shape[1:], jnp.float32)
    norm = rest = jnp.zeros((picked.shape[1], 1), jnp.float32)
    for j in range(probs.shape[1]):
        candidate, share = picked[first + j], probs[:, j : j + 1]
        mix, rest, norm = mix + share * candidate, rest + share, norm + share * _length(candidate)
    if spec.mode == "iter_smooth_topk":
        mix = picked[0] + spec.weight * mix
    else:
        rest = jnp.maximum(0.0, 1.0 - rest)
        mix = mix + rest * mask
        if spec.renormalize:
            mix = mix * ((norm + rest * _length(mask)) / (_length(mix) + 1e-6))
    return jnp.where(soft, mix, picked[0])


def _length(rows: jax.Array) -> jax.Array:
    """``[n, 1]``: the norm of each of ``rows [n, D]``."""
    return jnp.sqrt(jnp.sum(rows * rows, 1, keepdims=True))
