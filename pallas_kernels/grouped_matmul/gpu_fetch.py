"""Rows on their way to Hopper's tensor cores, fetched one by one by their numbers.

Hopper's copy engine takes rows that lie side by side. These do not: a group's rows are those of the tokens that chose it. So a
warpgroup's threads copy 16 bytes each, asynchronously, to where the swizzle of ``gpu_weights.staged`` has them. ``settle`` waits for such
copies, and lets the tensor cores see them; between ``fetch`` and ``settle`` more may be begun.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref

from pallas_kernels.grouped_matmul.gpu_weights import STAGED, UNIT


_THREADS = 128
_PIECE = 8
"""Numbers of bfloat16 that a thread copies at once."""

_SCALAR = plgpu.Layout.WG_SPLAT(())


def choose(numbers: Any, first: jax.Array, begin: jax.Array, end: jax.Array, *, rows: int, step: int) -> jax.Array:
    """What each thread of a warpgroup is to fetch of a tile, for :func:`fetch`.

    Args:
      numbers: reference to ``[M]`` int32, which row of the source each row is.
      first: int32 scalar, the first row of the tile.
      begin, end: int32 scalars: of the tile's rows ``[begin, end)`` are wanted, the others are left as they are.
      rows: of a tile.
      step: columns of a tile.

    Returns:
      ``[rows * step / 8]`` int32 in the order of ``_layout``: the row of the source of each piece, -1 for none.
    """
    across, passes = step // _PIECE, _passes(rows, step)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), _SCALAR, _SCALAR, _SCALAR),
        return_type=plgpu.ShapeDtypeStruct((passes * _THREADS,), jnp.int32, layout=_layout(passes)),
    )
    def look_up(_: Any, numbers: Any, *scalars: Any) -> Any:
        first, begin, end = (scalar.registers.item() for scalar in scalars)
        row = arith.divui(_thread(), _number(across))
        found = []
        for nth in range(passes):
            at = arith.addi(row, _number(nth * (_THREADS // across)))
            wanted = arith.cmpi(arith.CmpIPredicate.ult, arith.subi(at, begin), arith.subi(end, begin))
            from_ = arith.select(wanted, arith.addi(first, at), arith.addi(first, begin))
            number = memref.load(numbers, [arith.index_cast(ir.IndexType.get(), from_)])
            found.append(arith.select(wanted, number, _number(-1)))
        return _in_registers(found)

    return look_up(numbers, first, begin, end)


def fetch(x: Any, chosen: jax.Array, to: Any) -> None:
    """Begins to copy the rows ``chosen`` of ``x [T, step]`` to ``to [rows, step]``, a slot of ``gpu_weights.staged`` shared memory."""
    rows, step = to.shape
    across, passes = step // _PIECE, _passes(rows, step)
    at_once = _THREADS // across  # rows of a pass
    square, down = 8 * UNIT * 2, 8 * step * 2  # bytes of a swizzled square, and of the squares side by side
    assert at_once % 8 == 0, (rows, step)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _layout(passes), plgpu.RefType(STAGED)))
    def copy(_: Any, x: Any, chosen: Any, to: Any) -> None:
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        (stride, _columns), _offset = ir.MemRefType(x.type).get_strides_and_offset()
        row, piece = arith.divui(_thread(), _number(across)), arith.remui(_thread(), _number(across))
        # In a square of 8 rows of 128 bytes, piece p of row r lies where p ^ r would without the swizzle.
        of_square = arith.remui(row, _number(8))
        swizzled = arith.xori(arith.remui(piece, _number(8)), of_square)
        squares = (arith.divui(row, _number(8)), down), (arith.divui(piece, _number(8)), square)
        offset = _total(*squares, (of_square, square // 8), (swizzled, 2 * _PIECE))
        target = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(to)), offset)
        source = arith.addi(llvm.ptrtoint(i64, utils.memref_ptr(x)), arith.extui(i64, _total((piece, 2 * _PIECE))))
        for nth, number in enumerate(utils.bitcast(register, i32) for register in chosen.registers.flat):
            from_ = arith.addi(source, arith.muli(arith.extsi(i64, number), utils.c(2 * stride, i64)))
            into = arith.addi(target, _number(nth * (at_once // 8) * down))
            wanted = arith.cmpi(arith.CmpIPredicate.sge, number, _number(0))
            _assembly("@$2 cp.async.cg.shared.global [$0], [$1], 16;", into, from_, wanted, given="r,l,b")
        _assembly("cp.async.commit_group;")

    copy(x, chosen, to)


def settle(late: int) -> None:
    """Waits until of this thread's calls of :func:`fetch` only the last ``late`` are not done, and shows the tensor cores what is."""

    @plgpu.inline_mgpu()
    def wait(_: Any) -> None:
        _assembly(f"cp.async.wait_group {late};")
        _assembly("fence.proxy.async.shared::cta;")

    wait()


def _passes(rows: int, step: int) -> int:
    return rows * step // (_PIECE * _THREADS)


def _layout(passes: int) -> Any:
    return plgpu.Layout.WG_STRIDED((passes * _THREADS,), vec_size=1)


def _in_registers(values: list[Any]) -> Any:
    """``_layout``: thread t has elements t, t + 128 and so on."""
    vectors = [utils.bitcast(value, ir.VectorType.get((1,), value.type)) for value in values]
    layout = _layout(len(values)).to_mgpu()
    return fragmented_array.FragmentedArray(_registers=np.array(vectors, object), _layout=layout, _is_signed=True)


def _assembly(text: str, *operands: Any, given: str = "") -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), list(operands), text, given, has_side_effects=True)


def _total(*terms: tuple[Any, int]) -> Any:
    """The sum of numbers times constants."""
    return functools.reduce(arith.addi, [arith.muli(value, _number(times)) for value, times in terms])


def _thread() -> Any:
    """Its number in its warpgroup."""
    return arith.remui(utils.thread_idx(), _number(_THREADS))


def _number(value: int) -> Any:
    return utils.c(value, ir.IntegerType.get_signless(32))
