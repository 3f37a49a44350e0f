"""The bare model: one forward over a window, what it must read, and how many experts its tokens go to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from diffulex_jax.decode.canvas import canvas_forward
from diffulex_jax.decode.forward import forward
from diffulex_jax.decode.program import Program
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.programs import own_pages, param_specs
from diffulex_jax.engine.settle import plan
from diffulex_jax.models.base import Model, Params, leaves
from diffulex_jax.models.ops import Ops
from diffulex_jax.parallel.mesh import ONE_DEVICE, parts, spec, spread
from diffulex_jax.state import POOL_AXES, STATE_AXES, DecodeState, KVPool
from diffulex_jax.strategies import Strategy
from diffulex_jax.weights.quantise import stored_bytes
from pallas_kernels import Kernels, expert_choice
from pallas_kernels.block_attention import KV, Keys, vector_bytes
from pallas_kernels.grouped_matmul import Stack
from pallas_kernels.quantised import Form


def program_of(model: Model, strategy: Strategy, settings: EngineConfig, kernels: Kernels) -> Program:
    """The program that an engine of these settings runs, where no row samples.

    Raises:
      ValueError: for a setting that will not do.
    """
    _, attention, dims = plan(model.spec, strategy, settings)
    kinds: dict[str, Any] = {"draws": strategy.draws, "confidence": strategy.confidence, "kv": settings.kv}
    return Program(model, dims, strategy.rule, kernels, attention, greedy=True, **kinds)


def shared_part(state: DecodeState) -> DecodeState:
    """What a forward needs of a state, which is the same for every strategy; as it is within a block, not in its first forward."""
    pending = state.pending.replace(merge=(), live=jnp.zeros_like(state.pending.live))
    return state.replace(rule=(), merge=(), pending=pending, steps=jnp.ones_like(state.steps))


def bare(
    program: Program,
    params: Params,
    pool: KVPool,
    state: DecodeState,
    page_table: jax.Array,
    *,
    watch: Callable[[Ops], Ops] = lambda ops: ops,
) -> jax.Array:
    """Hidden states ``[S, K B, D]`` of the window of a :func:`shared_part`: embeddings and layers by the very operations that a denoise
    step uses."""
    if not program.attention.paged:
        return canvas_forward(program, params, pool, state, watch=watch)[0]
    slots = len(state.tokens)
    keys = Keys(pool.k, pool.v, page_table, state.written_upto, state.active & state.live[:, None])
    x = params["embed"][state.tokens.reshape(slots, -1)]
    return forward(program, params, x, state.positions.reshape(slots, -1), keys=keys, watch=watch)[0]


def touch_counter(program: Program) -> tuple[Callable[..., jax.Array], list[int]]:
    """A :func:`bare` forward over the current mesh that counts the experts its tokens go to.

    Returns:
      ``(forward(params, pool, shared_part(state), page_table), counts)``; each run appends a number for each mixture-of-experts layer, and
      on several devices for each device, to ``counts`` by the time ``jax.effects_barrier`` returns. A device counts all the experts that
      the tokens of its slots go to, its own and others'.
    """
    counts: list[int] = []

    def counting(ops: Ops) -> Ops:
        def experts(x: jax.Array, stacks: dict[str, jax.Array], layer: jax.Array, router: expert_choice.Router) -> jax.Array:
            matrix, bias = stacks["router"][layer], stacks["router_bias"][layer] if "router_bias" in stacks else None
            ids = expert_choice.choose(x.reshape(-1, x.shape[-1]), matrix, bias, router, backend="sorted").ids
            touched = (ids.reshape(-1, 1) == jnp.arange(matrix.shape[-1])).any(0).sum()
            jax.debug.callback(lambda count: counts.append(int(count)), touched)
            return ops.experts(x, stacks, layer, router)

        return ops._replace(experts=experts)

    def count(params: Params, pool: KVPool, state: DecodeState, page_table: jax.Array) -> jax.Array:
        return bare(program, params, pool, state, own_pages(page_table, pool), watch=counting)

    slots, pages = spec(*STATE_AXES), spec(*POOL_AXES)
    return spread(count, (param_specs(program.model), pages, slots, slots), slots), counts


def step_bytes(
    model: Model,
    itemsize: int,
    *,
    batch: int,
    context: int,
    experts: float,
    weights: Form | None = None,
    kv: KV | None = None,
    mesh: AbstractMesh = ONE_DEVICE,
) -> float:
    """What each device of ``mesh`` must read in a denoise step: each of its weights once, quantised as ``weights`` says, of the routed
    experts ``experts`` a layer on all devices together, and ``context`` cached positions, held as ``kv`` says, once.

    Activations stay in caches and are not counted, nor is the embedding, of which a few rows are looked up, unless it is the output
    matrix too. ``batch`` are the rows of one index of ``data``.
    """
    total = 0.0
    for path, param in leaves(model.schema).items():
        size = stored_bytes(param, weights, itemsize) / parts(mesh, param.axes)
        if "expert" in param.axes:
            size *= experts / param.shape[param.axes.index("expert")]
        total += 0 if path == ("embed",) and ("lm_head",) in leaves(model.schema) else size
    layers = model.spec.layers
    vector = layers.head_dim * itemsize if kv is None else vector_bytes(layers.head_dim, kv, jnp.bfloat16)
    return total + 2 * layers.count * layers.kv_heads * vector * context * batch / parts(mesh, ("kv_heads",))


def step_operations(model: Model, *, tokens: float, context: float, mesh: AbstractMesh = ONE_DEVICE) -> float:
    """Operations of each device of ``mesh`` in a step over ``tokens``: two for each weight a token goes through, and attention over
    ``context``."""
    tree, layers, total = leaves(model.schema), model.spec.layers, 0.0
    for path, param in tree.items():
        through = model.spec.experts_per_token / param.shape[param.axes.index("expert")] if "expert" in param.axes else 1
        looked_up = path == ("embed",) and ("lm_head",) in tree
        total += 0 if looked_up else 2 * tokens * through * math.prod(param.shape) / parts(mesh, param.axes)
    return total + 4 * tokens * context * layers.count * layers.query_heads * layers.head_dim / parts(mesh, ("kv_heads",))


def expert_stacks(params: Params) -> list[Stack]:
    """The stacks ``[L, E, ..., ...]`` of a mixture's experts, gate and up before down; none where there is no mixture."""
    return [params[kind][name] for kind in params if isinstance(params[kind], dict) for name in _EXPERTS if name in params[kind]]


_EXPERTS = ("experts_gate_up", "experts_down")
