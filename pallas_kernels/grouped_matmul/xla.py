"""The experts by plain XLA: sort by expert, two grouped matmuls, put back. For TPU and GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.grouped_matmul.routing import Routing, combine, held_here, route
from pallas_kernels.grouped_matmul.stacks import Stack, is_quantised, plain
from pallas_kernels.quantised import Quantised
from pallas_kernels.target import current_target, multiplies


TILE_ROWS = 64
"""Most rows of an expert that meet its matrices at once, where those are made plain for it."""

CHUNK_BYTES = 2**25
"""Experts are made plain so many bytes at a time, of gate and up, or one expert: what the caches of a GPU hold, and little memory."""


def ragged(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: Stack,
    down: Stack,
    *,
    layer: ArrayLike | None = None,
    valid: jax.Array | None = None,
    first_expert: ArrayLike | None = None,
    multiply: Callable[..., jax.Array] = lax.ragged_dot,
) -> jax.Array:
    """See ``expert_mlp``. Right on every platform; on the CPU ``ragged_dot`` is a dense loop and slow.

    With ``first_expert`` the matrices hold only the experts from that id on, and what the others would add is left out. Quantised
    matrices are multiplied as they are where the device does that; elsewhere a few experts at a time are made plain, never a layer of
    them. ``multiply`` stands in for ``lax.ragged_dot`` on plain ones, and need not say what rows get that are in no group.
    """
    num_experts = gate_up.shape[-3]
    held = None
    if first_expert is not None:
        expert_ids, held = held_here(expert_ids, first_expert, num_experts)
    routing = route(expert_ids, num_experts=num_experts, valid=valid)
    if _as_they_are(x, gate_up) and _as_they_are(x, down):
        rows = _grouped(x, routing, gate_up, down, layer=layer, multiply=lax.ragged_dot)
    elif is_quantised(gate_up) or is_quantised(down):
        rows = _few_at_a_time(x, routing, gate_up, down, layer=layer)
    else:
        rows = _grouped(x, routing, gate_up, down, layer=layer, multiply=multiply)
    return combine(rows, routing.place, weights, valid=valid, held=held).astype(x.dtype)


def _grouped(
    x: jax.Array, routing: Routing, gate_up: Stack, down: Stack, *, layer: ArrayLike | None, multiply: Callable[..., jax.Array]
) -> jax.Array:
    """``[P, D]`` float32: what each pair's expert makes of its token, by matmuls over all experts' rows."""
    num_experts = gate_up.shape[-3]
    sizes = jnp.sum(routing.expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    expert = jnp.minimum(routing.expert, num_experts - 1)
    if layer is not None:
        # The other layers' experts are groups without rows. Slicing the layer out would copy all its weights.
        sizes = lax.dynamic_update_slice(jnp.zeros(gate_up.shape[0] * num_experts, jnp.int32), sizes, (jnp.int32(layer) * num_experts,))
        expert += jnp.asarray(layer, jnp.int32) * num_experts

    def product(x: jax.Array, stack: Stack) -> jax.Array:
        matrices, scales = (stack.values, stack.scales) if isinstance(stack, Quantised) else (plain(stack, x.dtype), None)
        out = multiply(x, matrices.reshape(-1, *matrices.shape[-2:]), sizes, preferred_element_type=jnp.float32)
        return out if scales is None else out * scales.reshape(-1, scales.shape[-1])[expert].astype(jnp.float32)

    gate, up = jnp.split(product(x[routing.token], gate_up), 2, axis=-1)
    return product((jax.nn.silu(gate) * up).astype(x.dtype), down)


def _as_they_are(x: jax.Array, stack: Stack) -> bool:
    """Whether ``lax.ragged_dot`` takes the values of ``stack``, and a sum over K can be scaled when it is done."""
    if not isinstance(stack, Quantised) or stack.scales.shape[-2] != 1 or stack.form == "int4":
        return False
    return x.dtype == jnp.bfloat16 and stack.values.dtype.name == multiplies(current_target())


def _few_at_a_time(x: jax.Array, routing: Routing, gate_up: Stack, down: Stack, *, layer: ArrayLike | None) -> jax.Array:
    """As :func:`_grouped`, over quantised stacks: a few experts at a time are made plain, and meet a tile of rows each.

    Every expert is read, wanted or not, and again for each further tile of the one that most rows want.
    """
    (tokens, embed), (num_experts, depth, width) = x.shape, gate_up.shape[-3:]
    pairs, tile = len(routing.token), min(tokens, TILE_ROWS)
    most = max(1, CHUNK_BYTES // (depth * width * x.dtype.itemsize))
    chunk = next(n for n in range(min(most, num_experts), 0, -1) if num_experts % n == 0)
    upto = jnp.searchsorted(routing.expert, jnp.arange(num_experts + 1), method="compare_all").astype(jnp.int32)
    first, count = upto[:-1], upto[1:] - upto[:-1]
    expert = jnp.minimum(routing.expert, num_experts - 1)

    def few(begin: jax.Array, token: jax.Array) -> jax.Array:
        """``[C, R, D]``: rows ``token [C, R]`` of ``x`` through the experts from ``begin`` on."""
        gate, up = jnp.split(_product(x[token], _part(gate_up, layer, begin, chunk)), 2, axis=-1)
        return _product((jax.nn.silu(gate) * up).astype(x.dtype), _part(down, layer, begin, chunk))

    def one_tile(i: jax.Array, rows: jax.Array) -> jax.Array:
        at = first[:, None] + i * tile + jnp.arange(tile)
        token = routing.token[jnp.minimum(at, pairs - 1)].reshape(-1, chunk, tile)
        begins = jnp.arange(0, num_experts, chunk, dtype=jnp.int32)
        out = lax.map(lambda args: few(*args), (begins, token)).reshape(-1, embed)
        place = jnp.arange(pairs) - first[expert] - i * tile
        mine = (place >= 0) & (place < tile)
        return jnp.where(mine[:, None], out[expert * tile + jnp.clip(place, 0, tile - 1)], rows)

    rows = jnp.zeros((pairs, embed), jnp.float32)
    if tile == tokens:  # no token goes to an expert twice
        return one_tile(jnp.int32(0), rows)
    return lax.fori_loop(0, -(-count.max() // tile), one_tile, rows)


def _part(stack: Stack, layer: ArrayLike | None, begin: jax.Array, count: int) -> Stack:
    """``count`` experts of a stack, from ``begin`` on."""
    if layer is not None:
        part = functools.partial(_part_of_layer, jnp.asarray(layer, jnp.int32), begin, count)
    else:
        part = functools.partial(lax.dynamic_slice_in_dim, start_index=begin, slice_size=count)
    return jax.tree.map(part, stack)


def _part_of_layer(layer: jax.Array, begin: jax.Array, count: int, array: jax.Array) -> jax.Array:
    start = (layer, begin, *(jnp.int32(0) for _ in array.shape[2:]))
    return lax.dynamic_slice(array, start, (1, count, *array.shape[2:]))[0]


def _product(rows: jax.Array, stack: Stack) -> jax.Array:
    """``[C, R, N]`` float32: ``rows [C, R, K]`` times the matrices ``[C, K, N]`` of ``stack``."""
    if not isinstance(stack, Quantised):
        matrices, scales = plain(stack, rows.dtype).astype(rows.dtype), None
    elif stack.scales.shape[-2] == 1:  # of a whole column: the sum is scaled
        matrices = plain(Quantised(stack.values, jnp.ones_like(stack.scales), stack.form), rows.dtype)
        scales = stack.scales.astype(jnp.float32)
    else:
        matrices, scales = plain(read_in_bytes(stack), rows.dtype), None
    out = jnp.einsum("crk,ckn->crn", rows, matrices, preferred_element_type=jnp.float32)
    return out if scales is None else out * scales


def read_in_bytes(stack: Quantised) -> Quantised:
    """``stack`` with int4 made int8 on a GPU, by shifts. XLA would put a whole stack of int4 into another order there, beside the first."""
    if stack.values.dtype != jnp.int4 or current_target().platform != "gpu" or stack.shape[-1] % 2:
        return stack
    pairs = lax.bitcast_convert_type(stack.values.reshape(*stack.shape[:-1], -1, 2), jnp.int8)
    low, high = (lax.shift_right_arithmetic(pairs << up, jnp.int8(4)) for up in (4, 0))
    values = jnp.stack([low, high], -1).reshape(stack.shape)
    return Quantised(values, stack.scales, stack.form)
