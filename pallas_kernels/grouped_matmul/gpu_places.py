"""Where each token's row lies among those of its experts, with Mosaic GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, memref, nvvm, vector

from pallas_kernels.grouped_matmul.gpu_kernel import ALIGN, Groups


_WARPS, _LANES = 4, 32
_THREADS = _WARPS * _LANES

_CHUNKS = 16
"""Chunks that a warp loads together, at the most."""


class Placed(NamedTuple):
    """Where the rows of tokens lie among those of their groups.

    Attributes:
      token: ``[M]`` int32, M a multiple of 8, the token of each row; means nothing for rows of no group.
      row: ``[T, k]`` int32, the row of each pair, with ``shared`` a column more for the shared group; 0 for pairs that count nowhere.
    """

    token: jax.Array
    row: jax.Array


@functools.partial(jax.jit, static_argnames=("groups", "shared", "tile_rows"))  # traced once for all its uses
def place_rows(ids: jax.Array, valid: jax.Array | None, *, groups: int, shared: bool, tile_rows: int) -> tuple[Placed, Groups]:
    """The tokens' rows by group, in the order of the tokens, behind them those of all tokens for a shared group.

    A thread block for each group counts its (token, group) pairs and those of the groups before it, and says where their rows lie. One
    block more counts the pairs of all groups. Each warp of a block looks at a part of the pairs.

    Args:
      ids: ``[T, k]`` int32, the groups of each token, all different; one that is no group's number counts nowhere.
      valid: ``[T]`` bool; the pairs of others count nowhere.
      groups: G.
      shared: whether all tokens, valid or not, belong to one more group behind the G.
      tile_rows: of the tiles that ``Groups.upto`` counts.
    """
    tokens, top_k = ids.shape
    sizes = _Sizes(tokens, top_k, groups, shared)
    masked = () if valid is None else (valid,)

    def body(ids_g: Any, *refs: Any, counts_s: Any, sizes_s: Any) -> None:
        *valid_g, token_g, row_g, start_g, size_g, upto_g = refs
        group = lax.axis_index("group")
        pl.when(group < sizes.every)(lambda: place_group(ids_g, counts_s, token_g, row_g, *valid_g))
        pl.when(group == sizes.every)(lambda: count_all(ids_g, counts_s, sizes_s, row_g, start_g, size_g, upto_g, *valid_g))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (4 + len(masked)))
    def place_group(_: Any, ids: Any, counts: Any, token: Any, row: Any, *valid: Any) -> None:
        _place_group(sizes, functools.partial(_chunk, sizes, ids, valid), valid, counts, Placed(token, row))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (7 + len(masked)))
    def count_all(_: Any, ids: Any, counts: Any, of_groups: Any, row: Any, start: Any, size: Any, upto: Any, *valid: Any) -> None:
        _count_all(sizes, functools.partial(_chunk, sizes, ids, valid), counts, of_groups, row)
        _add_up(sizes, tile_rows, counts, of_groups, Groups(start, size, upto))

    rows = sizes.tokens * sizes.columns
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((length,), jnp.int32) for length in (-(-rows // ALIGN) * ALIGN, rows, *[sizes.every] * 3)],
        grid=(sizes.every + 1,),
        grid_names=("group",),
        kernel_name="place_rows",
        scratch_types={
            "counts_s": plgpu.SMEM((2 * _WARPS,), jnp.int32),
            "sizes_s": plgpu.SMEM((_THREADS * sizes.per_thread,), jnp.int32),
        },
    )
    token, row, *counted = kernel(ids.reshape(-1), *masked)
    return Placed(token, row.reshape(sizes.tokens, sizes.columns)), Groups(*counted)


class _Sizes(NamedTuple):
    """Of what is counted: T tokens with k groups each, of G; and how it is shared out."""

    tokens: int
    top_k: int
    groups: int
    shared: bool

    @property
    def every(self) -> int:
        """Groups, with the shared one."""
        return self.groups + self.shared

    @property
    def columns(self) -> int:
        """Rows of a token."""
        return self.top_k + self.shared

    @property
    def per_thread(self) -> int:
        """Groups of a thread where one block has them all."""
        return -(-self.every // _THREADS)

    @property
    def at_once(self) -> int:
        """Pairs that a lane loads together: of one token."""
        return 4 if self.top_k % 4 == 0 else 1

    @property
    def per_warp(self) -> int:
        """Chunks of a warp; a chunk is what its lanes load together."""
        return -(-self.tokens * self.top_k // (_LANES * self.at_once * _WARPS))

    @property
    def together(self) -> int:
        """Chunks of a turn."""
        return min(_CHUNKS, self.per_warp)

    @property
    def turns(self) -> int:
        return -(-self.per_warp // self.together)


class _Chunk(NamedTuple):
    """What a lane has of a chunk: the number of its first pair, whether that exists, and the groups of its pairs, no group's for none."""

    first: Any
    exists: Any
    groups: list[Any]


def _place_group(sizes: _Sizes, chunk: Callable[[Any], _Chunk], valid: tuple[Any, ...], counts: Any, placed: Any) -> None:
    """Says where the rows of this block's group lie, to the references of ``placed``."""
    group, warp, lane, lanes_before = utils.block_idx(), utils.warp_idx(), _lane(), _lanes_before()

    def counted(chunks: list[_Chunk], so_far: list[Any]) -> list[Any]:
        """This lane's pairs of lower groups, and of this one."""
        found = [id_ for of_lane in chunks for id_ in of_lane.groups]
        return [
            _sum([before, *(_as_number(has(id_, group)) for id_ in found)]) for before, has in zip(so_far, (_less, _equal), strict=True)
        ]

    def place(chunks: list[_Chunk], row: Any) -> Any:
        """Gives the group's pairs in ``chunks`` the rows from ``row`` on; the row after them."""
        for first, _, found in chunks:
            hits = [_equal(id_, group) for id_ in found]
            voted = [nvvm.vote_sync(_every_lane(), hit, nvvm.VoteSyncKind.ballot) for hit in hits]
            with utils.when(_less(_number(0), functools.reduce(arith.ori, voted))):
                token = arith.divui(first, _number(sizes.top_k))
                mine = _sum([row, *(math.ctpop(arith.andi(votes, lanes_before)) for votes in voted)])
                for j, hit in enumerate(hits):
                    with utils.when(hit):
                        memref.store(mine, placed.row, [_index(_column(sizes, first, token, j))])
                        memref.store(token, placed.token, [_index(mine)])
                    mine = arith.addi(mine, _as_number(hit))
            row = _sum([row, *map(math.ctpop, voted)])
        return row

    once = _turn(sizes, chunk, _number(0)) if sizes.turns == 1 else None  # else they are looked at twice
    nothing = [_number(0), _number(0)]
    of_lane = counted(once, nothing) if once else _turns(sizes, nothing, lambda i, so_far: counted(_turn(sizes, chunk, i), so_far))
    of_warp = [utils.redux(value, _every_lane(), utils.ReductionKind.ADD) for value in of_lane]
    with utils.when(_equal(lane, _number(0))):
        for kind, value in enumerate(of_warp):
            memref.store(value, counts, [_index(arith.addi(warp, _number(kind * _WARPS)))])
    utils.warpgroup_barrier()
    lower, own = ([_loaded(counts, kind * _WARPS + w) for w in range(_WARPS)] for kind in range(2))
    start = _sum(lower)
    row = _sum([start, *(arith.select(_less(_number(w), warp), own[w], _number(0)) for w in range(_WARPS))])
    if once:
        place(once, row)
    else:
        _turns(sizes, [row], lambda i, rows: [place(_turn(sizes, chunk, i), *rows)])
    if sizes.shared:
        with utils.when(_equal(group, _number(sizes.groups))):
            _place_every_token(sizes, valid, start, placed)


def _place_every_token(sizes: _Sizes, valid: tuple[Any, ...], start: Any, placed: Any) -> None:
    """Says where the rows of the shared group lie, from ``start`` on."""

    @utils.fori(_number(-(-sizes.tokens // _THREADS)), [])
    def some(i: Any, _: Any) -> list[Any]:
        token = arith.addi(arith.muli(i, _number(_THREADS)), utils.thread_idx())
        with utils.when(_less(token, _number(sizes.tokens))):
            row = arith.addi(start, token)
            memref.store(token, placed.token, [_index(row)])
            if valid:
                row = arith.select(_is_valid(valid[0], token), row, _number(0))
            at = arith.addi(arith.muli(token, _number(sizes.columns)), _number(sizes.top_k))
            memref.store(row, placed.row, [_index(at)])
        return []


def _count_all(sizes: _Sizes, chunk: Callable[[Any], _Chunk], counts: Any, of_groups: Any, row: Any) -> None:
    """Counts the pairs of every group, in shared memory, and gives those that count nowhere row 0."""
    for nth in range(sizes.per_thread):
        memref.store(_number(0), of_groups, [_index(arith.addi(utils.thread_idx(), _number(nth * _THREADS)))])
    utils.warpgroup_barrier()
    address = llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(of_groups))

    def count(i: Any, _: list[Any]) -> list[Any]:
        for first, exists, found in _turn(sizes, chunk, i):
            token = arith.divui(first, _number(sizes.top_k))
            for j, group in enumerate(found):
                there = _less(group, _number(sizes.groups))
                its = arith.addi(address, arith.muli(group, _number(4)))
                void = ir.Type.parse("!llvm.void")
                llvm.inline_asm(void, [its, there], "@$1 red.shared.add.u32 [$0], 1;", "r,b", has_side_effects=True)
                with utils.when(arith.andi(exists, arith.xori(there, _true()))):
                    memref.store(_number(0), row, [_index(_column(sizes, first, token, j))])
        return []

    _turns(sizes, [], count)
    utils.warpgroup_barrier()


def _add_up(sizes: _Sizes, tile_rows: int, counts: Any, of_groups: Any, groups: Any) -> None:
    """Writes each group's first row, and how many rows and tiles there are; a thread has some groups that follow each other."""
    first = arith.muli(utils.thread_idx(), _number(sizes.per_thread))
    mine = [arith.addi(first, _number(j)) for j in range(sizes.per_thread)]
    size = [memref.load(of_groups, [_index(group)]) for group in mine]
    if sizes.shared:
        size = [arith.select(_equal(g, _number(sizes.groups)), _number(sizes.tokens), own) for g, own in zip(mine, size, strict=True)]
    start, starts, tiles = _number_before(_sum(size), counts, slot=0), [], []
    for own in size:
        starts.append(start)
        spread = _sum([arith.remui(start, _number(ALIGN)), own, _number(tile_rows - 1)])
        tiles.append(arith.select(_less(_number(0), own), arith.divui(spread, _number(tile_rows)), _number(0)))
        start = arith.addi(start, own)
    upto = _number_before(_sum(tiles), counts, slot=_WARPS)
    for group, *values, own_tiles in zip(mine, starts, size, tiles, strict=True):
        upto = arith.addi(upto, own_tiles)
        with utils.when(_less(group, _number(sizes.every))):
            for value, ref in zip((*values, upto), groups, strict=True):
                memref.store(value, ref, [_index(group)])


def _number_before(own: Any, counts: Any, *, slot: int) -> Any:
    """The sum of ``own`` of all threads before this one; ``counts`` has room for a number of each warp from ``slot`` on."""
    warp, lane, upto = utils.warp_idx(), _lane(), own
    for distance in (1, 2, 4, 8, 16):
        lower = nvvm.shfl_sync(_every_lane(), upto, _number(distance), _number(0), nvvm.ShflKind.up)
        upto = arith.addi(upto, arith.select(_less(lane, _number(distance)), _number(0), lower))
    with utils.when(_equal(lane, _number(_LANES - 1))):
        memref.store(upto, counts, [_index(arith.addi(warp, _number(slot)))])
    utils.warpgroup_barrier()
    of_warps = [arith.select(_less(_number(w), warp), _loaded(counts, slot + w), _number(0)) for w in range(_WARPS)]
    return _sum([arith.subi(upto, own), *of_warps])


def _turns(sizes: _Sizes, carry: list[Any], turn: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """``carry`` after all turns."""
    return turn(_number(0), carry) if sizes.turns == 1 else utils.fori(_number(sizes.turns), carry)(turn).results


def _turn(sizes: _Sizes, chunk: Callable[[Any], _Chunk], i: Any) -> list[_Chunk]:
    """The chunks of turn i. All is loaded before anything is stored: a load takes longer than all that is done with it."""
    return [chunk(arith.addi(arith.muli(i, _number(sizes.together)), _number(c))) for c in range(sizes.together)]


def _chunk(sizes: _Sizes, ids: Any, valid: tuple[Any, ...], nth: Any) -> _Chunk:
    """What this lane has of the warp's chunk ``nth``."""
    at = arith.addi(arith.muli(utils.warp_idx(), _number(sizes.per_warp)), nth)
    first = arith.muli(arith.addi(arith.muli(at, _number(_LANES)), _lane()), _number(sizes.at_once))
    exists = arith.andi(_less(nth, _number(sizes.per_warp)), _less(first, _number(sizes.tokens * sizes.top_k)))
    from_ = arith.select(exists, first, _number(0))
    there = exists
    if valid:
        there = arith.andi(exists, _is_valid(valid[0], arith.divui(from_, _number(sizes.top_k))))
    loaded = vector.load(ir.VectorType.get((sizes.at_once,), from_.type), ids, [_index(from_)])
    found = [vector.extract(loaded, [], [j]) for j in range(sizes.at_once)]
    a_group = [arith.andi(there, _less(id_, _number(sizes.groups))) for id_ in found]
    return _Chunk(first, exists, [arith.select(is_, id_, _no_group()) for is_, id_ in zip(a_group, found, strict=True)])


def _column(sizes: _Sizes, first: Any, token: Any, j: int) -> Any:
    """Where ``Placed.row`` has pair ``first + j`` of a token, as one long row."""
    return _sum([first, arith.muli(token, _number(int(sizes.shared))), _number(j)])


def _is_valid(valid: Any, token: Any) -> Any:
    return _less(_number(0), arith.extui(token.type, memref.load(valid, [_index(token)])))


def _loaded(ref: Any, at: int) -> Any:
    return memref.load(ref, [_index(_number(at))])


def _lane() -> Any:
    return arith.remui(utils.thread_idx(), _number(_LANES))


def _lanes_before() -> Any:
    return arith.subi(arith.shli(_number(1), _lane()), _number(1))


def _sum(values: list[Any]) -> Any:
    return functools.reduce(arith.addi, values)


def _number(value: int) -> Any:
    return utils.c(value, ir.IntegerType.get_signless(32))


def _as_number(truth: Any) -> Any:
    return arith.extui(ir.IntegerType.get_signless(32), truth)


def _true() -> Any:
    return utils.c(1, ir.IntegerType.get_signless(1))


def _index(value: Any) -> Any:
    return arith.index_cast(ir.IndexType.get(), value)


def _less(a: Any, b: Any) -> Any:
    """Of numbers without a sign: a negative one is beyond all others."""
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def _equal(a: Any, b: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def _no_group() -> Any:
    """No group's number: pairs that are not there must hit nothing."""
    return _number(0xFFFFFFFF)


def _every_lane() -> Any:
    return _number(0xFFFFFFFF)
