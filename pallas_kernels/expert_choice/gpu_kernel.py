"""Which experts tokens go to, with Mosaic GPU: a warp a token, whose lanes hold the experts side by side.

Nothing but a warp's own registers takes part, so the time, that of some forty exchanges between lanes, is the same for few tokens and for
as many as there are warps on the device.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.expert_choice.reference import Choice, Router, epsilon


TOKENS = 4
"""Of one block, which is one warpgroup."""

_LANES, _LAST = 32, 2**31 - 1


def fits(experts: int, router: Router) -> bool:
    """Whether :func:`choose` can: the experts are shared out equally over the lanes of a warp, 32 bytes at most for each."""
    return experts in (32, 64, 128, 256) and (router.kept == router.groups or experts // router.groups > 1) and not router.capacity


@functools.partial(jax.jit, static_argnames="router")  # traced once for all its uses
def choose(logits: jax.Array, bias: jax.Array | None, router: Router) -> Choice:
    """See the package's ``choose``; ``logits`` ``[P, N, E]`` float32, the sum of P parts, of which what is not a number counts as 0."""
    _, tokens, experts = logits.shape
    blocks = -(-tokens // TOKENS)
    rows = blocks * TOKENS
    kernel = plgpu.kernel(
        functools.partial(_choose, router=router),
        out_type=[jax.ShapeDtypeStruct((rows, router.top_k), dtype) for dtype in (jnp.int32, jnp.float32)],
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="choose_experts",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    added = jnp.zeros(experts, jnp.float32) if bias is None else bias.astype(jnp.float32)
    ids, weights = kernel(jnp.pad(logits, ((0, 0), (0, rows - tokens), (0, 0))), added)
    return Choice(ids[:tokens], weights[:tokens])


def _choose(logits_g: Any, bias_g: Any, ids_g: Any, weights_g: Any, *, router: Router) -> None:
    parts, _, experts = logits_g.shape
    of_lane = experts // _LANES
    tiling = Tiling(((TOKENS, experts), (of_lane,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    load: Any = plgpu.load  # JAX 0.10 types its index as required
    rows = pl.ds(lax.axis_index("block") * TOKENS, TOKENS)

    def spread(a: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(a, (TOKENS, experts), (0,))

    expert = plgpu.broadcasted_iota(jnp.int32, (TOKENS, experts), 1, layout=layout)
    logit = functools.reduce(jnp.add, [load(logits_g.at[part, rows], layout=layout, optimized=False) for part in range(parts)])
    logit = jnp.where(logit == logit, logit, 0.0)
    if router.score == "sigmoid":
        score = 1 / (1 + jnp.exp(-logit))
    else:
        powers = jnp.exp(logit - spread(logit.max(1)))
        score = powers / spread(powers.sum(1))
    compared = score + lax.broadcast_in_dim(load(bias_g, layout=layout.reduce(0), optimized=False), score.shape, (1,))

    def best_of(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of each row the best value, and the first expert that has it."""
        best = values.max(1)
        return best, jnp.where(values == spread(best), expert, _LAST).min(1)

    if router.kept < router.groups:
        within = [lax.div(expert, experts // router.groups) == g for g in range(router.groups)]
        sums = []
        for inside in within:
            group = jnp.where(inside, compared, -jnp.inf)
            best, at = best_of(group)
            sums.append(best + jnp.where(expert == spread(at), -jnp.inf, group).max(1))
        left = jnp.full_like(compared, -jnp.inf)
        for g, inside in enumerate(within):
            ahead = [(s >= sums[g] if other < g else s > sums[g]).astype(jnp.int32) for other, s in enumerate(sums) if other != g]
            kept = functools.reduce(jnp.add, ahead) < router.kept
            left = jnp.where(inside & spread(kept), compared, left)
        compared = left
    chosen = []
    for _ in range(router.top_k):
        _, at = best_of(compared)
        hit = expert == spread(at)
        chosen.append((at, jnp.where(hit, score, 0.0).sum(1)))
        compared = jnp.where(hit, -jnp.inf, compared)
    total = functools.reduce(jnp.add, [score for _, score in chosen]) + epsilon(router)
    for j, (at, score_j) in enumerate(chosen):
        ids_g.at[rows, j][...] = at
        weights_g.at[rows, j][...] = (score_j / total if router.normalise else score_j) * router.scale
