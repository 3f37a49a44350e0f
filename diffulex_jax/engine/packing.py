"""Prompt blocks of many requests as the rows of few forwards, in the shapes that are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffulex_jax import decode
from diffulex_jax.engine.request import Chunk, Tracked
from diffulex_jax.state import Dims


_RUN = 32  # tokens of a row where prompts may be cut: small blocks share one, and what their queries read of the pool


class Shape(NamedTuple):
    """What a forward over prompts is compiled for, in each shard."""

    rows: int
    blocks: int


class Packed(NamedTuple):
    """What ``programs.prefill`` takes: the rows of each shard, in order, and their adapters; None where the parameters hold none."""

    prompts: decode.Prompts
    adapter: np.ndarray | None


class Row(NamedTuple):
    """A piece of a prompt: the blocks ``[first, end)`` of a request, of which those from ``written`` to ``last`` are to be written."""

    request: Tracked
    first: int
    end: int
    written: int
    last: int


AdapterOf = Callable[[Tracked], int]


def prefill_shapes(program: decode.Program, sizes: Sequence[int], *, budget: int, shards: int = 1) -> list[Shape]:
    """The shapes that an engine compiles, smallest first; none where prompts are not prefilled.

    Args:
      program: what is compiled.
      sizes: tokens of a forward, in order; see ``Kernels.prefill_tokens``. Those beyond the budget are left out, but for the first.
      budget: tokens of a shard's prompts in a round of the scheduler, at the most.
      shards: data shards, which share the slots.
    """
    dims = program.dims
    if not program.attention.paged:
        return []
    most = -(-dims.positions // dims.block)
    if not program.attention.chunkable:  # a row is a whole prompt: there is a shape for every power of two
        most = min(most, -(-budget // dims.block))
        return [Shape(1, 2**i) for i in range(1, max(2, (most - 1).bit_length() + 1))]
    run = _blocks_of_a_row(dims)
    needed = dims.slots // shards * -(-most // run)
    used = [size for size in sizes if size <= budget] or sizes[:1]
    return [Shape(n, run) for n in sorted({min(needed, -(-size // (run * dims.block))) for size in used})]


def pack(
    program: decode.Program,
    shapes: Sequence[Shape],
    chunks: Sequence[Chunk],
    *,
    table_of: Callable[[Sequence[int]], np.ndarray],
    adapter_of: AdapterOf | None = None,
    shards: int = 1,
) -> Iterator[tuple[Packed, dict[int, Tracked]]]:
    """The forwards that prefill ``chunks``, in order, and whose their rows are.

    A shard computes the rows of its own slots. In what shape a row is computed depends on its length, never on what other shards do.

    Args:
      program: the static part.
      shapes: those of :func:`prefill_shapes`.
      chunks: what to write.
      table_of: ``[P]`` int32 of a request's pages.
      adapter_of: the number of a request's adapter; None where the parameters hold none.
      shards: data shards; where there are several, requests have slots.
    """
    left: list[list[Row]] = [[] for _ in range(shards)]
    for row in _all_rows(program, chunks):
        left[0 if row.request.slot is None else row.request.slot * shards // program.dims.slots].append(row)
    while first := next((rows[0] for rows in left if rows), None):
        blocks = _blocks_for(shapes, first)
        alike = [[row for row in rows if _blocks_for(shapes, row) == blocks] for rows in left]
        shape = _shape(shapes, blocks, max(map(len, alike)))
        now = {shard * shape.rows + i: row for shard, rows in enumerate(alike) for i, row in enumerate(rows[: shape.rows])}
        arrays = packed(program.dims, shape, now, table_of=table_of, adapter_of=adapter_of, shards=shards)
        yield arrays, {i: row.request for i, row in now.items()}
        taken = set(now.values())
        left = [[row for row in rows if row not in taken] for rows in left]


def shapes_for(program: decode.Program, shapes: Sequence[Shape], requests: Sequence[Tracked]) -> list[Shape]:
    """Those of ``shapes`` in which prompts may be prefilled, in whatever company, and however much of them is found in cached pages."""
    if not shapes:
        return []
    block = program.dims.block
    rest = block - 1 if program.dims.prompt_apart else 0  # there the last block is written too, however few tokens it has
    rows = _all_rows(program, [Chunk(r, 0, blocks) for r in requests if (blocks := (len(r.prompt) + rest) // block)])
    lengths = {row.end - row.first for row in rows}
    return sorted({_shape(shapes, blocks, count) for blocks in lengths for count in range(1, len(rows) + 1)})


def packed(
    dims: Dims,
    shape: Shape,
    rows: Mapping[int, Row],
    *,
    table_of: Callable[[Sequence[int]], np.ndarray],
    adapter_of: AdapterOf | None = None,
    shards: int = 1,
) -> Packed:
    """Rows as the arrays of one forward, by their place in it: ``shape.rows`` of each shard, of which those that are not given do not
    exist."""
    count = shards * shape.rows
    arrays = decode.Prompts(
        tokens=np.zeros((count, shape.blocks, dims.block), np.int32),
        start=np.zeros(count, np.int32),
        length=np.zeros(count, np.int32),
        written=np.zeros((count, shape.blocks), bool),
        page_table=np.tile(table_of([]), (count, 1)),
    )
    adapter = None if adapter_of is None else np.zeros(count, np.int32)
    tables = {id_: table_of(pages) for id_, pages in {row.request.id: row.request.pages for row in rows.values()}.items()}
    for i, row in rows.items():
        tokens = row.request.prompt[row.first * dims.block : row.end * dims.block]
        arrays.tokens[i].reshape(-1)[: len(tokens)] = tokens
        arrays.start[i], arrays.length[i] = row.first * dims.block, len(tokens)
        arrays.written[i, row.written - row.first : row.last - row.first] = True
        arrays.page_table[i] = tables[row.request.id]
        if adapter is not None and adapter_of is not None:
            adapter[i] = adapter_of(row.request)
    return Packed(arrays, adapter)


def _all_rows(program: decode.Program, chunks: Sequence[Chunk]) -> list[Row]:
    dims = program.dims
    return [row for chunk in chunks for row in (_rows(chunk, dims) if program.attention.chunkable else [_whole(chunk, dims)])]


def _shape(shapes: Sequence[Shape], blocks: int, rows: int) -> Shape:
    """The smallest shape that takes so many rows, the first of them of ``blocks`` blocks; where none takes all, the largest."""
    fitting = [shape for shape in shapes if shape.blocks >= blocks]
    return next((shape for shape in fitting if shape.rows >= rows), max(fitting, key=lambda shape: shape.rows))


def _blocks_for(shapes: Sequence[Shape], row: Row) -> int:
    """The blocks of the shape in which a row is computed."""
    return min(shape.blocks for shape in shapes if shape.blocks >= row.end - row.first)


def _rows(chunk: Chunk, dims: Dims) -> Iterator[Row]:
    """The rows of a chunk. They begin at multiples of their length, also where the first blocks there are in the pool already: a block is
    always computed beside the same ones before it, so its KV does not depend, to the bit, on how a prompt is cut."""
    run, last = _blocks_of_a_row(dims), chunk.first + chunk.blocks
    for first in range(chunk.first // run * run, last, run):
        end = min(first + run, last)
        yield Row(chunk.request, first, end, max(first, chunk.first), end)


def _whole(chunk: Chunk, dims: Dims) -> Row:
    """A whole prompt, what is left to decoding included: its other positions see it."""
    return Row(chunk.request, 0, -(-len(chunk.request.prompt) // dims.block), chunk.first, chunk.first + chunk.blocks)


def _blocks_of_a_row(dims: Dims) -> int:
    return max(1, min(_RUN, dims.positions) // dims.block)
