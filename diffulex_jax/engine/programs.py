"""The programs an engine compiles, for the current mesh: :mod:`diffulex_jax.decode` on every device, each with its own part.

Slots and pages are split over the mesh axis ``data``: the pages of a slot must be those of its devices, that is, the pages
``[d N / n, (d + 1) N / n)`` for the slots ``[d S / n, (d + 1) S / n)``, where n devices share them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, PartitionSpec

from diffulex_jax import decode
from diffulex_jax.decode import likelihood
from diffulex_jax.decode.likelihood import Canvases
from diffulex_jax.models.adapted import ADAPTERS, Factors, for_rows, with_axes, without
from diffulex_jax.models.base import Model, Params, is_param
from diffulex_jax.parallel.mesh import first_index, sharding, spec, spread
from diffulex_jax.state import POOL_AXES, STATE_AXES, DecodeState, KVPool, StepReport, Trace
from diffulex_jax.weights import quantise
from pallas_kernels.block_attention import Scaled


def denoise(
    program: decode.Program,
    params: Params,
    pool: KVPool,
    state: DecodeState,
    *,
    page_table: jax.Array,
    known: jax.Array,
    steps: int,
    max_steps: jax.Array,
    stop_on_finish: jax.Array,
    adapter: jax.Array | None = None,
) -> tuple[KVPool, DecodeState, StepReport, Trace]:
    """See ``decode.denoise``. All devices make the same number of steps.

    ``adapter`` ``[S]`` int32 is that of each slot, from 1 on in the order in which ``params`` holds them; 0, or None for all: none.
    Of each device's slots the first take part, as many as it has rows in ``page_table`` and ``known``, and the report and the trace are of
    those; in the others nothing may be live.
    """

    def local(params: Any, pool: KVPool, state: Any, page_table: jax.Array, known: Any, adapter: Any, max_steps: Any, stop: Any) -> Any:
        pool, rows, report, trace = decode.denoise(
            _of_rows(program, len(known)),
            for_rows(params, adapter),
            pool,
            _first_rows(state, len(known)),
            page_table=own_pages(page_table, pool),
            known=known,
            steps=steps,
            max_steps=max_steps,
            stop_on_finish=stop,
        )
        return pool, _with_first_rows(state, rows), report, trace

    slots, pages, every = spec(*STATE_AXES), spec(*POOL_AXES), PartitionSpec()
    run = spread(
        local,
        (param_specs(program.model, params), pages, slots, slots, slots, slots, every, every),
        (pages, slots, slots, spec(None, *STATE_AXES)),
    )
    return run(params, pool, state, page_table, known, adapter, max_steps, stop_on_finish)


def mixed_step(
    program: decode.Program,
    params: Params,
    pool: KVPool,
    state: DecodeState,
    *,
    page_table: jax.Array,
    known: jax.Array,
    prompts: decode.Prompts,
) -> tuple[KVPool, DecodeState, StepReport]:
    """See ``decode.mixed_step``; slots are split as for :func:`denoise`, prompts as for :func:`prefill`. There are no adapters."""

    def local(params: Any, pool: KVPool, state: Any, page_table: jax.Array, known: Any, prompts: decode.Prompts) -> Any:
        count, own = len(page_table), prompts._replace(page_table=own_pages(prompts.page_table, pool))
        here, rows, table = _of_rows(program, count), _first_rows(state, count), own_pages(page_table, pool)
        pool, rows, report = decode.mixed_step(here, params, pool, rows, page_table=table, known=known, prompts=own)
        return pool, _with_first_rows(state, rows), report

    slots, pages = spec(*STATE_AXES), spec(*POOL_AXES)
    run = spread(local, (param_specs(program.model, params), pages, *[slots] * 4), (pages, slots, slots))
    return run(params, pool, state, page_table, known, prompts)


def _of_rows(program: decode.Program, count: int) -> decode.Program:
    """``program`` for so many slots."""
    return program._replace(dims=dataclasses.replace(program.dims, slots=count))


def _first_rows(state: DecodeState, count: int) -> DecodeState:
    return jax.tree.map(lambda a: a[:count], state)


def _with_first_rows(state: DecodeState, rows: DecodeState) -> DecodeState:
    """``state`` with its first rows replaced. Not by ``at[:n].set``, which passes indices without elements: see :func:`spread`."""
    return jax.tree.map(lambda a, new: lax.dynamic_update_slice_in_dim(a, new, 0, 0) if a.size else a, state, rows)


def prefill(
    program: decode.Program, params: Params, pool: KVPool, prompts: decode.Prompts, adapter: jax.Array | None = None
) -> tuple[KVPool, jax.Array]:
    """See ``decode.prefill``. Devices compute the rows of their own slots: those that share slots have their equal part of the rows, in
    order. ``adapter`` ``[R]`` is that of each row, as for :func:`denoise`."""

    def local(params: Any, pool: KVPool, prompts: decode.Prompts, adapter: Any) -> Any:
        own = prompts._replace(page_table=own_pages(prompts.page_table, pool))
        return decode.prefill(program, for_rows(params, adapter), pool, own)

    pages, slots = spec(*POOL_AXES), spec(*STATE_AXES)
    run = spread(local, (param_specs(program.model, params), pages, slots, slots), (pages, slots))
    return run(params, pool, prompts, adapter)


def log_probs(program: decode.Program, params: Params, canvases: Canvases, adapter: jax.Array | None = None) -> jax.Array:
    """See ``likelihood.log_probs``. Devices compute the rows of their data shard. ``adapter`` ``[R]`` is that of each row, as for
    :func:`denoise`."""

    def local(params: Any, canvases: Canvases, adapter: Any) -> jax.Array:
        return likelihood.log_probs(program, for_rows(params, adapter), canvases)

    slots = spec(*STATE_AXES)
    return spread(local, (param_specs(program.model, params), slots, slots), slots)(params, canvases, adapter)


def pool_placement(mesh: Mesh, program: decode.Program) -> KVPool:
    """Where the pool is, and in which order where the kernels ask for one, so that they read and write it where it lies."""
    where, order = sharding(mesh, POOL_AXES), program.kernels.pool_order
    scales: Any = where
    vectors: Any = where if order is None else Format(Layout(major_to_minor=order), where)
    one: Any = Scaled(vectors, scales) if program.kv == "int8" else vectors
    return KVPool(one, one)


def param_specs(model: Model, params: Params | None = None) -> Any:
    """How the parameters are split, as a tree of their structure, adapters included where ``params`` hold some, and quantised ones as they
    are there."""
    if params is None:
        return jax.tree.map(lambda param: spec(*param.axes), model.schema, is_leaf=is_param)
    specs = jax.tree.map(quantise.specs, model.schema, without(params), is_leaf=is_param)
    if ADAPTERS not in params:
        return specs
    split = with_axes(lambda _, axes: Factors(spec(*axes.a), spec(*axes.b)), model.schema, params[ADAPTERS])
    return specs | {ADAPTERS: split}


def own_pages(pages: jax.Array, pool: KVPool) -> jax.Array:
    """Pages of the whole pool as pages of this device's part; those of other devices become one past it, which is none."""
    count = pool.k.shape[1]
    at = pages - first_index("page", count)
    return jnp.where((at >= 0) & (at < count), at, count)
