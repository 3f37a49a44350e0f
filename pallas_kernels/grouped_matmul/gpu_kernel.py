"""Grouped matmul with Mosaic GPU: rows sorted by group times each group's weights, on Hopper's tensor cores."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu_fetch import choose, fetch, settle
from pallas_kernels.grouped_matmul.gpu_weights import UNIT, At, staged, tiles, words
from pallas_kernels.quantised.words import Packed


ALIGN = 8
"""Tiles start at multiples of this many rows; what belongs to a neighbouring group there is computed and not stored."""

_SHARED_MEMORY = 224 * 1024
"""Bytes of shared memory for tiles, of the 227 KiB a block may have; barriers need the rest."""

_STAGES = 12
"""Steps in flight at the most."""


class Tile(NamedTuple):
    """``rows x columns`` of a product computed by one block at a time."""

    rows: int
    columns: int


class Groups(NamedTuple):
    """Which rows belong to which group; a group's rows follow each other.

    Attributes:
      start, size: ``[G]`` int32, the rows of a group are ``[start, start + size)``.
      upto: ``[G]`` int32, how many tiles of rows this group and those before it have.
    """

    start: jax.Array
    size: jax.Array
    upto: jax.Array


def fits(*matrices: tuple[int, ...]) -> bool:
    """Whether weights of these ``(depth, width)`` can be tiled. SwiGLU halves the first width; 128 threads copy rows of that depth."""
    (depth, width), (depth2, width2) = matrices
    return depth % (2 * UNIT) == 0 and width % (2 * UNIT) == 0 and depth2 % UNIT == 0 and width2 % UNIT == 0


def num_multiprocessors() -> int:
    """Of the GPU the program is compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return int(device.num_cores if device is not None and device.num_cores else getattr(jax.devices()[0], "core_count", 132))


@functools.partial(jax.jit, static_argnames=("swiglu", "tile"))  # traced once for all its uses
def matmul(
    x: jax.Array,
    weights: jax.Array | Packed,
    extra: jax.Array | None,
    layer: jax.Array,
    groups: Groups | None,
    *,
    swiglu: bool,
    tile: Tile,
    numbers: jax.Array | None = None,
) -> jax.Array:
    """Each group's rows times its weights, in bfloat16 with float32 sums; or all rows, a part of their depth with each group's weights.

    Args:
      x: ``[M, K]``, M a multiple of 8; ``[M, G * K]`` where the groups are parts of the depth.
      weights: ``[L, G, K, N]``, bfloat16 or quantised.
      extra: ``[L, K, N]``, weights of one more group behind the G; or None, and always None where they are quantised.
      layer: int32 scalar, which of the L.
      groups: of G groups, or G + 1 with ``extra``; None where they are parts of the depth.
      swiglu: gate columns come first, then as many up columns; the result is ``silu(gate) * up``.
      tile: columns are cut down to what divides the result's width.
      numbers: ``[M]`` int32, M a multiple of 8, with ``groups``: row m is ``x[numbers[m]]``, and x ``[T, K]`` has any number of rows.

    Returns:
      ``[M, N]``, or ``[M, N / 2]`` with ``swiglu``, where rows of no group are not written; ``[G * M, N]`` of parts of the depth, to be
      added up.
    """
    size, parts = x.shape[0] if numbers is None else len(numbers), 2 if swiglu else 1
    num_groups, depth = (weights.shape[1], x.shape[1] // weights.shape[1]) if groups is None else (len(groups.upto), x.shape[1])
    width = weights.shape[-1] // parts
    rows, columns = tile.rows, next(c for c in (256, 128, 64) if c <= tile.columns and width % c == 0)
    if isinstance(weights, Packed):
        stream = words(weights, parts=parts, columns=columns)
    else:
        stream = tiles(weights, extra, parts=parts, columns=columns, groups=num_groups)
    workers, across, steps = columns // UNIT, width // columns, depth // stream.step
    stages = min((_SHARED_MEMORY - 2 * rows * columns) // (stream.step_bytes + 2 * stream.step * rows), _STAGES)
    blocks = num_multiprocessors()
    of_groups = len(groups or ())
    fetched = of_groups + (numbers is not None)
    search = [1 << bit for bit in reversed(range((num_groups - 1).bit_length()))]

    def body(x_g: Any, layer_g: Any, *refs: Any, **scratch: Any) -> None:
        groups_g, numbers_g, arrays_g, out_g = refs[:of_groups], refs[of_groups:fetched], refs[fetched:-1], refs[-1]
        x_s, out_s, full, free = (scratch.pop(name) for name in ("x_s", "out_s", "full", "free"))
        worker, block, layer = lax.axis_index("worker"), lax.axis_index("block"), layer_g[0]
        of_rows = num_groups * -(-size // rows) if groups is None else groups_g[2][num_groups - 1]
        tiles = lax.div(of_rows * across - block + blocks - 1, blocks)

        def locate(i: jax.Array) -> tuple[jax.Array, ...]:
            """Tile i of this block: its group, first column, first row, and which of its rows are the group's."""
            at = block + i * blocks
            nth, column = lax.div(at, across), lax.rem(at, across) * columns
            if extra is not None:  # first what all tokens belong to: it is one matrix for many tiles, and no memory is waited for
                nth = lax.rem(nth + groups_g[2][num_groups - 2], of_rows)
            if groups is None:
                group, of_group = lax.div(nth, -(-size // rows)), lax.rem(nth, -(-size // rows)) * rows
                first = pl.multiple_of(group * size + of_group, ALIGN)
                begin = lax.rem(at, 1)  # 0; JAX 0.11 does not lower a slice that begins at a constant of this kind
                return group, column, first, begin, jnp.minimum(rows, size - of_group)
            start_g, size_g, upto_g = groups_g
            group = jnp.int32(0)
            for stride in search:
                probe = group + stride
                group = jnp.where(upto_g[jnp.minimum(probe, num_groups) - 1] <= nth, probe, group)
            start, count = start_g[group], size_g[group]
            aligned = lax.div(start, ALIGN) * ALIGN
            own = lax.div(start + count - aligned + rows - 1, rows)
            first = aligned + (nth - upto_g[group] + own) * rows
            begin, end = jnp.maximum(first, start), jnp.minimum(first + rows, start + count)
            return group, column, pl.multiple_of(first, ALIGN), begin - first, end - begin

        @pl.when(worker == workers)
        def copy() -> None:
            def one_tile(i: jax.Array, step: jax.Array) -> jax.Array:
                group, column, first, begin, wanted = locate(i)
                if numbers is not None:
                    chosen = choose(numbers_g[0], first, begin, begin + wanted, rows=rows, step=stream.step)

                def one_step(k: jax.Array, step: jax.Array) -> jax.Array:
                    slot = lax.rem(step, stages)
                    from_row, depths = first, pl.ds(k * stream.step, stream.step)
                    if groups is None:
                        from_row = pl.multiple_of(first - group * size, ALIGN)
                        depths = pl.ds(group * depth + k * stream.step, stream.step)
                    pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    stream.copy(arrays_g, scratch, At(layer, group, column, k), slot, full)

                    def copy_rows(count: int) -> None:
                        """Copies as few rows as hold all of the group's."""

                        def now() -> None:
                            plgpu.copy_gmem_to_smem(x_g.at[pl.ds(from_row, count), depths], x_s.at[slot, pl.ds(0, count)], full.at[slot])

                        now() if count == rows else lax.cond(begin + wanted <= count, now, lambda: copy_rows(2 * count))

                    if numbers is None:
                        copy_rows(ALIGN)
                    else:
                        fetch(x_g.at[:, depths], chosen, x_s.at[slot])
                        settle(1)  # the rows of the step before: they had its time to arrive
                        pl.when(step > 0)(lambda: plgpu.barrier_arrive(full.at[lax.rem(step + stages - 1, stages)]))
                    return step + 1

                return lax.fori_loop(0, steps, one_step, step)

            done = lax.fori_loop(0, tiles, one_tile, jnp.int32(0))
            if numbers is not None:
                settle(0)
                pl.when(done > 0)(lambda: plgpu.barrier_arrive(full.at[lax.rem(done - 1, stages)]))
            for left in range(stages, 0, -1):  # no barrier is left half-way

                @pl.when(done >= left)
                def drain(left: int = left) -> None:
                    plgpu.barrier_wait(free.at[lax.rem(done - left, stages)])

        @pl.when(worker < workers)
        def multiply() -> None:
            def one_tile(i: jax.Array, step: jax.Array) -> jax.Array:
                group, column, first, begin, wanted = locate(i)

                def product(*sums: Any) -> list[jax.Array]:
                    def one_step(k: jax.Array, step: jax.Array) -> jax.Array:
                        slot = lax.rem(step, stages)
                        plgpu.barrier_wait(full.at[slot])
                        stream.multiply(sums, scratch, x_s.at[slot], slot, worker)
                        plgpu.wgmma_wait(parts * stream.lag)  # whatever came before is done with its slot
                        done = lax.rem(step + stages - stream.lag, stages)
                        pl.when(k >= stream.lag)(lambda: plgpu.barrier_arrive(free.at[done]))
                        return step + 1

                    step_after = lax.fori_loop(0, steps, one_step, step)
                    plgpu.wgmma_wait(0)
                    for late in range(stream.lag, 0, -1):
                        plgpu.barrier_arrive(free.at[lax.rem(step_after + stages - late, stages)])
                    return [s[...] for s in sums]

                sums = pl.run_scoped(product, *[plgpu.ACC((UNIT, rows))] * parts)
                sums = stream.finish(sums, arrays_g, At(layer, group, column), worker)
                result = sums[0] / (1 + jnp.exp(-sums[0])) * sums[1] if swiglu else sums[0]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_s.at[worker].T[...] = plgpu.layout_cast(result.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                # A copy has a static size: the group's rows leave in powers of two.
                count, at = 1 << (min(rows, size).bit_length() - 1), begin
                while count:

                    @pl.when((wanted & count) != 0)
                    def store(count: int = count, at: jax.Array = at) -> None:
                        to = out_g.at[pl.ds(first + at, count), pl.ds(column + worker * UNIT, UNIT)]
                        plgpu.copy_smem_to_gmem(out_s.at[worker, pl.ds(at, count)], to, commit_group=False)

                    at += wanted & count
                    count //= 2
                plgpu.commit_smem_to_gmem_group()
                return step + steps

            lax.fori_loop(0, tiles, one_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((size if groups else num_groups * size, width), x.dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=workers + 1,
        thread_name="worker",
        kernel_name="grouped_swiglu" if swiglu else "grouped_matmul",
        scratch_types={
            "x_s": staged((stages, rows, stream.step)),
            "out_s": plgpu.SMEM((workers, rows, UNIT), x.dtype, transforms=(plgpu.SwizzleTransform(128),)),
            "full": plgpu.Barrier(num_arrivals=stream.arrivals + 1, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
            **stream.scratch(stages),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return kernel(x, layer.reshape(1), *(groups or ()), *(() if numbers is None else (numbers,)), *stream.arrays)
