"""Which experts many tokens go to, with Mosaic GPU, and what counting them gives on the way.

A block takes 64 tokens, as rows of what a tensor core holds in registers, and gives each of four warpgroups a quarter of the
experts: every warpgroup finds its own best few, and all then look for the best among those. Its time, 24 microseconds on an H100,
hardly depends on how many tokens there are; below several hundred, XLA is as quick.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.expert_choice.reference import Choice, Router


TOKENS = 64
"""Tokens of one block: the rows of the smallest wgmma."""

_WARPGROUPS = 4
_LAST = 2**31 - 1


def fits(experts: int, router: Router) -> bool:
    """Whether :func:`choose` can: by sigmoids; groups lie within a warpgroup's share, which is made of swizzled tiles of 64."""
    share, size = experts // _WARPGROUPS, experts // router.groups
    shaped = experts % (64 * _WARPGROUPS) == 0 and size % 8 == 0 and share % size == 0 and share <= 128
    return router.score == "sigmoid" and shaped and router.top_k % 8 == 0


@functools.partial(jax.jit, static_argnames="router")  # traced once for all its uses
def choose(logits: jax.Array, bias: jax.Array, valid: jax.Array | None, router: Router) -> Choice:
    """See the package's ``choose``; ``logits`` ``[N, E]`` float32. A score is a sigmoid; of what is not a number it counts as 0.5."""
    tokens, experts = logits.shape
    top_k, groups = router.top_k, router.groups
    blocks, share = -(-tokens // TOKENS), experts // _WARPGROUPS
    counted = jnp.ones(tokens, jnp.float32) if valid is None else valid.astype(jnp.float32)
    swizzle = plgpu.SwizzleTransform(128)
    rows = blocks * TOKENS
    kernel = plgpu.kernel(
        functools.partial(_choose, router=router),
        out_type=[
            jax.ShapeDtypeStruct((rows, top_k), jnp.int32),
            jax.ShapeDtypeStruct((rows, top_k), jnp.float32),
            jax.ShapeDtypeStruct((rows, experts), jnp.float32),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=_WARPGROUPS,
        thread_name="worker",
        kernel_name="choose_experts",
        scratch_types={
            "logits_s": plgpu.SMEM((_WARPGROUPS, TOKENS, share), jnp.float32, transforms=(plgpu.TilingTransform((8, 32)), swizzle)),
            "chosen_s": plgpu.SMEM((_WARPGROUPS, TOKENS, share), jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), swizzle)),
            "earlier_s": plgpu.SMEM((_WARPGROUPS, TOKENS, TOKENS), jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), swizzle)),
            "sums_s": plgpu.SMEM((groups, TOKENS), jnp.float32),
            "values_s": plgpu.SMEM((_WARPGROUPS, TOKENS, top_k), jnp.float32),
            "ids_s": plgpu.SMEM((_WARPGROUPS, TOKENS, top_k), jnp.int32),
            "scores_s": plgpu.SMEM((_WARPGROUPS, TOKENS, top_k), jnp.float32),
            "loaded": plgpu.Barrier(num_barriers=_WARPGROUPS),
            "summed": plgpu.Barrier(num_arrivals=_WARPGROUPS),
            "listed": plgpu.Barrier(num_arrivals=_WARPGROUPS),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    ids, weights, upto = kernel(jnp.pad(logits, ((0, -tokens % 8), (0, 0))), bias.astype(jnp.float32), jnp.pad(counted, (0, rows - tokens)))
    # The kernel counts among the tokens of a block.
    upto = upto.astype(jnp.int32).reshape(blocks, TOKENS, experts)
    size = upto[:, -1]
    before = jnp.cumsum(size, 0) - size
    nth = jnp.take_along_axis((upto + before[:, None]).reshape(rows, experts), ids, 1) - 1
    return Choice(ids[:tokens], weights[:tokens], (nth[:tokens], size.sum(0)))


def _choose(
    logits_g: Any,
    bias_g: Any,
    counted_g: Any,
    ids_g: Any,
    weights_g: Any,
    upto_g: Any,
    *,
    logits_s: Any,
    chosen_s: Any,
    earlier_s: Any,
    sums_s: Any,
    values_s: Any,
    ids_s: Any,
    scores_s: Any,
    loaded: Any,
    summed: Any,
    listed: Any,
    router: Router,
) -> None:
    top_k, groups, kept = router.top_k, router.groups, router.kept
    load: Any = plgpu.load  # JAX 0.10 types its index as required
    worker, block = lax.axis_index("worker"), lax.axis_index("block")
    share = chosen_s.shape[2]
    first, size = worker * share, share * _WARPGROUPS // groups
    rows, mine = pl.ds(block * TOKENS, TOKENS), pl.ds(worker * share, share)
    per_row, per_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def spread(a: jax.Array, like: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(a, like.shape, (0,))

    def of_rows(ref: Any) -> jax.Array:
        return load(ref, layout=per_row, optimized=False)

    plgpu.copy_gmem_to_smem(logits_g.at[rows, mine], logits_s.at[worker], loaded.at[worker])
    local = plgpu.broadcasted_iota(jnp.int32, (TOKENS, share), 1, layout=plgpu.Layout.WGMMA)
    before = [plgpu.broadcasted_iota(jnp.int32, (TOKENS, TOKENS), axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)]
    earlier_s[worker] = jnp.where(before[1] <= before[0], 1.0, 0.0).astype(jnp.bfloat16)
    bias = lax.broadcast_in_dim(load(bias_g.at[mine], layout=per_column, optimized=False), local.shape, (1,))
    counted = spread(of_rows(counted_g.at[rows]), local)
    plgpu.barrier_wait(loaded.at[worker])
    logit = logits_s[worker]
    score = 1 / (1 + jnp.exp(-jnp.where(logit == logit, logit, 0.0)))  # what is not a number would be counted in no expert's rows
    biased = score + bias

    if kept < groups:
        own = range(share // size)
        for g in own:
            x, at = (a[:, g * size : (g + 1) * size] for a in (biased, local))
            best = x.max(1)
            where = jnp.where(x == spread(best, x), at, _LAST).min(1)
            second = jnp.where(at == spread(where, x), -jnp.inf, x).max(1)
            sums_s.at[worker * len(own) + g][...] = best + second
        plgpu.barrier_arrive(summed)
        plgpu.barrier_wait(summed)
        sums = [of_rows(sums_s.at[g]) for g in range(groups)]
        for g in own:
            nth = worker * len(own) + g
            own_sum = of_rows(sums_s.at[nth])
            before_it = [(s > own_sum) | ((s == own_sum) & (other < nth)) for other, s in enumerate(sums)]
            ahead = functools.reduce(jnp.add, [a.astype(jnp.int32) for a in before_it])
            biased = jnp.where((local // size == g) & (spread(ahead, local) >= kept), -jnp.inf, biased)

    def best_of(values: list[jax.Array], ids: list[jax.Array], scores: list[jax.Array]) -> tuple[Any, ...]:
        """Of each row the best's value, id and score, and what is left."""
        best = functools.reduce(jnp.maximum, values).max(1)
        found = [jnp.where(v == spread(best, v), i, _LAST) for v, i in zip(values, ids, strict=True)]
        at = functools.reduce(jnp.minimum, found).min(1)
        hits = [i == spread(at, i) for i in ids]
        score = functools.reduce(jnp.add, [jnp.where(h, s, 0.0) for h, s in zip(hits, scores, strict=True)]).sum(1)
        return best, at, score, [jnp.where(h, -jnp.inf, v) for h, v in zip(hits, values, strict=True)]

    def filled(shape: tuple[int, ...], value: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full(shape, value), plgpu.Layout.WGMMA if len(shape) == 2 else per_row)

    column = plgpu.broadcasted_iota(jnp.int32, (TOKENS, top_k), 1, layout=plgpu.Layout.WGMMA)

    def own_best(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        biased, *lists = carry
        *found, (biased,) = best_of([biased], [first + local], [score])
        return biased, *(jnp.where(column == j, spread(a, column), b) for a, b in zip(found, lists, strict=True))

    lists = filled((TOKENS, top_k), 0.0), filled((TOKENS, top_k), 0), filled((TOKENS, top_k), 0.0)
    _, values_s[worker], ids_s[worker], scores_s[worker] = lax.fori_loop(0, top_k, own_best, (biased, *lists))
    plgpu.barrier_arrive(listed)
    plgpu.barrier_wait(listed)
    values, ids, scores = (
        [load(s.at[w], layout=plgpu.Layout.WGMMA, optimized=False) for w in range(_WARPGROUPS)] for s in (values_s, ids_s, scores_s)
    )

    def best_of_all(j: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        values, at_j, score_j, chosen, total = carry
        _, at, score, values = best_of(values, ids, scores)
        chosen = jnp.where(local == spread(at - first, local), counted, chosen)
        at_j, score_j = (jnp.where(column == j, spread(a, column), b) for a, b in ((at, at_j), (score, score_j)))
        return values, at_j, score_j, chosen, total + score

    _, at, score, chosen, total = lax.fori_loop(
        0, top_k, best_of_all, (values, *lists[1:], filled((TOKENS, share), 0.0), filled((TOKENS,), 1e-20))
    )

    @pl.when(worker == 0)
    def write() -> None:
        ids_g.at[rows][...] = at
        weights_g.at[rows][...] = (score / spread(total, score) if router.normalise else score) * router.scale

    chosen_s[worker] = chosen.astype(jnp.bfloat16)
    plgpu.commit_smem()

    def count(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, earlier_s.at[worker], chosen_s.at[worker])
        plgpu.wgmma_wait(0)
        return sums[...]

    upto_g.at[rows, mine][...] = pl.run_scoped(count, plgpu.ACC((TOKENS, share)))
