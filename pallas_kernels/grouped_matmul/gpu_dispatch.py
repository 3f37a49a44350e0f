"""Where each token's row lies among those of its experts, with Mosaic GPU."""

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
_THREADS = _WARPS * _LANES


def place_rows(ids: jax.Array, valid: jax.Array | None, *, groups: int, shared: bool, tile_rows: int) -> tuple[Placed, Groups]:
    """The tokens' rows by group, in the order of the tokens, behind them those of all tokens for a shared group.

    Args:
      ids, valid, groups, shared: see :func:`count`.
      tile_rows: of the tiles that ``Groups.upto`` counts.
    """
    counted = count(ids, valid, groups=groups, shared=shared)
    placed, upto = place(ids, counted, valid, shared=shared, tile_rows=tile_rows)
    return placed, Groups(counted.start, counted.size, upto)


class Placed(NamedTuple):
    """Where the rows of tokens lie among those of their groups.

    Attributes:
      token: ``[M]`` int32, M a multiple of 8, the token of each row; means nothing for rows of no group.
      row: ``[T, k]`` int32, the row of each pair, with ``shared`` a column more for the shared group; 0 for pairs that count nowhere.
    """

    token: jax.Array
    row: jax.Array


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
    """Counts the (token, group) pairs of each group, a thread block a group, whose warps look at a part of all pairs each.

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
    per_warp = -(-pairs // (chunk * _WARPS))  # chunks
    together = min(16, 1 << (per_warp - 1).bit_length())

    def body(ids_g: Any, *refs: Any, counts_s: Any) -> None:
        *valid_g, start_g, size_g, nth_g = refs

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (len(refs) + 2))
        def count_group(_: Any, ids: Any, counts: Any, *refs: Any) -> None:
            *valid, start, size, nth = refs
            i32 = ir.IntegerType.get_signless(32)
            group, warp, lane = utils.block_idx(), utils.warp_idx(), arith.remui(utils.thread_idx(), _number(_LANES))
            lanes_before = arith.subi(arith.shli(_number(1), lane), _number(1))

            def looked_up(i: Any) -> list[tuple[Any, list[Any]]]:
                """Of chunks that are looked at together: the first pair of this lane, and the groups of all that it has there."""
                return [one_chunk(arith.addi(arith.muli(i, _number(together)), _number(c))) for c in range(together)]

            def one_chunk(nth_chunk: Any) -> tuple[Any, list[Any]]:
                of_warp = _less(nth_chunk, _number(per_warp))
                at = arith.addi(arith.muli(warp, _number(per_warp)), nth_chunk)
                first = arith.addi(arith.muli(at, _number(chunk)), arith.muli(lane, _number(at_once)))
                there = arith.andi(of_warp, _less(first, _number(pairs)))
                from_ = arith.select(there, first, _number(0))
                if valid:
                    token_valid = memref.load(valid[0], [_index(arith.divui(from_, _number(top_k)))])
                    there = arith.andi(there, _less(_number(0), arith.extui(i32, token_valid)))
                loaded = vector.load(ir.VectorType.get((at_once,), i32), ids, [_index(from_)])
                return first, [arith.select(there, vector.extract(loaded, [], [j]), _no_group()) for j in range(at_once)]

            def counted(chunks: list[tuple[Any, list[Any]]], so_far: list[Any]) -> list[Any]:
                """This lane's pairs of lower groups and of this one."""
                found = [id_ for _, of_chunk in chunks for id_ in of_chunk]
                lower, own = ([arith.extui(i32, has(id_, group)) for id_ in found] for has in (_less, _equal))
                return [_sum([so_far[0], *lower]), _sum([so_far[1], *own])]

            def rank(chunks: list[tuple[Any, list[Any]]], own: Any) -> Any:
                """Writes which of the group's pairs each in ``chunks`` is, ``own`` being before; how many are before the next."""
                for first, found in chunks:
                    hits = [_equal(id_, group) for id_ in found]
                    voted = [nvvm.vote_sync(_every_lane(), hit, nvvm.VoteSyncKind.ballot) for hit in hits]
                    with utils.when(_less(_number(0), functools.reduce(arith.ori, voted))):
                        mine = arith.addi(own, _sum([math.ctpop(arith.andi(votes, lanes_before)) for votes in voted]))
                        for j, hit in enumerate(hits):
                            with utils.when(hit):
                                memref.store(mine, nth, [_index(arith.addi(first, _number(j)))])
                            mine = arith.addi(mine, arith.extui(i32, hit))
                    own = _sum([own, *map(math.ctpop, voted)])
                return own

            turns = -(-per_warp // together)
            once = looked_up(_number(0)) if turns == 1 else []  # else they are looked at twice
            if turns == 1:
                lanes_counts = counted(once, [_number(0), _number(0)])
            else:
                loop = utils.fori(_number(turns), [_number(0), _number(0)])
                lanes_counts = loop(lambda i, so_far: counted(looked_up(i), so_far)).results
            lower, own = (utils.redux(value, _every_lane(), utils.ReductionKind.ADD) for value in lanes_counts)
            with utils.when(_equal(lane, _number(0))):
                for kind, value in enumerate((lower, own)):
                    memref.store(value, counts, [_index(arith.addi(warp, _number(kind * _WARPS)))])
            utils.warpgroup_barrier()
            lower, own = ([memref.load(counts, [_index(_number(kind * _WARPS + w))]) for w in range(_WARPS)] for kind in range(2))
            before = _sum([arith.select(_less(_number(w), warp), own[w], _number(0)) for w in range(_WARPS)])
            if turns == 1:
                rank(once, before)
            else:
                utils.fori(_number(turns), [before])(lambda i, carry: [rank(looked_up(i), *carry)])
            with utils.when(_equal(utils.thread_idx(), _number(0))):
                of_group = _sum(own)
                if shared:
                    of_group = arith.select(_equal(group, _number(groups)), _number(tokens), of_group)
                memref.store(_sum(lower), start, [_index(group)])
                memref.store(of_group, size, [_index(group)])

        count_group(ids_g, counts_s, *refs)

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((length,), jnp.int32) for length in (every, every, pairs)],
        grid=(every,),
        grid_names=("group",),
        kernel_name="count_pairs",
        scratch_types={"counts_s": plgpu.SMEM((2 * _WARPS,), jnp.int32)},
    )
    start, size, nth = kernel(ids.reshape(-1), *([] if valid is None else [valid]))
    return Counted(start, size, nth.reshape(ids.shape))


@functools.partial(jax.jit, static_argnames=("shared", "tile_rows"))  # traced once for all its uses
def place(ids: jax.Array, counted: Counted, valid: jax.Array | None, *, shared: bool, tile_rows: int) -> tuple[Placed, jax.Array]:
    """Says where each pair's row lies, a thread a pair; one block more adds up the groups' tiles.

    Args:
      ids, counted, valid, shared: as given to :func:`count`, and what that gave.
      tile_rows: of the tiles that ``Groups.upto`` counts.

    Returns:
      ``(placed, upto)``; ``upto [G]`` int32 as in ``Groups``.
    """
    tokens, top_k = ids.shape
    every = len(counted.start)
    groups, columns = every - shared, top_k + shared
    pairs = tokens * columns
    blocks = -(-pairs // _THREADS)

    def body(ids_g: Any, nth_g: Any, start_g: Any, size_g: Any, *refs: Any) -> None:
        *valid_g, token_g, row_g, upto_g = refs
        block = lax.axis_index("block")
        pl.when(block == blocks)(lambda: add_up_tiles(start_g, size_g, upto_g))
        pl.when(block < blocks)(lambda: place_pair(ids_g, nth_g, start_g, *valid_g, token_g, row_g))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (5 + (valid is not None)))
    def place_pair(_: Any, ids: Any, nth: Any, start: Any, *refs: Any) -> None:
        *valid, token_of, row_of = refs
        pair = arith.addi(arith.muli(utils.block_idx(), _number(_THREADS)), utils.thread_idx())
        with utils.when(_less(pair, _number(pairs))):
            token, choice = arith.divui(pair, _number(columns)), arith.remui(pair, _number(columns))
            routed = _less(choice, _number(top_k))
            chosen = _index(arith.addi(arith.muli(token, _number(top_k)), arith.select(routed, choice, _number(0))))
            group = arith.select(routed, memref.load(ids, [chosen]), _number(groups))
            own = arith.select(routed, memref.load(nth, [chosen]), token)
            # The shared group's number is no routed pair's.
            there = _less(group, arith.select(routed, _number(groups), _number(every)))
            row = arith.addi(memref.load(start, [_index(arith.select(there, group, _number(0)))]), own)
            counts = there
            if valid:
                token_valid = _less(_number(0), arith.extui(group.type, memref.load(valid[0], [_index(token)])))
                counts = arith.andi(there, token_valid)
                # The shared group has a row of every token.
                there = arith.select(routed, counts, there)
            memref.store(arith.select(counts, row, _number(0)), row_of, [_index(pair)])
            with utils.when(there):
                memref.store(token, token_of, [_index(row)])

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def add_up_tiles(_: Any, start: Any, size: Any, upto: Any) -> None:
        """One warp, 32 groups at a time."""
        lane = arith.remui(utils.thread_idx(), _number(_LANES))
        first_warp = _less(utils.thread_idx(), _number(_LANES))
        before, loaded = _number(0), []
        # All is loaded before anything is stored: the compiler moves no load to before a store.
        for first in range(0, every, _LANES):
            group = arith.addi(lane, _number(first))
            there = _less(group, _number(every))
            at = _index(arith.select(there, group, _number(0)))
            loaded.append((group, there, memref.load(start, [at]), memref.load(size, [at])))
        for group, there, start_row, own in loaded:
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
        out_type=[jax.ShapeDtypeStruct((length,), jnp.int32) for length in (-(-pairs // ALIGN) * ALIGN, pairs, every)],
        grid=(blocks + 1,),
        grid_names=("block",),
        kernel_name="place_pairs",
    )
    inputs = [ids.reshape(-1), counted.nth.reshape(-1), counted.start, counted.size, *([] if valid is None else [valid])]
    token, row, upto = kernel(*inputs)
    return Placed(token, row.reshape(tokens, columns)), upto


def _sum(values: list[Any]) -> Any:
    return functools.reduce(arith.addi, values)


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
