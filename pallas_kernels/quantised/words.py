"""Quantised matrices in the order in which Hopper's tensor cores read them from registers.

A warpgroup multiplies a tile of 64 columns by steps of ``STEP`` rows. What each of its threads needs of a step lies together in memory:
four words in a row for each 128-bit load, thread after thread, so that no weight changes its thread once it is loaded.
"""

from __future__ import annotations

import dataclasses
import functools

import einops
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.quantised import Form, Quantised, dtype_of, in_int8


STEP = 128
"""Rows of a step."""

TILE = 64
"""Columns of a tile."""

_BITS: dict[Form, int] = {"int8": 8, "int4": 4, "fp8": 8}
_LAY = "(step k8 c b) (tile warp half r) -> step tile (warp r c) (k8 half) b"
_SIZES = {"k8": STEP // 8, "c": 4, "b": 2, "warp": 4, "half": 2, "r": 8}


@functools.partial(jax.tree_util.register_dataclass, data_fields=("words", "scales"), meta_fields=("form",))
@dataclasses.dataclass(frozen=True)
class Packed:
    """What ``Quantised`` is, in another order.

    Attributes:
      words: ``[..., K / STEP, N / TILE * rows, 128]`` uint32, ``rows`` of a tile: 16 for int8 and fp8, 8 for int4. The weights of two rows
        that follow each other make a pair. Weight b of pair j of a word begins at bit ``bits * j + 16 * b``; int4 is offset by 8.
      scales, form: see ``Quantised``.
    """

    words: jax.Array
    scales: jax.Array
    form: Form

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices that it stands for."""
        return (*self.words.shape[:-3], self.words.shape[-3] * STEP, self.scales.shape[-1])

    @property
    def nbytes(self) -> int:
        return self.words.size * 4 + self.scales.size * 2

    def __getitem__(self, at: ArrayLike) -> Packed:
        """Entry ``at`` of the first axis, which is neither K nor N."""
        return Packed(self.words[at], self.scales[at], self.form)


def packs(shape: tuple[int, ...]) -> bool:
    """True for the shape of matrices ``[..., K, N]`` that whole steps and tiles make up."""
    return shape[-2] % STEP == 0 and shape[-1] % TILE == 0


def tile_rows(form: Form) -> int:
    """Rows of 128 words that a tile takes in each step."""
    return STEP * TILE * _BITS[form] // 32 // 128


def pack(q: Quantised) -> Packed:
    """``q`` in the order of the tensor cores; its shape must be one that :func:`packs`."""
    bits = _BITS[q.form]
    values = in_int8(q).values.astype(jnp.int32) + (8 if q.form == "int4" else 0)
    pairs = einops.rearrange(values & (2**bits - 1), f"... {_LAY}".replace("->", "-> ..."), **_SIZES).astype(jnp.uint32)
    pairs = pairs.reshape(*pairs.shape[:-2], -1, 16 // bits, 2)  # of a word
    words = sum(pairs[..., j, b] << (bits * j + 16 * b) for j in range(16 // bits) for b in range(2))
    words = einops.rearrange(words, "... step tile thread (load four) -> ... step (tile load thread four)", four=4)
    return Packed(words.reshape(*words.shape[:-1], -1, 128), q.scales, q.form)


def unpack(p: Packed) -> Quantised:
    """The inverse of :func:`pack`."""
    bits, (depth, width) = _BITS[p.form], p.shape[-2:]
    words = p.words.reshape(*p.words.shape[:-2], -1)
    lay = "... step (tile load thread four) -> ... step tile thread (load four)"
    words = einops.rearrange(words, lay, tile=width // TILE, thread=128, four=4)
    pairs = jnp.stack([jnp.stack([words >> (bits * j + 16 * b) for b in range(2)], -1) for j in range(16 // bits)], -2)
    pairs = (pairs & (2**bits - 1)).astype(jnp.int32).reshape(*words.shape[:-1], -1, 2)
    values = pairs - 8 if p.form == "int4" else (pairs ^ 128) - 128  # of two's complement
    source, target = _LAY.split(" -> ")
    values = einops.rearrange(values, f"... {target} -> ... {source}", tile=width // TILE, step=depth // STEP, **_SIZES)
    if p.form == "fp8":
        return Quantised(lax.bitcast_convert_type(values.astype(jnp.int8), dtype_of("fp8")), p.scales, p.form)
    return Quantised(values.astype(p.form), p.scales, p.form)
