"""Where each token's row lies among those of its experts, and the copy that puts it there, with Mosaic GPU."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, memref, nvvm, vector

from pallas_kernels.grouped_matmul.gpu_kernel import ALIGN, Groups


_WARPS, _LANES = 4, 32


def sort_rows(
    x: jax.Array, ids: jax.Array, valid: jax.Array | None, *, groups: int, shared: bool, tile_rows: int
) -> tuple[jax.Array, jax.Array, Groups]:
    """The tokens' rows by group, in the order of the tokens, behind them those of all tokens for a shared group.

    Args:
      x, ids, valid, groups, shared: see :func:`count` and :func:`dispatch`.
      tile_rows: of the tiles that the groups are counted in.

    Returns:
      ``(rows [M, D], place, groups)``, see :func:`dispatch`; M is a multiple of 8.
    """
    room = ids.size + shared * len(x)
    counted = count(ids, valid, groups=groups, shared=shared)
    rows, place, upto = dispatch(x, ids, counted, valid, room=-(-room // ALIGN) * ALIGN, shared=shared, tile_rows=tile_rows)
    return rows, place, Groups(counted.start, counted.size, upto)


class Counted(NamedTuple):
    """How the rows of G groups, one group after the other, are shared out.

    Attributes:
      start, size: ``[G]`` int32, the first row of each group and how many it has.
      nth: ``[T, k]`` int32, which of its group's rows each pair's is; means nothing for pairs of no group.
    """

    start: jax.Array
    size: jax.Array
    nth: jax.Array


@functools.partial(jax.jit, static_argnames=("groups", "shared"))  # traced once for all its uses
def count(ids: jax.Array, valid: jax.Array | None, *, groups: int, shared: bool) -> Counted:
    """Counts the (token, group) pairs of each group, a warp a group: each looks at all pairs, 32 lanes at a time.

    Args:
      ids: ``[T, k]`` int32, the groups of each token, all different; one that is no group's number counts nowhere.
      valid: ``[T]`` bool; the pairs of others count nowhere.
      groups: G.
      shared: whether all tokens, valid or not, belong to one more group behind the G.
    """
    tokens, top_k = ids.shape
    pairs, every = ids.size, groups + shared
    at_once = 4 if top_k % 4 == 0 else 1  # pairs that a lane loads together: of one token
    chunk = _LANES * at_once
    together = min(16, 1 << (-(-pairs // chunk) - 1).bit_length())  # chunks

    def body(ids_g: Any, *refs: Any) -> None:
        *valid_g, start_g, size_g, nth_g = refs

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (len(refs) + 1))
        def count_group(_: Any, ids: Any, *refs: Any) -> None:
            *valid, start, size, nth = refs
            i32 = ir.IntegerType.get_signless(32)

            def sum_of(values: list[Any]) -> Any:
                return functools.reduce(arith.addi, values)

            lane = arith.remui(utils.thread_idx(), _number(_LANES))
            group = arith.addi(arith.muli(utils.block_idx(), _number(_WARPS)), utils.warp_idx())
            lanes_before = arith.subi(arith.shli(_number(1), lane), _number(1))

            def looked_up(chunk_at: Any) -> tuple[Any, list[Any]]:
                """The first pair of this lane in a chunk, and the groups of all that it has there."""
                first = arith.addi(arith.muli(chunk_at, _number(chunk)), arith.muli(lane, _number(at_once)))
                there = _less(first, _number(pairs))
                from_ = arith.select(there, first, _number(0))
                if valid:
                    token_valid = memref.load(valid[0], [_index(arith.divui(from_, _number(top_k)))])
                    there = arith.andi(there, _less(_number(0), arith.extui(i32, token_valid)))
                loaded = vector.load(ir.VectorType.get((at_once,), i32), ids, [_index(from_)])
                return first, [arith.select(there, vector.extract(loaded, [], [j]), _no_group()) for j in range(at_once)]

            @utils.fori(_number(-(-pairs // (chunk * together))), [_number(0), _number(0)])
            def counts(i: Any, carry: list[Any]) -> list[Any]:
                before, own = carry
                # All is loaded before anything is stored: a load takes longer than all that is done with it.
                chunks = [looked_up(arith.addi(arith.muli(i, _number(together)), _number(c))) for c in range(together)]
                for first, found in chunks:
                    hits = [_equal(id_, group) for id_ in found]
                    voted = [nvvm.vote_sync(_every_lane(), hit, nvvm.VoteSyncKind.ballot) for hit in hits]
                    with utils.when(_less(_number(0), functools.reduce(arith.ori, voted))):
                        rank = arith.addi(own, sum_of([math.ctpop(arith.andi(votes, lanes_before)) for votes in voted]))
                        for j, hit in enumerate(hits):
                            with utils.when(hit):
                                memref.store(rank, nth, [_index(arith.addi(first, _number(j)))])
                            rank = arith.addi(rank, arith.extui(i32, hit))
                    before = sum_of([before, *(arith.extui(i32, _less(id_, group)) for id_ in found)])
                    own = sum_of([own, *map(math.ctpop, voted)])
                return [before, own]

            before, own = counts.results
            before = utils.redux(before, _every_lane(), utils.ReductionKind.ADD)
            if shared:
                own = arith.select(_equal(group, _number(groups)), _number(tokens), own)
            first_lane = _equal(lane, _number(0))
            with utils.when(arith.andi(first_lane, _less(group, _number(every)))):
                memref.store(before, start, [_index(group)])
                memref.store(own, size, [_index(group)])

        count_group(ids_g, *refs)

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((length,), jnp.int32) for length in (every, every, pairs)],
        grid=(-(-every // _WARPS),),
        grid_names=("block",),
        kernel_name="count_pairs",
    )
    start, size, nth = kernel(ids.reshape(-1), *([] if valid is None else [valid]))
    return Counted(start, size, nth.reshape(ids.shape))


@functools.partial(jax.jit, static_argnames=("room", "shared", "tile_rows"))  # traced once for all its uses
def dispatch(
    x: jax.Array, ids: jax.Array, counted: Counted, valid: jax.Array | None, *, room: int, shared: bool, tile_rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Copies each token's row to the rows of its groups, a thread block a token; one block more adds up the groups' tiles.

    Args:
      x: ``[T, D]``, D a multiple of 128.
      ids, counted, valid, shared: as given to :func:`count`, and what that gave. Pairs that count nowhere are not copied.
      room: M, rows there is room for.
      tile_rows: of the tiles that ``Groups.upto`` counts.

    Returns:
      ``(rows [M, D], place [T, k] int32, upto [G] int32)``: the rows by group, of which those of no token are not written; the row of each
      pair, 0 for those not copied, with a column more for the shared group; and ``Groups.upto``.
    """
    tokens, width = x.shape
    top_k, every = ids.shape[1], len(counted.start)
    groups, columns = every - shared, top_k + shared

    def body(x_g: Any, ids_g: Any, nth_g: Any, start_g: Any, size_g: Any, valid_g: Any, rows_g: Any, place_g: Any, upto_g: Any) -> None:
        token = lax.axis_index("token")

        @pl.when(token == tokens)
        def add_up() -> None:
            add_up_tiles(start_g, size_g, upto_g)

        @pl.when(token < tokens)
        def copy_row() -> None:
            row, valid = x_g[token], valid_g[token]
            group = [ids_g[token * top_k + j] for j in range(top_k)]
            there = [valid & (g >= 0) & (g < groups) for g in group] + [valid] * shared
            nth = [nth_g[token * top_k + j] for j in range(top_k)] + [token] * shared
            start = [start_g[jnp.where(t, g, 0)] for t, g in zip(there, group, strict=False)] + [start_g[groups]] * shared
            # All is loaded before anything is stored: the compiler moves no load to before a store.
            at = [jnp.where(t, s + n, 0) for t, s, n in zip(there, start, nth, strict=True)]
            for j in range(columns):
                place_g[token * columns + j] = at[j]
                pl.when(there[j])(functools.partial(rows_g.__setitem__, at[j], row))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def add_up_tiles(_: Any, start: Any, size: Any, upto: Any) -> None:
        """One warp, 32 groups at a time."""
        lane = arith.remui(utils.thread_idx(), _number(_LANES))
        first_warp = _less(utils.thread_idx(), _number(_LANES))
        before = _number(0)
        for first in range(0, every, _LANES):
            group = arith.addi(lane, _number(first))
            there = _less(group, _number(every))
            at = _index(arith.select(there, group, _number(0)))
            own, start_row = (memref.load(ref, [at]) for ref in (size, start))
            spread = arith.addi(arith.addi(arith.remui(start_row, _number(ALIGN)), own), _number(tile_rows - 1))
            wanted = arith.andi(there, _less(_number(0), own))
            tiles = arith.select(wanted, arith.divui(spread, _number(tile_rows)), _number(0))
            for distance in (1, 2, 4, 8, 16):
                lower = nvvm.shfl_sync(_every_lane(), tiles, _number(distance), _number(0), nvvm.ShflKind.up)
                tiles = arith.addi(tiles, arith.select(_less(lane, _number(distance)), _number(0), lower))
            tiles = arith.addi(tiles, before)
            with utils.when(arith.andi(there, first_warp)):
                memref.store(tiles, upto, [_index(group)])
            before = nvvm.shfl_sync(_every_lane(), tiles, _number(_LANES - 1), _number(_LANES - 1), nvvm.ShflKind.idx)

    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((room, width), x.dtype),
            jax.ShapeDtypeStruct((tokens * columns,), jnp.int32),
            jax.ShapeDtypeStruct((every,), jnp.int32),
        ],
        grid=(tokens + 1,),
        grid_names=("token",),
        kernel_name="dispatch_rows",
    )
    every_pair = ids.reshape(-1), counted.nth.reshape(-1)
    rows, place, upto = kernel(x, *every_pair, counted.start, counted.size, jnp.ones(tokens, bool) if valid is None else valid)
    return rows, place.reshape(tokens, columns), upto


def _number(value: int) -> Any:
    return utils.c(value, ir.IntegerType.get_signless(32))


def _index(value: Any) -> Any:
    return arith.index_cast(ir.IndexType.get(), value)


def _less(a: Any, b: Any) -> Any:
    """Of numbers without a sign: a negative one is beyond all others."""
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def _equal(a: Any, b: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def _no_group() -> Any:
    """No warp's number: what is found for pairs that are not there must hit nothing, also in warps behind the last group."""
    return _number(0xFFFFFFFF)


def _every_lane() -> Any:
    return _number(0xFFFFFFFF)
