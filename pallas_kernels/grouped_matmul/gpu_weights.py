"""How weights get from memory to Hopper's tensor cores: as tiles of bfloat16, or as words of quantised ones, unpacked in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.quantised import Form
from pallas_kernels.quantised.words import STEP, TILE, Packed, tile_rows


UNIT = 64
"""Columns of one warpgroup's product, and rows of a 128-byte swizzle of bfloat16."""
assert UNIT == TILE

_load: Any = plgpu.load  # JAX 0.10 types its index as required

_COLUMN = plgpu.Layout.WGMMA.reduce(1)
"""One value for each column of a tile, in the registers of the threads that have the column's weights."""


class At(NamedTuple):
    """Where a block is: the layer and the group of its weights, the first of its columns, and the step over their depth."""

    layer: jax.Array
    group: jax.Array
    column: jax.Array
    step: jax.Array | int = 0


class Weights(NamedTuple):
    """A stack of weights as the kernel streams it. ``arrays`` below are references to its arrays, ``shared`` to its scratch by name.

    Attributes:
      arrays: what is in memory.
      step: rows of weights in a step.
      step_bytes: what a step takes of shared memory.
      arrivals: copies in a step.
      lag: steps that are still being multiplied when the one after them is; their slots become free that much later.
      scratch: ``scratch(stages)``: shared memory by name.
      copy: ``copy(arrays, shared, at, slot, full)`` begins the copies of a step.
      multiply: ``multiply(sums, shared, rows, slot, worker)`` adds the products of a step: ``sums`` one accumulator for each part (of gate
        and up, or one), ``rows`` the step's activations in shared memory.
      finish: ``finish(sums, arrays, at, worker)``: the products, where something remains to be done.
    """

    arrays: tuple[jax.Array, ...]
    step: int
    step_bytes: int
    arrivals: int
    lag: int
    scratch: Callable[[int], dict[str, Any]]
    copy: Callable[..., None]
    multiply: Callable[..., None]
    finish: Callable[..., list[jax.Array]]


STAGED = (plgpu.TilingTransform((8, UNIT)), plgpu.SwizzleTransform(128))
"""How bfloat16 tiles lie in shared memory where the tensor cores read them."""


def staged(shape: tuple[int, ...]) -> Any:
    """Shared memory for bfloat16 tiles as the tensor cores read them."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=STAGED)


def tiles(weights: jax.Array, extra: jax.Array | None, *, parts: int, columns: int, groups: int) -> Weights:
    """``weights [L, G, K, parts * N]`` in bfloat16, with the group behind them ``extra [L, K, parts * N]``."""
    width = weights.shape[-1] // parts

    def copy(arrays: Any, shared: Any, at: At, slot: jax.Array, full: Any) -> None:
        for part in range(parts):
            where = pl.ds(at.step * UNIT, UNIT), pl.ds(at.column + part * width, columns)
            to = shared["w_s"].at[slot, part]

            def routed(where: Any = where, to: Any = to) -> None:
                plgpu.copy_gmem_to_smem(arrays[0].at[at.layer, at.group, *where], to, full.at[slot])

            def along(where: Any = where, to: Any = to) -> None:
                plgpu.copy_gmem_to_smem(arrays[1].at[at.layer, *where], to, full.at[slot])

            routed() if extra is None else lax.cond(at.group < groups - 1, routed, along)

    def multiply(sums: Any, shared: Any, rows: Any, slot: jax.Array, worker: jax.Array) -> None:
        mine = pl.ds(worker * UNIT, UNIT)
        for part in range(parts):
            plgpu.wgmma(sums[part], shared["w_s"].at[slot, part, :, mine].T, rows.T)

    return Weights(
        arrays=(weights,) if extra is None else (weights, extra),
        step=UNIT,
        step_bytes=2 * UNIT * parts * columns,
        arrivals=parts,
        lag=1,
        scratch=lambda stages: {"w_s": staged((stages, parts, UNIT, columns))},
        copy=copy,
        multiply=multiply,
        finish=lambda sums, arrays, at, worker: sums,
    )


def words(weights: Packed, *, parts: int, columns: int) -> Weights:
    """Quantised ``weights [L, G, K, parts * N]``. Scales of columns may be those of all groups, ``[L, 1, 1, parts * N]``.

    A scale for a column multiplies its sum; scales for groups multiply weights in registers, rounded to bfloat16 once more.
    """
    form, rows = weights.form, tile_rows(weights.form)
    width = weights.shape[-1] // parts
    groups = weights.scales.shape[-2]
    per_step = 0 if groups == 1 else groups * STEP // weights.shape[-2]  # groups of scales
    here = columns // TILE * rows

    def copy(arrays: Any, shared: Any, at: At, slot: jax.Array, full: Any) -> None:
        for part in range(parts):
            column = at.column + part * width
            tiles_here = pl.ds(lax.div(column, TILE) * rows, here)
            plgpu.copy_gmem_to_smem(arrays[0].at[at.layer, at.group, at.step, tiles_here], shared["w_s"].at[slot, part], full.at[slot])
            if per_step:
                scales = arrays[1].at[at.layer, at.group, pl.ds(at.step * per_step, per_step), pl.ds(column, columns)]
                plgpu.copy_gmem_to_smem(scales, shared["scales_s"].at[slot, part], full.at[slot])

    def multiply(sums: Any, shared: Any, activations: Any, slot: jax.Array, worker: jax.Array) -> None:
        for part in range(parts):
            packed = shared["w_s"].at[slot, part, pl.ds(worker * rows, rows)]
            scales = [
                _load(shared["scales_s"].at[slot, part, g, pl.ds(worker * UNIT, UNIT)], layout=_COLUMN, optimized=False)
                for g in range(per_step)
            ]
            unpacked_product(sums[part], packed, scales, activations, form)

    def finish(sums: list[jax.Array], arrays: Any, at: At, worker: jax.Array) -> list[jax.Array]:
        if per_step:
            return sums
        done = []
        for part in range(parts):
            where = at.layer, at.group if weights.scales.shape[1] > 1 else 0, 0, pl.ds(at.column + part * width + worker * UNIT, UNIT)
            scale = _load(arrays[1].at[where], layout=_COLUMN, optimized=False).astype(jnp.float32)
            done.append(sums[part] * lax.broadcast_in_dim(scale, sums[part].shape, (0,)))
        return done

    return Weights(
        arrays=(weights.words, weights.scales),
        step=STEP,
        step_bytes=parts * (here * 512 + per_step * columns * 2),
        arrivals=parts * (2 if per_step else 1),
        lag=0,
        scratch=lambda stages: {
            "w_s": plgpu.SMEM((stages, parts, here, 128), jnp.uint32),
            **({"scales_s": plgpu.SMEM((stages, parts, per_step, columns), jnp.bfloat16)} if per_step else {}),
        },
        copy=copy,
        multiply=multiply,
        finish=finish,
    )


def unpacked_product(sums: Any, packed: Any, scales: list[jax.Array], activations: Any, form: Form) -> None:
    """Adds a tile's weights, ``packed [tile_rows, 128]`` in shared memory, times ``activations [rows, STEP]`` to ``sums [TILE, rows]``."""
    layout = plgpu.Layout.WG_STRIDED((tile_rows(form), 128), vec_size=4)
    plgpu.wgmma(sums, _unpack(_load(packed, layout=layout), scales, form), activations.T)


def _unpack(packed: jax.Array, scales: list[jax.Array], form: Form) -> jax.Array:
    """``[TILE, STEP]`` bfloat16 in the registers where wgmma wants it: the words of a tile, times the scales of its groups."""
    shape, result = (TILE, STEP), plgpu.Layout.WGMMA
    layouts = (plgpu.Layout.WG_STRIDED((tile_rows(form), 128), vec_size=4),) + (_COLUMN,) * len(scales)

    @plgpu.inline_mgpu(arg_types=layouts, return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=result))
    def unpack(context: Any, packed: Any, *scales: Any) -> Any:
        i16, i32 = (ir.IntegerType.get_signless(bits) for bits in (16, 32))

        def assembly(text: str, *operands: Any, given: str = "r") -> Any:
            """One 32-bit result."""
            return llvm.inline_asm(i32, list(operands), text, ",".join(["=r"] + [given] * len(operands)))

        def twice(scale: Any) -> Any:
            return assembly("mov.b32 $0, {$1, $1};", utils.bitcast(scale, i16), given="h")

        # A thread has weights of two columns, and pair after pair goes to one and the other.
        factors = [[twice(scale) for scale in group.registers.flat] for group in scales]
        pairs = []
        for four in packed.registers.flat:
            for i in range(4):
                word = vector.extract(four, [], [i])
                pairs += [assembly(text, word) for text in _PAIRS[form]]
        registers = []
        for i, pair in enumerate(pairs):
            if factors:
                pair = assembly("mul.bf16x2 $0, $1, $2;", pair, factors[i * len(factors) // len(pairs)][i % 2])
            registers.append(utils.bitcast(pair, ir.VectorType.get((2,), ir.BF16Type.get())))
        layout = result.to_mgpu()
        shaped = np.array(registers, object).reshape(layout.registers_shape(shape))
        return fragmented_array.FragmentedArray(_registers=shaped, _layout=layout, _is_signed=None)

    return unpack(packed, *scales)


# Integers become bfloat16 by their bits: 0x4300 | m is 128 + m for m below 128, and 0x4380 is 256. Both differences are exact. Float8
# becomes float16, float32 and then bfloat16, each of which holds it.
_PAIRS: dict[Form, tuple[str, ...]] = {
    # Bytes j and j + 2 of $1, each behind a byte 0x43. Without their signs they are 128 + m; the signs are 128, or 256 where they are set.
    "int8": tuple(
        f"{{ .reg .b32 both, value, sign; prmt.b32 both, $1, 0x43, {selector}; "
        "and.b32 value, both, 0xff7fff7f; and.b32 sign, both, 0xff80ff80; sub.bf16x2 $0, value, sign; }"
        for selector in ("0x4240", "0x4341")
    ),
    # Nibbles j and j + 4, of which 8 is the zero: 128 + m less 136.
    "int4": tuple(
        f"{{ .reg .b32 both, zero; shr.b32 both, $1, {4 * j}; lop3.b32 both, both, 0x000f000f, 0x43004300, 0xea; "
        "mov.b32 zero, 0x43084308; sub.bf16x2 $0, both, zero; }"
        for j in range(4)
    ),
    # Bytes j and j + 2, side by side.
    "fp8": tuple(
        "{ .reg .b32 both, halves; .reg .b16 two, low, high; .reg .f32 first, second; "
        f"prmt.b32 both, $1, 0, {selector}; cvt.u16.u32 two, both; cvt.rn.f16x2.e4m3x2 halves, two; mov.b32 {{low, high}}, halves; "
        "cvt.f32.f16 first, low; cvt.f32.f16 second, high; cvt.rn.bf16x2.f32 $0, second, first; }"
        for selector in ("0x4420", "0x4431")
    ),
}
