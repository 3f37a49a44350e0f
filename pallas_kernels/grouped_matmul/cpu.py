"""The experts on a CPU: weights streamed from memory once, row by row, into sums for the tokens that want them.

With a handful of tokens an expert, a layer should cost what reading its weights once costs. XLA's matmuls on CPU miss
that: their operands must lie in memory as one array, so that each layer sliced from a stack is copied first, and they
give every expert room for as many tokens as the busiest one has. An elementwise fusion has neither fault. One step of
the loop here is a single fused kernel, ``acc[p] += x[p, d] * w[expert[p], d]`` for eight rows ``d`` of every wanted
expert: it reads those rows in place and in order, and pairs of the same expert, sorted next to each other, find them in
the first-level cache. Every element of the result is one chain of additions in the order of ``d``, which no other row
can change.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.routing import combine, route
from pallas_kernels.grouped_matmul.stacks import Stack, plain
from pallas_kernels.quantised import Quantised, in_int8
from pallas_kernels.quantised.words import Packed


WEIGHT_ROWS = 8
"""Weight rows a step: as many as leave an expert's share (16 KiB at 512 columns) in the first-level cache."""

CHUNK = 256
"""Pairs worked on at once. Pairs of invalid tokens are sorted last, and whole chunks of them are never computed."""


def streamed(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: Stack,
    down: Stack,
    *,
    layer: ArrayLike | None = None,
    valid: jax.Array | None = None,
) -> jax.Array:
    """See ``expert_mlp``. A stack of layers is read in place, whether ``layer`` is known or traced.

    Weights should be float32, or quantised and held in int8: XLA on CPU gathers no bfloat16, int4 or float8, and widens the whole stack
    before the first layer.
    """
    num_experts, embed = gate_up.shape[-3], x.shape[1]
    routing = route(expert_ids, num_experts=num_experts, valid=valid)
    expert = jnp.minimum(routing.expert, num_experts - 1)
    if layer is not None:
        expert += jnp.asarray(layer, jnp.int32) * num_experts

    def mlp(token: jax.Array, expert: jax.Array) -> jax.Array:
        gate, up = jnp.split(_product(x[token], gate_up, expert), 2, axis=-1)
        hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
        return _product(hidden, down, expert)

    pairs = expert.shape[0]
    if pairs <= CHUNK:
        out = mlp(routing.token, expert)
    else:
        padding = (0, -pairs % CHUNK)
        token, expert = jnp.pad(routing.token, padding), jnp.pad(expert, padding, mode="edge")

        def chunk(i: jax.Array, out: jax.Array) -> jax.Array:
            rows = mlp(*(lax.dynamic_slice(a, (i * CHUNK,), (CHUNK,)) for a in (token, expert)))
            return lax.dynamic_update_slice(out, rows, (i * CHUNK, 0))

        wanted = jnp.sum(routing.expert < num_experts, dtype=jnp.int32)
        out = lax.fori_loop(0, -(-wanted // CHUNK), chunk, jnp.zeros((token.shape[0], embed), jnp.float32))
    return combine(out, routing.place, weights, valid=valid).astype(x.dtype)


def _product(x: jax.Array, stack: Stack, expert: jax.Array) -> jax.Array:
    """``[P, N]`` float32: row ``p`` of ``x [P, K]`` times matrix ``expert[p]`` of ``stack [..., K, N]``."""
    if isinstance(stack, Packed):
        stack = plain(stack, jnp.float32)
    depth, width = stack.shape[-2:]
    if not isinstance(stack, Quantised):
        return _matmul(x, stack.reshape(-1, width), expert * depth)
    values, scales = in_int8(stack).values.reshape(-1, width), stack.scales.reshape(-1, width).astype(jnp.float32)
    groups = stack.scales.shape[-2]
    if stack.form == "fp8":
        return _matmul(x, values, expert * depth, read=float8) * scales[expert]
    if groups == 1:  # of a whole column: the sum is scaled
        return _matmul(x, values, expert * depth) * scales[expert]
    return _matmul(x, values, expert * depth, scales=scales, first_scale=expert * groups, group=depth // groups)


def _matmul(
    x: jax.Array,
    w: jax.Array,
    first: jax.Array,
    *,
    read: Callable[[jax.Array], jax.Array] = lambda row: row.astype(jnp.float32),
    scales: jax.Array | None = None,
    first_scale: jax.Array | None = None,
    group: int = 0,
) -> jax.Array:
    """``[P, N]`` float32: row ``p`` of ``x [P, K]`` times rows ``first[p] : first[p] + K`` of ``w [R, N]``.

    ``read`` makes float32 of a row of ``w``. With ``scales``, each run of ``group`` of those rows has a row of them, ``first_scale[p]`` and
    the following.
    """
    rows, depth = x.shape
    step = math.gcd(depth, WEIGHT_ROWS)
    one_row = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))

    def row(of: jax.Array, at: jax.Array) -> jax.Array:
        return lax.gather(of, at[:, None], one_row, (1, of.shape[1]), mode="promise_in_bounds")

    def body(i: jax.Array, acc: jax.Array) -> jax.Array:
        # Each row has its own slice and gather, used once: XLA then fuses them all and LLVM vectorises the sum. A slice
        # shared by the eight products would be made in memory, or keep its index computation in the innermost loop.
        for j in range(step):
            d = i * step + j
            xd = lax.dynamic_slice(x, (0, d), (rows, 1), allow_negative_indices=False)
            wd = read(row(w, first + d))
            if scales is not None and first_scale is not None:
                wd = wd * row(scales, first_scale + d // group)
            acc += xd.astype(jnp.float32) * wd
        return acc

    return lax.fori_loop(0, depth // step, body, jnp.zeros((rows, w.shape[1]), jnp.float32))


def float8(bits: jax.Array) -> jax.Array:
    """The float32 that float8_e4m3fn ``bits`` (int8) mean, in operations that LLVM vectorises: XLA's own take twice as long."""
    wide = bits.astype(jnp.int32)
    size = wide & 127
    normal = lax.bitcast_convert_type((size << 20) + (120 << 23), jnp.float32)
    value = jnp.where(size < 8, size.astype(jnp.float32) * 2.0**-9, jnp.where(size == 127, jnp.nan, normal))
    return jnp.where(wide < 0, -value, value)
