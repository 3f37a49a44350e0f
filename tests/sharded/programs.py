"""The engine's programs, run by themselves: what a mesh changes in tokens, confidences and keys, and which exchanges a step holds."""

from __future__ import annotations

import collections
import functools
import re

import jax
import numpy as np
from jax.sharding import NamedSharding
from models import BLOCK, MASK, MODEL, NEXT, PAGES, PROMPTS, SLOTS, STEPS, WINDOW, random_weights

import pallas_kernels
from diffulex_jax import SamplingParams, decode, request_state
from diffulex_jax.engine import programs
from diffulex_jax.parallel.mesh import make_mesh, sharding
from diffulex_jax.rules.base import dims_for
from diffulex_jax.state import POOL_AXES, STATE_AXES, KVPool
from diffulex_jax.strategies import dmax, fast_dllm_v2


def programs_over(meshes, names):
    """For each of ``names``, a mesh, or a mesh and ", next" for the model of the next position, how it differs from a single device."""
    kinds, found = {"": (MODEL, dmax()), ", next": (NEXT, fast_dllm_v2())}, {}
    for suffix, (model, rule) in kinds.items():
        if chosen := {f"{name}{suffix}": axes for name, axes in meshes.items() if f"{name}{suffix}" in names}:
            single = decoded(make_mesh(), model, rule)
            found |= {name: difference(single, decoded(make_mesh(**axes), model, rule)) for name, axes in chosen.items()}
            found[f"generated{suffix}"] = int((single[0] != MASK).sum())
    return found


def decoded(mesh, model=MODEL, rule=None):
    """(tokens, forwards, confidences, keys of the pool, the compiled program) of four requests, one of them sampled."""
    rule, alone = dmax() if rule is None else rule, model.spec.commit_alone
    sizes = {"slots": SLOTS, "window": WINDOW, "block": BLOCK, "page": BLOCK, "pages_per_slot": PAGES}
    dims = dims_for(rule, **sizes, mask_id=MASK, commit_alone=alone)
    program = decode.Program(model, dims, rule, pallas_kernels.REFERENCE)
    on_pool, on_slots, everywhere = (sharding(mesh, axes) for axes in (POOL_AXES, STATE_AXES, ()))
    placed = jax.tree.map(lambda split: NamedSharding(mesh, split), programs.param_specs(model))
    rng = np.random.default_rng(0)
    biased = jax.tree.map_with_path(
        lambda path, a: rng.standard_normal(a.shape, np.float32) if path[-1].key == "qkv_bias" else a, random_weights(model)
    )
    params = jax.device_put(biased, placed)
    layers = model.spec.layers
    shape = layers.count, SLOTS * PAGES, BLOCK, layers.kv_heads, layers.head_dim
    pool = jax.device_put(KVPool(np.zeros(shape, np.float32), np.zeros(shape, np.float32)), on_pool)
    state = jax.jit(lambda: request_state.empty_state(dims, rule), out_shardings=on_slots)()
    table = np.arange(SLOTS * PAGES, dtype=np.int32).reshape(SLOTS, PAGES)

    def jit(function, donated, out):
        return jax.jit(function, donate_argnums=donated, out_shardings=out)

    prefill = jit(functools.partial(programs.prefill, program), 1, (on_pool, on_slots))
    shards, per_shard = mesh.shape["data"], SLOTS // mesh.shape["data"]
    admit = jit(functools.partial(request_state.admit, dims, rule), 0, on_slots)
    out = on_pool, on_slots, everywhere, everywhere
    denoise = jit(functools.partial(programs.denoise, program, steps=STEPS), (1, 2), out)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        for slot, n in enumerate(PROMPTS):
            prompt, blocks = rng.integers(0, 90, n).astype(np.int32), n // BLOCK - (alone and n % BLOCK == 0)
            tokens = np.zeros((shards, 2, 1, BLOCK), np.int32)
            tokens[slot // per_shard, :blocks, 0] = prompt[: blocks * BLOCK].reshape(-1, BLOCK)
            there = (np.arange(2) < blocks) & (np.arange(shards) == slot // per_shard)[:, None]
            rows = {"start": np.tile(np.arange(2) * BLOCK, shards), "length": there * BLOCK, "written": there}
            rows = {name: a.reshape(2 * shards).astype(np.int32) for name, a in rows.items()} | {"written": there.reshape(-1, 1)}
            prompts = decode.Prompts(tokens.reshape(-1, 1, BLOCK), **rows, page_table=table[[slot] * 2 * shards])
            pool, _ = prefill(params, pool, prompts)
            hot = {"temperature": 0.8, "top_p": 0.9, "seed": 1} if slot == 1 else {}
            settings = SamplingParams(max_tokens=10, accept_threshold=0.6, **hot)
            packed = request_state.make_request(dims, prompt=prompt, params=settings, eos_ids=model.spec.eos_ids)
            state = admit(state, np.int32(slot), packed)
        args = params, pool, state
        plan = {"page_table": table, "known": np.zeros(SLOTS, np.int32), "max_steps": np.int32(STEPS), "stop_on_finish": np.bool_(False)}
        compiled = denoise.lower(*args, **plan).compile()
        pool, state, _, _ = compiled(*args, **plan)
    return *(np.asarray(a) for a in (state.sequence.tokens, state.nfe, state.sequence.confidence, pool.k)), compiled


def difference(one, many):
    exchanges = re.findall(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", many[-1].as_text())
    return {
        "tokens": int((one[0] != many[0]).sum()),
        "forwards": int((one[1] != many[1]).sum()),
        "confidence": float(np.abs(one[2] - many[2]).max()),
        "keys": float(np.abs(one[3] - many[3]).max()),
        "largest_key": float(np.abs(one[3]).max()),
        "exchanges": dict(collections.Counter(exchanges)),
    }
