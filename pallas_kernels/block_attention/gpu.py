"""Block attention over pages on Hopper GPUs (Mosaic GPU): one launch, pages fetched where they lie.

A thread block attends for some query heads of one key/value head and one block of the window. Its keys are a list of pages:
the row's cached prefix, the pending block, and the window's blocks up to its own. One warpgroup fetches them ahead;
the others keep a running softmax in registers (the scheme of FlashAttention-3, arXiv 2407.08608), and where there is room for
it take turns at the pages and join what they have at the end.

A block of too few positions for a tile of the tensor cores is padded to one of more. Then prefixes end anywhere in a page of such a tile:
what lies behind their end is masked, and its values, which may be anything, are zeroed before they meet a weight of zero.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_attention import reference
from pallas_kernels.block_attention.reference import Keys


_STEP = 64  # keys a step
_NEVER = -1e30  # a finite mask value, as in the reference
_MULTIPROCESSORS = 132  # of an H100 or H200


class Plan(NamedTuple):
    """How the work is cut: static."""

    padded: int  # positions of a block as a tile has them, and of what counts as a page here; the block's own are the first of them
    heads: int  # query heads of one thread block; with the padded block's positions they make 64 or 128 rows
    turns: int  # warpgroups that share the steps of 64 rows
    stages: int  # steps fetched ahead, a multiple of turns


def plan_for(heads: jax.Array, pool: jax.Array, block: int) -> Plan | None:
    """A plan for heads ``[R, W, KV, G + 2, H]`` and a pool ``[L, N, P, KV, H]``; None where no tile fits."""
    rows, width, kv, packed, head = heads.shape
    group = packed - 2
    fits = [n for n in (8, 16, 32, 64) if n >= block and group % (64 // n) == 0 and pool.shape[2] % n == 0]
    if not fits or not heads.dtype == pool.dtype == jnp.bfloat16 or head not in (64, 128):
        return None
    padded = fits[0]
    # Keys are read once for 128 rows rather than twice for 64 where that leaves no multiprocessor idle.
    tiles = rows * (width // block) * padded * kv * group // 64
    if tiles > _MULTIPROCESSORS and group % (128 // padded) == 0:
        return Plan(padded, 128 // padded, 1, 4)
    return Plan(padded, 64 // padded, 2, 4)


def _product(a: Any, b: Any) -> jax.Array:
    """``a @ b`` on the tensor cores in float32; ``a`` in shared memory or registers, ``b`` in shared memory."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def into(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(into, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _body(
    heads: Any,
    pool_k: Any,
    pool_v: Any,
    pending: Any,
    prefix_len: Any,
    pending_live: Any,
    alive: Any,
    table: Any,
    layer: Any,
    out: Any,
    q_smem: Any,
    k_smem: Any,
    v_smem: Any,
    q_full: Any,
    k_full: Any,
    v_full: Any,
    empty: Any,
    *joining: Any,
    plan: Plan,
    own: int,
    whole: bool,
    pending_blocks: int,
    kv_heads: int,
    pool_pages: int,
    scale: float,
) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    block, head = plan.padded, q_smem.shape[-1]
    lanes = alive.shape[1]
    group = heads.shape[1] // (kv_heads * head) - 2
    per_step = _STEP // block
    tiles = plan.heads * block // 64
    row, lane, head_block, wg = (lax.axis_index(a) for a in ("row", "lane", "heads", "wg"))
    kv = head_block // (group // plan.heads)
    queries = pl.ds((row * lanes + lane) * block, block)

    def columns(at: jax.Array) -> Any:
        return pl.ds(at * head, head)

    # In packed heads a key and a value follow the queries of each key/value head.
    first_query, key = head_block * plan.heads + 2 * kv, kv * (group + 2) + group
    in_pool, in_pending, in_window = ((pool_k, kv), (pool_v, kv)), ((pending, key), (pending, key + 1)), ((heads, key), (heads, key + 1))

    complete = lax.div(prefix_len[row], jnp.int32(block))
    left = jnp.int32(0) if whole else lax.rem(prefix_len[row], jnp.int32(block))  # positions of a last page that ends before its end
    prefix = complete if whole else complete + jnp.minimum(left, 1)
    fixed = prefix + (pending_live[row].astype(jnp.int32) * pending_blocks if pending_blocks else 0)
    pages = jnp.where(alive[row, lane], fixed + lane + 1, 0)
    steps = lax.div(pages + (per_step - 1), jnp.int32(per_step))

    def slot_of(step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(plan.stages))

    @pl.when(wg == tiles * plan.turns)
    def _fetch() -> None:
        for h in range(plan.heads):
            plgpu.copy_gmem_to_smem(heads.at[queries, columns(first_query + h)], q_smem.at[pl.ds(h * block, block)], q_full)

        first_page = layer[0] * pool_pages

        @pl.loop(0, steps)
        def _(step: jax.Array) -> None:
            slot = slot_of(step)
            numbers = [table[row, jnp.minimum(step * per_step + j, table.shape[1] - 1)] for j in range(per_step)]

            @pl.when(step >= plan.stages)
            def _() -> None:
                plgpu.barrier_wait(empty.at[slot])

            for j, number in enumerate(numbers):
                page = jnp.minimum(step * per_step + j, pages - 1)
                to = pl.ds(j * block, block)

                def fetch(source: Any, first: jax.Array, slot: jax.Array = slot, to: Any = to) -> None:
                    for (array, at), smem, full in zip(source, (k_smem, v_smem), (k_full, v_full), strict=True):
                        plgpu.copy_gmem_to_smem(array.at[pl.ds(first, block), columns(at)], smem.at[slot, to], full.at[slot])

                def fetch_window(page: jax.Array = page, fetch: Any = fetch) -> None:
                    # A lane that does not exist may hold anything; the mask hides what stands in for it.
                    lane_at = jnp.where(alive[row, page - fixed], page - fixed, lane)
                    fetch(in_window, (row * lanes + lane_at) * block)

                pl.when(page < prefix)(functools.partial(fetch, in_pool, (first_page + number) * block))
                if pending_blocks:
                    at = (row * pending_blocks + page - prefix) * block
                    pl.when((page >= prefix) & (page < fixed))(functools.partial(fetch, in_pending, at))
                pl.when(page >= fixed)(fetch_window)

        @pl.loop(jnp.maximum(steps - plan.stages, 0), steps)
        def _(step: jax.Array) -> None:
            plgpu.barrier_wait(empty.at[slot_of(step)])

    @pl.when(wg < tiles * plan.turns)
    def _compute() -> None:
        turn, tile = lax.div(wg, jnp.int32(tiles)), lax.rem(wg, jnp.int32(tiles))
        mine = pl.ds(tile * 64, 64)
        per_row = plgpu.Layout.WGMMA.reduce(1)
        load: Any = plgpu.load  # JAX 0.10 types its index as required

        def spread(a: jax.Array, width: int) -> jax.Array:
            return lax.broadcast_in_dim(a, (64, width), (0,))

        def attend(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            acc, peak, total = carry
            step = i * plan.turns + turn
            slot = slot_of(step)
            plgpu.barrier_wait(k_full.at[slot])
            s = _product(q_smem.at[mine], k_smem.at[slot].transpose((1, 0)))

            def hide(s: jax.Array) -> jax.Array:
                column = plgpu.broadcasted_iota(jnp.int32, (64, _STEP), 1, layout=plgpu.Layout.WGMMA)
                for j in range(per_step):
                    page = step * per_step + j
                    lane_at = jnp.clip(page - fixed, 0, lanes - 1)
                    seen = (page < fixed) | (page == pages - 1) | ((page < pages) & alive[row, lane_at])
                    if whole:
                        s = jnp.where((column // block == j) & ~seen, _NEVER, s)
                    else:
                        there = jnp.where(page < complete, block, jnp.where(page < prefix, left, own))
                        end = j * block + jnp.where(seen, there, 0)
                        s = jnp.where((column // block == j) & (column >= end), _NEVER, s)
                return s

            s = lax.cond((step + 1) * per_step > (fixed if whole else complete), hide, lambda s: s, s)
            new = jnp.maximum(peak, s.max(1) * scale)
            decay = jnp.exp2(peak - new)
            p = jnp.exp2(s * scale - spread(new, _STEP))
            total = total * decay + p.sum(1)
            plgpu.barrier_wait(v_full.at[slot])
            if not whole:

                @pl.when((left > 0) & (lax.div(complete, jnp.int32(per_step)) == step))
                def _zero() -> None:
                    value = plgpu.broadcasted_iota(jnp.int32, (_STEP, head), 0, layout=plgpu.Layout.WGMMA)
                    first = lax.rem(complete, jnp.int32(per_step)) * block
                    kept = load(v_smem.at[slot], layout=plgpu.Layout.WGMMA, optimized=False)
                    v_smem.at[slot][...] = jnp.where((value >= first + left) & (value < first + block), jnp.zeros_like(kept), kept)
                    plgpu.commit_smem()

            acc = acc * spread(decay, head) + _product(p.astype(v_smem.dtype), v_smem.at[slot])
            plgpu.barrier_arrive(empty.at[slot])
            return acc, new, total

        plgpu.barrier_wait(q_full)
        zero = plgpu.layout_cast(jnp.zeros((64, head), jnp.float32), plgpu.Layout.WGMMA)
        none = (zero, *(plgpu.layout_cast(jnp.full((64,), x, jnp.float32), per_row) for x in (_NEVER, 0.0)))
        turns = lax.div(steps - turn + (plan.turns - 1), jnp.int32(plan.turns))
        acc, peak, total = lax.fori_loop(0, turns, attend, none)

        def write(acc: jax.Array, total: jax.Array) -> None:
            q_smem[mine, :] = (acc / spread(jnp.maximum(total, 1e-30), head)).astype(q_smem.dtype)
            plgpu.commit_smem()
            for h in range(64 // block):
                head_at = head_block * plan.heads + tile * (64 // block) + h
                rows = pl.ds(tile * 64 + h * block, block)
                plgpu.copy_smem_to_gmem(q_smem.at[rows], out.at[queries, pl.ds(head_at * head, head)])
            plgpu.wait_smem_to_gmem(0)

        if plan.turns == 1:
            write(acc, total)
            return
        acc_smem, peak_smem, total_smem, ready = joining

        @pl.when(turn > 0)
        def _leave() -> None:
            acc_smem[turn - 1, mine, :] = acc
            peak_smem.at[turn - 1, mine][...] = peak
            total_smem.at[turn - 1, mine][...] = total
            plgpu.barrier_arrive(ready.at[tile])

        @pl.when(turn == 0)
        def _join() -> None:
            plgpu.barrier_wait(ready.at[tile])
            peaks = [peak] + [load(peak_smem.at[t, mine], layout=per_row, optimized=False) for t in range(plan.turns - 1)]
            best = functools.reduce(jnp.maximum, peaks)
            weights = [jnp.exp2(p - best) for p in peaks]
            joined, sums = acc * spread(weights[0], head), total * weights[0]
            for t, w in enumerate(weights[1:]):
                joined += acc_smem[t, mine, :] * spread(w, head)
                sums += load(total_smem.at[t, mine], layout=per_row, optimized=False) * w
            write(joined, sums)


def block_attention(
    heads: jax.Array,
    keys: Keys,
    *,
    layer: jax.Array,
    block: int,
    pending: tuple[jax.Array, jax.Array] | None = None,
    whole_blocks: bool = True,
    plan: Plan | None = None,
) -> jax.Array:
    """See the package's ``block_attention``. Rows of lanes that do not exist are zero; shapes that no tile fits take the reference.

    A page of several blocks, padded where the plan says so, is as many pages of one, which lie one after the other.
    """
    plan = plan or plan_for(heads, keys.pool_k, block)
    if plan is None:
        return reference.block_attention(heads, keys, layer=layer, block=block, pending=pending)
    whole = whole_blocks and plan.padded == block
    options: dict[str, Any] = {"layer": layer, "block": block, "plan": plan, "whole": whole}
    if plan.padded == block:
        return _tiled(heads, keys, **options, pending=pending)

    def padded(heads: jax.Array) -> jax.Array:
        blocks = heads.reshape(len(heads), -1, block, *heads.shape[2:])
        room = [(0, plan.padded - block) if axis == 2 else (0, 0) for axis in range(blocks.ndim)]
        return jnp.pad(blocks, room).reshape(len(heads), -1, *heads.shape[2:])

    pending = None if pending is None else (padded(pending[0]), pending[1])
    out = _tiled(padded(heads), keys, **options, pending=pending)
    return out.reshape(len(out), -1, plan.padded, *out.shape[2:])[:, :, :block].reshape(*heads.shape[:2], *out.shape[2:])


@functools.partial(jax.jit, static_argnames=("block", "plan", "whole"))  # traced, and made a kernel of, once for all its uses
def _tiled(
    heads: jax.Array,
    keys: Keys,
    *,
    layer: jax.Array,
    block: int,
    pending: tuple[jax.Array, jax.Array] | None,
    plan: Plan,
    whole: bool,
) -> jax.Array:
    """The kernel, over blocks that are padded already; ``whole``: all their positions are tokens, and prefixes are whole pages."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows, width, kv, packed, head = heads.shape
    pool_k, pool_v, table, prefix_len, lanes = keys
    group, count, per_page = packed - 2, lanes.shape[1], pool_k.shape[2] // plan.padded
    if per_page > 1:
        table = (table[..., None] * per_page + jnp.arange(per_page, dtype=jnp.int32)).reshape(rows, -1)
    unwritten, live = (heads, prefix_len) if pending is None else pending  # without a pending block, neither is read

    tile = plan.heads * plan.padded
    tiles = tile // 64
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    stored = plgpu.SMEM((plan.stages, _STEP, head), heads.dtype, transforms=swizzled)
    fetched = plgpu.Barrier(num_arrivals=_STEP // plan.padded, num_barriers=plan.stages)
    scratch: list[Any] = [
        plgpu.SMEM((tile, head), heads.dtype, transforms=swizzled),
        stored,
        stored,
        plgpu.Barrier(num_arrivals=plan.heads),
        fetched,
        fetched,
        plgpu.Barrier(num_arrivals=tiles, num_barriers=plan.stages),
    ]
    if plan.turns > 1:
        left = plan.turns - 1
        scratch += [
            plgpu.SMEM((left, tile, head), jnp.float32, transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))),
            plgpu.SMEM((left, tile), jnp.float32),
            plgpu.SMEM((left, tile), jnp.float32),
            plgpu.Barrier(num_arrivals=left, num_barriers=tiles),
        ]
    body = functools.partial(
        _body,
        plan=plan,
        own=block,
        whole=whole,
        pending_blocks=0 if pending is None else unwritten.shape[1] // plan.padded,
        kv_heads=kv,
        pool_pages=pool_k.shape[1] * per_page,
        scale=head**-0.5 * math.log2(math.e),
    )
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows * width, kv * group * head), heads.dtype),
        scratch_types=scratch,
        grid=(kv * group // plan.heads, count, rows),
        grid_names=("heads", "lane", "row"),
        num_threads=tiles * plan.turns + 1,
        thread_name="wg",
        kernel_name="block_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    flat = [a.reshape(-1, math.prod(a.shape[-n:])) for a, n in ((heads, 3), (pool_k, 2), (pool_v, 2), (unwritten, 3))]
    out = kernel(*flat, prefix_len, live, lanes, table, layer.reshape(1))
    return out.reshape(rows, width, kv, group, head)
