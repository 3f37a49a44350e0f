"""The vocabulary streamed through VMEM: what one part of it says of every row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


LANES = 128
_ROWS = 256  # of a tile: lm_head is read once for so many, about where a TPU's matrix unit and its memory take equally long
_TILE_BYTES = 2 << 20  # of lm_head in one tile; two are in flight, beside half as much of the hidden states
_LOWEST = float(jnp.finfo(jnp.float32).min)  # below every logit, and finite: -inf minus -inf would be NaN


class Partial(NamedTuple):
    """What a part of the vocabulary gives, ``[R, 1]`` each, ``top_*`` ``[R, M]``; logits after penalty and bans.

    Attributes:
      peak, best: float32 largest logit and its int32 id, the lowest on ties.
      total: float32 sum of ``exp(logit - peak)``; NaN where a logit is. Tempered, both differences are divided by the temperature.
      current: float32 logit of the current token; -inf where it is in another part.
      slope: float32 sum of ``d exp(d)`` with ``d = logit - peak``; ``[R, 0]`` where no entropy is asked for.
      score, drawn, drawn_logit: largest ``logit / temperature + noise``, its id and logit; rows with temperature above 0 only.
      top_logits, top_ids: the largest logits, in order.
    """

    peak: jax.Array
    best: jax.Array
    total: jax.Array
    current: jax.Array
    score: jax.Array
    drawn: jax.Array
    drawn_logit: jax.Array
    slope: jax.Array
    top_logits: jax.Array
    top_ids: jax.Array


class Columns(NamedTuple):
    """Per-row inputs as the kernel takes them: columns of one int32 and one float32 array."""

    ints: jax.Array  # [R, 4 + M]: current, penalized, two words of the key, banned
    floats: jax.Array  # [R, 2]: penalty, temperature


class Shown(NamedTuple):
    """What the kernel keeps: static."""

    listed: int  # candidates; the best token is the one best of top_k=1: no list is kept for it
    tempered: bool
    entropy: bool


def stream(
    source: Sequence[jax.Array],
    columns: Columns,
    hot: jax.Array,
    bans: jax.Array,
    offset: jax.Array | int,
    *,
    forbidden_id: int,
    shown: Shown,
    tile: tuple[int, int] | None,
    interpret: Any,
) -> Partial:
    """Runs the kernel over row tiles x vocabulary tiles; ``source`` is ``(logits,)`` or ``(hidden, lm_head)``."""
    rows, depth = source[0].shape
    vocab = depth if len(source) == 1 else source[1].shape[0]
    if tile is None:
        width = _ROWS if len(source) == 1 else depth
        fit = _TILE_BYTES // (source[-1].dtype.itemsize * width)
        tile = _ROWS if len(source) == 1 else min(_ROWS, fit // 2 // 8 * 8), min(1024, max(LANES, fit // LANES * LANES))
    height, width = min(tile[0], rows), min(tile[1], vocab)
    grid = pl.cdiv(rows, height), pl.cdiv(vocab, width)

    def any_in_tile(flags: jax.Array) -> jax.Array:
        return jnp.pad(flags, (0, grid[0] * height - rows)).reshape(grid[0], height).any(1).astype(jnp.int32)

    def per_row(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((height, width), lambda i, j, *_: (i, 0))

    if len(source) == 1:
        specs = [pl.BlockSpec((height, width), lambda i, j, *_: (i, j))]
    else:
        specs = [per_row(depth), pl.BlockSpec((width, depth), lambda i, j, *_: (j, 0))]
    kinds = [jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    state = [((rows, 1), kind) for kind in kinds]
    if shown.entropy:
        state += [((rows, 1), jnp.float32)]
    if shown.listed:
        state += [((rows, LANES), jnp.float32), ((rows, LANES), jnp.int32)]
    outs = pl.pallas_call(
        functools.partial(_kernel, sources=len(source), vocab=vocab, forbidden_id=forbidden_id, shown=shown),
        out_shape=[jax.ShapeDtypeStruct(shape, kind) for shape, kind in state],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[*specs, per_row(columns.ints.shape[1]), per_row(2)],
            out_specs=[per_row(shape[1]) for shape, _ in state],
            scratch_shapes=[pltpu.VMEM((height, width), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=rows * vocab * (8 + 2 * depth * (len(source) - 1)),
            bytes_accessed=source[-1].nbytes * (grid[0] if len(source) == 2 else 1),
            transcendentals=rows * vocab,
        ),
        name="prediction",
        interpret=interpret,
    )(jnp.asarray(offset, jnp.int32).reshape(1), any_in_tile(hot), any_in_tile(bans), *source, *columns)
    none = jnp.zeros((rows, 0), jnp.float32)
    slope = outs[7] if shown.entropy else none
    lists = outs[-2:] if shown.listed else (none, none.astype(jnp.int32))
    return Partial._make([*outs[:7], slope, *(a[:, : shown.listed] for a in lists)])


def _kernel(offset: Any, hot: Any, bans: Any, *refs: Any, sources: int, vocab: int, forbidden_id: int, shown: Shown) -> None:
    source, (ints, floats), outs, logits = refs[:sources], refs[sources : sources + 2], refs[sources + 2 : -1], refs[-1]
    peak, best, total, current, score, drawn, drawn_logit = outs[:7]
    slope, lists = outs[7 : 7 + shown.entropy], outs[7 + shown.entropy :]
    i, j = pl.program_id(0), pl.program_id(1)
    here = j * logits.shape[1] + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    ids = here + offset[0]

    def column(n: int) -> jax.Array:
        return ints[:, n : n + 1]

    @pl.when(j == 0)
    def _start() -> None:
        for ref in (current, score, drawn_logit, *lists[:1]):
            ref[...] = jnp.full(ref.shape, -jnp.inf, jnp.float32)
        for ref in (best, drawn, *lists[1:]):
            ref[...] = jnp.zeros(ref.shape, jnp.int32)
        peak[...] = jnp.full(peak.shape, _LOWEST, jnp.float32)
        for ref in (total, *slope):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    if sources == 1:
        x = source[0][...].astype(jnp.float32)
    else:
        x = lax.dot_general(source[0][...], source[1][...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    x = jnp.where(ids == column(1), x - floats[:, 0:1], x)
    logits[...] = jnp.where((here >= vocab) | (ids == forbidden_id), -jnp.inf, x)

    @pl.when(bans[i] != 0)
    def _ban() -> None:
        for m in range(4, ints.shape[1]):
            logits[...] = jnp.where(ids == column(m), -jnp.inf, logits[...])

    x = logits[...]
    largest = jnp.max(x, 1, keepdims=True)
    new = jnp.maximum(peak[...], largest)
    temperature = floats[:, 1:2] if shown.tempered else None
    lower, below = cooled(peak[...] - new, temperature), cooled(x - new, temperature)
    powers = jnp.exp(below)
    for ref in slope:
        here_too = jnp.sum(jnp.where(below == -jnp.inf, 0.0, powers * below), 1, keepdims=True)
        ref[...] = lowered(ref[...], total[...], lower) + here_too
    total[...] = total[...] * jnp.exp(lower) + jnp.sum(powers, 1, keepdims=True)
    best[...] = jnp.where(largest > peak[...], _first(x == largest, ids), best[...])
    peak[...] = new
    current[...] = jnp.maximum(current[...], jnp.max(jnp.where(ids == column(0), x, -jnp.inf), 1, keepdims=True))

    @pl.when(hot[i] != 0)
    def _draw() -> None:
        x = logits[...]
        noisy = x / floats[:, 1:2] + _gumbel(column(2), column(3), ids)
        largest = jnp.max(noisy, 1, keepdims=True)
        at = _first(noisy == largest, ids)
        better = largest > score[...]
        drawn[...] = jnp.where(better, at, drawn[...])
        drawn_logit[...] = jnp.where(better, jnp.max(jnp.where(ids == at, x, -jnp.inf), 1, keepdims=True), drawn_logit[...])
        score[...] = jnp.where(better, largest, score[...])

    if shown.listed:
        _insert(logits, ids, *lists, listed=shown.listed)


def cooled(difference: jax.Array, temperature: jax.Array | None) -> jax.Array:
    return difference if temperature is None else difference / temperature


def lowered(slope: jax.Array, total: jax.Array, by: jax.Array) -> jax.Array:
    """The ``slope`` of a part whose differences to the peak all grow by ``by`` (up to 0): sum of ``(d + by) exp(d + by)``."""
    scale = jnp.exp(by)
    return jnp.where(scale == 0, 0.0, scale * (slope + by * total))


_NO_ID = jnp.iinfo(jnp.int32).max


def _first(where: jax.Array, ids: jax.Array) -> jax.Array:
    """``[rows, 1]``: the lowest id where ``where``."""
    return jnp.min(jnp.where(where, ids, _NO_ID), 1, keepdims=True)


def _insert(logits: Any, ids: jax.Array, top_logits: Any, top_ids: Any, *, listed: int) -> None:
    """Merges a tile into each row's sorted list: as many rounds as the row with most newcomers needs, mostly none.

    A newcomer goes behind its equals: they came from lower ids. The tile's logits are used up.
    """
    lane = lax.broadcasted_iota(jnp.int32, top_logits.shape, 1)

    def newcomers() -> tuple[jax.Array, jax.Array]:
        largest = jnp.max(logits[...], 1, keepdims=True)
        return largest, largest > top_logits[:, listed - 1 : listed]

    def any_left(more: jax.Array) -> jax.Array:
        return more

    def one(more: jax.Array) -> jax.Array:
        largest, wanted = newcomers()
        at = _first(logits[...] == largest, ids)
        old, old_ids = top_logits[...], top_ids[...]
        place = jnp.sum((old >= largest).astype(jnp.int32), 1, keepdims=True)
        place = jnp.where(wanted, place, LANES)
        top_logits[...] = jnp.where(lane < place, old, jnp.where(lane == place, largest, pltpu.roll(old, 1, 1)))
        top_ids[...] = jnp.where(lane < place, old_ids, jnp.where(lane == place, at, pltpu.roll(old_ids, 1, 1)))
        logits[...] = jnp.where(ids == at, -jnp.inf, logits[...])
        return _any(newcomers()[1])

    lax.while_loop(any_left, one, _any(newcomers()[1]))


def _any(where: jax.Array) -> jax.Array:
    return jnp.max(where.astype(jnp.float32)) > 0


def _gumbel(key_0: jax.Array, key_1: jax.Array, ids: jax.Array) -> jax.Array:
    """Element ``ids`` of ``jax.random.gumbel(key, [V])``, bit for bit as far as ``log`` agrees.

    With partitionable threefry (JAX's default) an element's random bits depend on the key and its index alone: two words of
    Threefry-2x32-20 (Salmon et al., SC'11) over the counter ``(0, index)``, combined by exclusive or.
    """
    keys = key_0, key_1, key_0 ^ key_1 ^ 0x1BD11BDA
    a, b = jnp.zeros_like(ids) + key_0, ids + key_1
    for group in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            a = a + b
            b = a ^ (lax.shift_left(b, jnp.full_like(b, distance)) | lax.shift_right_logical(b, jnp.full_like(b, 32 - distance)))
        a, b = a + keys[(group + 1) % 3], b + keys[(group + 2) % 3] + (group + 1)
    mantissa = lax.shift_right_logical(a ^ b, jnp.full_like(a, 9)) | 0x3F800000
    tiny = float(jnp.finfo(jnp.float32).tiny)
    uniform = lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0
    return -jnp.log(-jnp.log(jnp.maximum(uniform * (1.0 - tiny) + tiny, tiny)))
