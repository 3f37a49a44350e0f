"""lm_head and prediction in one pass over the vocabulary on Hopper GPUs (Mosaic GPU).

Every thread block owns a range of the vocabulary and keeps, per hidden row, the running maximum, its id, the sum of
exponentials and the current token's logit; a small XLA reduction joins the ranges. Logits live in registers only. Devices that share
the vocabulary exchange these four numbers a row.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.prediction import reference
from pallas_kernels.prediction.reference import Best, Sampling


_TILE_K = 64  # bf16 elements of one 128-byte swizzled row
_CHUNK = 40  # columns reduced at a time, so that their temporaries fit the registers
_NOBODY = -1e30  # below every logit, finite: differences of two of them are no NaN
_LOG2E = math.log2(math.e)
_NO_ID = 2**31 - 1
_MULTIPROCESSORS = 132  # of an H100 or H200

Stats = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Per row, of some part of the vocabulary: maximum logit, sum of exponentials relative to it, its lowest id, current token's logit."""


class Tiling(NamedTuple):
    """How rows and vocabulary are cut: static."""

    rows: int  # hidden rows of one thread block: 64, or 128 shared by two warpgroups
    tile: int  # vocabulary rows of one tile
    tiles: int  # tiles of one thread block
    stages: int  # depth of the shared-memory pipeline


def tiling(rows: int, vocab: int) -> Tiling:
    """A tiling in which all thread blocks get nearly the same share of the vocabulary."""
    block = 64 if rows <= 64 else 128
    tiles = -(-vocab // (_MULTIPROCESSORS * 240))
    tile = -(-vocab // (_MULTIPROCESSORS * tiles * 8)) * 8
    return Tiling(block, tile, tiles, min(6, 200 * 1024 // ((block + tile) * _TILE_K * 2)))


def _body(x: Any, w: Any, ids: Any, *refs: Any, plan: Tiling, forbidden_id: int) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    *out_refs, x_smem, w_smem, special_smem, full, empty, marked = refs
    vocab, width = w.shape
    steps_k = width // _TILE_K
    steps = plan.tiles * steps_k
    warpgroups = plan.rows // 64
    part, wg = lax.axis_index("part"), lax.axis_index("wg")
    row0, vocab0 = lax.axis_index("rows") * plan.rows, part * (plan.tiles * plan.tile)
    per_row = plgpu.Layout.WGMMA.reduce(1)

    def slot_of(step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(plan.stages))

    @pl.when(wg == warpgroups)
    def _fetch() -> None:
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, steps)
        def _(step: jax.Array) -> None:
            slot = slot_of(step)

            @pl.when(step >= plan.stages)
            def _() -> None:
                plgpu.barrier_wait(empty.at[slot])

            tile, k = lax.div(step, jnp.int32(steps_k)), lax.rem(step, jnp.int32(steps_k))
            columns = pl.ds(k * _TILE_K, _TILE_K)
            plgpu.copy_gmem_to_smem(w.at[pl.ds(vocab0 + tile * plan.tile, plan.tile), columns], w_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(x.at[pl.ds(row0, plan.rows), columns], x_smem.at[slot], full.at[slot])

        @pl.loop(max(0, steps - plan.stages), steps)
        def _(step: jax.Array) -> None:
            plgpu.barrier_wait(empty.at[slot_of(step)])

    @pl.when(wg < warpgroups)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")

        load: Any = plgpu.load  # JAX 0.10 types its index as required

        def of_rows(ref: Any, at: Any = wg) -> jax.Array:
            return load(ref.at[pl.ds(row0 + at * 64, 64)], layout=per_row, optimized=False)

        # One warpgroup does this for all: reductions to a scalar of two warpgroups would share their scratch memory.
        @pl.when(wg == 0)
        def _mark_tiles_with_tokens_that_some_row_treats_apart() -> None:
            tokens = [of_rows(ids.at[j], at) for j in (0, 1, *range(3, ids.shape[0])) for at in range(warpgroups)]

            @pl.loop(0, plan.tiles)
            def _(tile: jax.Array) -> None:
                first = vocab0 + tile * plan.tile

                def inside(token: Any) -> Any:
                    return ((token >= first) & (token < first + plan.tile)).astype(jnp.int32)

                named = functools.reduce(jnp.maximum, [inside(t) for t in tokens]).max()
                beyond = (first + plan.tile > vocab).astype(jnp.int32)
                special_smem[tile] = functools.reduce(jnp.maximum, (named, inside(jnp.int32(forbidden_id)), beyond))

            plgpu.barrier_arrive(marked)

        plgpu.barrier_wait(marked)

        def product(accumulator: Any, tile: jax.Array) -> jax.Array:
            @pl.loop(0, steps_k)
            def _(k: jax.Array) -> None:
                step = tile * steps_k + k
                plgpu.barrier_wait(full.at[slot_of(step)])
                plgpu.wgmma(accumulator, x_smem.at[slot_of(step), pl.ds(wg * 64, 64)], w_smem.at[slot_of(step)].transpose((1, 0)))
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _() -> None:
                    plgpu.barrier_arrive(empty.at[slot_of(step - 1)])

            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(empty.at[slot_of(tile * steps_k + steps_k - 1)])
            return accumulator[...]

        def one_tile(tile: jax.Array, stats: Stats) -> Stats:
            logits = pl.run_scoped(functools.partial(product, tile=tile), plgpu.ACC((64, plan.tile), jnp.float32))
            first = vocab0 + tile * plan.tile

            def join(masked: bool) -> Stats:
                out = stats
                for at in range(0, plan.tile, _CHUNK):
                    out = update(logits[:, at : at + _CHUNK], first + at, out, masked)
                return out

            return lax.cond(special_smem[tile] > 0, lambda: join(True), lambda: join(False))

        def update(logits: jax.Array, first: jax.Array, stats: Stats, masked: bool) -> Stats:
            peak, total, best, current = stats
            local = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)

            def spread(a: jax.Array) -> jax.Array:
                return lax.broadcast_in_dim(a, logits.shape, (0,))

            def is_token(j: int) -> jax.Array:
                return local == spread(of_rows(ids.at[j]) - first)

            if masked:
                penalty = lax.bitcast_convert_type(of_rows(ids.at[2]), jnp.float32)
                logits = jnp.where(is_token(1), logits - spread(penalty), logits)
                logits = jnp.where((local >= vocab - first) | (local == forbidden_id - first), -jnp.inf, logits)
                for j in range(3, ids.shape[0]):
                    logits = jnp.where(is_token(j), -jnp.inf, logits)
                current = jnp.maximum(current, jnp.where(is_token(0), logits, -jnp.inf).max(1))

            top = logits.max(1)
            at = jnp.where(logits == spread(top), local, _NO_ID).min(1)
            best = jnp.where(top > peak, first + at, best)
            new = jnp.maximum(peak, top)
            p = jnp.exp2(logits * _LOG2E - spread(new * _LOG2E))
            return new, total * jnp.exp2((peak - new) * _LOG2E) + p.sum(1), best, current

        start = tuple(plgpu.layout_cast(jnp.full((64,), x), per_row) for x in _nothing())
        for ref, value in zip(out_refs, lax.fori_loop(0, plan.tiles, one_tile, start), strict=True):
            ref.at[part, pl.ds(row0 + wg * 64, 64)][...] = value


def _nothing() -> tuple[Any, ...]:
    """:data:`Stats` of no token."""
    return jnp.float32(_NOBODY), jnp.float32(0), jnp.int32(_NO_ID), jnp.float32(-jnp.inf)


def _join(a: Any, b: Any) -> Any:
    """:data:`Stats` of two parts of the vocabulary together."""
    peak = jnp.maximum(a[0], b[0])
    total = a[1] * jnp.exp(a[0] - peak) + b[1] * jnp.exp(b[0] - peak)
    left = (a[0] > b[0]) | ((a[0] == b[0]) & (a[2] < b[2]))
    return peak, total, jnp.where(left, a[2], b[2]), jnp.maximum(a[3], b[3])


@functools.partial(jax.jit, static_argnames=("forbidden_id", "plan"))  # traced, and made a kernel of, once for all its uses
def reduce_vocabulary(hidden: jax.Array, lm_head: jax.Array, ids: jax.Array, *, forbidden_id: int, plan: Tiling | None = None) -> Stats:
    """:data:`Stats` of all rows of ``lm_head``.

    Args:
      hidden: ``[R, D]`` bfloat16, D a multiple of 64.
      lm_head: ``[V, D]`` bfloat16, V a multiple of 8.
      ids: ``[3 + M, R]`` int32: current token, penalised token, the bits of its float32 penalty, then the banned ids;
        negative ids: none.
      forbidden_id: left out for all rows.
      plan: how to cut; chosen by shape if not given.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows, vocab = len(hidden), len(lm_head)
    plan = plan or tiling(rows, vocab)
    blocks = -(-rows // plan.rows)
    padded = jnp.pad(ids, ((0, 0), (0, blocks * plan.rows - rows)), constant_values=-1)
    parts = -(-vocab // (plan.tile * plan.tiles))
    swizzled = (plgpu.TilingTransform((8, _TILE_K)), plgpu.SwizzleTransform(128))
    kernel = plgpu.kernel(
        functools.partial(_body, plan=plan, forbidden_id=forbidden_id),
        out_type=[jax.ShapeDtypeStruct((parts, blocks * plan.rows), x.dtype) for x in _nothing()],
        scratch_types=[
            plgpu.SMEM((plan.stages, plan.rows, _TILE_K), hidden.dtype, transforms=swizzled),
            plgpu.SMEM((plan.stages, plan.tile, _TILE_K), lm_head.dtype, transforms=swizzled),
            plgpu.SMEM((plan.tiles,), jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=plan.rows // 64, num_barriers=plan.stages),
            plgpu.Barrier(),
        ],
        grid=(parts, blocks),
        grid_names=("part", "rows"),
        num_threads=plan.rows // 64 + 1,
        thread_name="wg",
        kernel_name="lm_head_prediction",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    stats = kernel(jnp.pad(hidden, ((0, -rows % 8), (0, 0))), lm_head, padded)
    return tuple(a[:rows] for a in lax.reduce(tuple(stats), _nothing(), _join, (0,)))


def greedy(
    hidden: jax.Array,
    lm_head: jax.Array,
    current: jax.Array,
    *,
    forbidden_id: int,
    top_k: int,
    penalized: jax.Array | None = None,
    penalty: jax.Array | None = None,
    banned: jax.Array | None = None,
    vocab_axes: tuple[str, ...] = (),
) -> Best:
    """What the reference gives for rows of temperature 0 and ``top_k`` up to 1."""
    none = jnp.full_like(current, -1)
    if penalized is None or penalty is None:
        penalized, penalty = none, jnp.zeros(len(current), jnp.float32)
    bits = lax.bitcast_convert_type(penalty, jnp.int32)
    ids = jnp.stack([current, jnp.where(penalty != 0, penalized, -1), bits, *([] if banned is None else banned.T)])
    reduce = functools.partial(_reduce_shared, axes=vocab_axes) if vocab_axes else reduce_vocabulary
    peak, total, best, current_logit = reduce(hidden, lm_head, ids, forbidden_id=forbidden_id)
    token = jnp.minimum(best, len(lm_head) * math.prod(map(lax.axis_size, vocab_axes)) - 1)  # a row of NaN has no best token
    prob, top = 1 / total, (slice(None), slice(top_k))
    return Best(token, prob, jnp.exp(current_logit - peak) / total, token[:, None][top], prob[:, None][top])


def _reduce_shared(hidden: jax.Array, lm_head: jax.Array, ids: jax.Array, *, forbidden_id: int, axes: tuple[str, ...]) -> Stats:
    """:func:`reduce_vocabulary` of the vocabulary that the devices of ``axes`` share, after one exchange of 16 bytes a row."""
    vocab = len(lm_head)
    first = lax.axis_index(axes) * vocab
    # All devices run one program, and the forbidden id is not on all of them: there it is one more that is banned.
    ids = jnp.concatenate([ids, jnp.full_like(ids[:1], forbidden_id)])
    own = jnp.where((ids >= first) & (ids < first + vocab), ids - first, -1).at[2].set(ids[2])
    peak, total, best, current = reduce_vocabulary(hidden, lm_head, own, forbidden_id=-1)
    floats = jnp.stack([peak, total, current])
    found = jnp.stack([*lax.bitcast_convert_type(floats, jnp.int32), jnp.where(best < vocab, best + first, _NO_ID)])
    everyones = lax.all_gather(found, axes)
    peak, total, current = jnp.moveaxis(lax.bitcast_convert_type(everyones[:, :3], jnp.float32), 1, 0)
    return lax.reduce((peak, total, everyones[:, 3], current), _nothing(), _join, (0,))


def predict_from_hidden(
    hidden: jax.Array,
    lm_head: jax.Array,
    current: jax.Array,
    *,
    sampling: Sampling | None,
    top_k: int = 0,
    tempered: bool = False,
    entropy: bool = False,
    vocab_axes: tuple[str, ...] = (),
    **options: Any,
) -> Best:
    """See the package's ``predict_from_hidden``.

    The kernel serves bfloat16 and one candidate at most. Rows that sample take the reference, and so do more candidates, the entropy and
    other dtypes.
    """
    vocab, width = lm_head.shape
    asked: dict[str, Any] = {"sampling": sampling, "top_k": top_k, "tempered": tempered, "entropy": entropy, "vocab_axes": vocab_axes}
    tiled = width % _TILE_K == 0 and vocab % 8 == 0  # shared memory is laid out in tiles of 8 rows
    if entropy or top_k > 1 or not tiled or not hidden.dtype == lm_head.dtype == jnp.bfloat16:
        return reference.predict_from_hidden(hidden, lm_head, current, **asked, **options)
    best = greedy(hidden, lm_head, current, top_k=top_k, vocab_axes=vocab_axes, **options)
    if sampling is None:
        return best
    return reference.redone(best, sampling.temperature > 0, hidden, lm_head, current, **asked, **options)
