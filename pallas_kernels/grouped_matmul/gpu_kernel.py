"""Grouped matmul with Mosaic GPU: rows sorted by group times each group's weights, on Hopper's tensor cores."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


_UNIT = 64
"""Columns of one warpgroup's product, and weight rows of a step: the smallest wgmma, and a 128-byte swizzle of bfloat16."""

_ALIGN = 8
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
      start, size: ``[G]`` int32, the rows of a group are ``[start, start + size)``. Longer arrays are not read any further: a slice
        would be a kernel.
      upto: ``[G]`` int32, how many tiles of rows this group and those before it have.
    """

    start: jax.Array
    size: jax.Array
    upto: jax.Array

    @classmethod
    def of(cls, start: jax.Array, size: jax.Array, count: int, tile_rows: int) -> Groups:
        """``upto`` of the first ``count`` groups, for tiles of ``tile_rows``, a power of two."""
        tiles = (start[:count] % _ALIGN + size[:count] + tile_rows - 1) >> (tile_rows.bit_length() - 1)
        tiles = lax.optimization_barrier(jnp.where(size[:count] > 0, tiles, 0))  # else computed again for each pair of groups
        index = jnp.arange(count)
        return cls(start, size, jnp.sum(jnp.where(index <= index[:, None], tiles, 0), 1, dtype=jnp.int32))


def fits(*matrices: tuple[int, ...]) -> bool:
    """Whether weights of these ``(depth, width)`` can be tiled. SwiGLU halves the first width; 128 threads copy rows of that depth."""
    (depth, width), (depth2, width2) = matrices
    return depth % (2 * _UNIT) == 0 and width % (2 * _UNIT) == 0 and depth2 % _UNIT == 0 and width2 % _UNIT == 0


def num_multiprocessors() -> int:
    """Of the GPU the program is compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return int(device.num_cores if device is not None and device.num_cores else getattr(jax.devices()[0], "core_count", 132))


def staged(shape: tuple[int, ...]) -> Any:
    """Shared memory for bfloat16 tiles as the tensor cores read them."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, _UNIT)), plgpu.SwizzleTransform(128)))


@functools.partial(jax.jit, static_argnames=("swiglu", "tile"))  # traced once for all its uses
def matmul(
    x: jax.Array, weights: jax.Array, extra: jax.Array | None, layer: jax.Array, groups: Groups, *, swiglu: bool, tile: Tile
) -> jax.Array:
    """Each group's rows times its weights, in bfloat16 with float32 sums.

    Args:
      x: ``[M, K]``, M a multiple of 8.
      weights: ``[L, G, K, N]``.
      extra: ``[L, K, N]``, weights of one more group behind the G; or None.
      layer: int32 scalar, which of the L.
      groups: of G groups, or G + 1 with ``extra``.
      swiglu: gate columns come first, then as many up columns; the result is ``silu(gate) * up``.
      tile: columns are cut down to what divides the result's width.

    Returns:
      ``[M, N]``, or ``[M, N / 2]`` with ``swiglu``. Rows of no group are not written.
    """
    depth, num_groups = x.shape[1], len(groups.upto)
    width = weights.shape[-1] // (2 if swiglu else 1)
    parts = range(2 if swiglu else 1)
    rows, columns = tile.rows, next(c for c in (256, 128, 64) if c <= tile.columns and width % c == 0)
    workers, across, steps = columns // _UNIT, width // columns, depth // _UNIT
    stages = min((_SHARED_MEMORY - 2 * rows * columns) // (2 * _UNIT * (len(parts) * columns + rows)), _STAGES)
    blocks = num_multiprocessors()
    search = [1 << bit for bit in reversed(range((num_groups - 1).bit_length()))]

    def body(
        x_g: Any,
        weights_g: Any,
        extra_g: Any,
        layer_g: Any,
        start_g: Any,
        size_g: Any,
        upto_g: Any,
        out_g: Any,
        x_s: Any,
        w_s: Any,
        out_s: Any,
        full: Any,
        free: Any,
    ) -> None:
        worker, block, layer = lax.axis_index("worker"), lax.axis_index("block"), layer_g[0]
        tiles = lax.div(upto_g[num_groups - 1] * across - block + blocks - 1, blocks)

        def locate(i: jax.Array) -> tuple[jax.Array, ...]:
            """Tile i of this block: its group, first column, first row, and which of its rows are the group's."""
            at = block + i * blocks
            nth, column = lax.div(at, across), lax.rem(at, across) * columns
            group = jnp.int32(0)
            for stride in search:
                probe = group + stride
                group = jnp.where(upto_g[jnp.minimum(probe, num_groups) - 1] <= nth, probe, group)
            start, size = start_g[group], size_g[group]
            aligned = lax.div(start, _ALIGN) * _ALIGN
            own = lax.div(start + size - aligned + rows - 1, rows)
            first = aligned + (nth - upto_g[group] + own) * rows
            begin, end = jnp.maximum(first, start), jnp.minimum(first + rows, start + size)
            return group, column, pl.multiple_of(first, _ALIGN), begin - first, end - begin

        @pl.when(worker == workers)
        def copy() -> None:
            def one_tile(i: jax.Array, step: jax.Array) -> jax.Array:
                group, column, first, begin, size = locate(i)

                def one_step(k: jax.Array, step: jax.Array) -> jax.Array:
                    slot, depths = lax.rem(step, stages), pl.ds(k * _UNIT, _UNIT)
                    pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    for part in parts:
                        at, to = (depths, pl.ds(column + part * width, columns)), w_s.at[slot, part]

                        def routed(at: Any = at, to: Any = to) -> None:
                            plgpu.copy_gmem_to_smem(weights_g.at[layer, group, *at], to, full.at[slot])

                        def shared(at: Any = at, to: Any = to) -> None:
                            plgpu.copy_gmem_to_smem(extra_g.at[layer, *at], to, full.at[slot])

                        routed() if extra is None else lax.cond(group < num_groups - 1, routed, shared)

                    def copy_rows(count: int) -> None:
                        """Copies as few rows as hold all of the group's."""

                        def now() -> None:
                            plgpu.copy_gmem_to_smem(x_g.at[pl.ds(first, count), depths], x_s.at[slot, pl.ds(0, count)], full.at[slot])

                        now() if count == rows else lax.cond(begin + size <= count, now, lambda: copy_rows(2 * count))

                    copy_rows(_ALIGN)
                    return step + 1

                return lax.fori_loop(0, steps, one_step, step)

            done = lax.fori_loop(0, tiles, one_tile, jnp.int32(0))
            for left in range(stages, 0, -1):  # no barrier is left half-way

                @pl.when(done >= left)
                def drain(left: int = left) -> None:
                    plgpu.barrier_wait(free.at[lax.rem(done - left, stages)])

        @pl.when(worker < workers)
        def multiply() -> None:
            mine = pl.ds(worker * _UNIT, _UNIT)

            def one_tile(i: jax.Array, step: jax.Array) -> jax.Array:
                _, column, first, begin, size = locate(i)

                def product(*sums: Any) -> list[jax.Array]:
                    def one_step(k: jax.Array, step: jax.Array) -> jax.Array:
                        slot = lax.rem(step, stages)
                        plgpu.barrier_wait(full.at[slot])
                        for part in parts:
                            plgpu.wgmma(sums[part], w_s.at[slot, part, :, mine].T, x_s.at[slot].T)
                        plgpu.wgmma_wait(len(parts))  # the step before this one is done with its slot
                        pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(step + stages - 1, stages)]))
                        return step + 1

                    step_after = lax.fori_loop(0, steps, one_step, step)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[lax.rem(step_after + stages - 1, stages)])
                    return [s[...] for s in sums]

                sums = pl.run_scoped(product, *[plgpu.ACC((_UNIT, rows))] * len(parts))
                result = sums[0] / (1 + jnp.exp(-sums[0])) * sums[1] if swiglu else sums[0]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_s.at[worker].T[...] = plgpu.layout_cast(result.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                # A copy has a static size: the group's rows leave in powers of two.
                count, at = 1 << (min(rows, x.shape[0]).bit_length() - 1), begin
                while count:

                    @pl.when((size & count) != 0)
                    def store(count: int = count, at: jax.Array = at) -> None:
                        to = out_g.at[pl.ds(first + at, count), pl.ds(column + worker * _UNIT, _UNIT)]
                        plgpu.copy_smem_to_gmem(out_s.at[worker, pl.ds(at, count)], to, commit_group=False)

                    at += size & count
                    count //= 2
                plgpu.commit_smem_to_gmem_group()
                return step + steps

            lax.fori_loop(0, tiles, one_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    arrivals = len(parts) + 1
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.shape[0], width), x.dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=workers + 1,
        thread_name="worker",
        kernel_name="grouped_swiglu" if swiglu else "grouped_matmul",
        scratch_types={
            "x_s": staged((stages, rows, _UNIT)),
            "w_s": staged((stages, len(parts), _UNIT, columns)),
            "out_s": plgpu.SMEM((workers, rows, _UNIT), x.dtype, transforms=(plgpu.SwizzleTransform(128),)),
            "full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    # The kernel takes no None; the weights themselves stand in for an extra group that is not there.
    return kernel(x, weights, weights if extra is None else extra, layer.reshape(1), *groups)
