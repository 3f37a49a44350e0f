"""Compiles a program for two H100s that are not there; run by test_two_gpus in a process of its own, which a fault in XLA ends.

``python two_gpus.py NAME`` prints "compiled" behind the program's exchanges.
"""

from __future__ import annotations

import functools
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels
from diffulex_jax import decode
from diffulex_jax.bench.shapes import shape_model
from diffulex_jax.engine.device import empty
from diffulex_jax.engine.dispatch import Plan, jit_denoise
from diffulex_jax.engine.programs import param_specs, pool_placement
from diffulex_jax.models.base import init
from diffulex_jax.parallel.mesh import add_up, make_mesh, sharding, spec, spread
from diffulex_jax.rules.base import dims_for
from diffulex_jax.state import STATE_AXES
from diffulex_jax.strategies import for_model


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 85899345920
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
SLOTS, BLOCK, PAGES = 4, 8, 8


def no_elements(mesh):
    """The least that XLA crashed on: an array without elements that goes into what each device does, and out of it."""
    slots, heads = spec("slot"), spec("kv_heads")

    def run(x, nothing):
        return spread(lambda x, nothing: (add_up(x.sum(), "kv_heads"), nothing), (heads, slots), (PartitionSpec(), slots))(x, nothing)

    x, nothing = (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding(mesh, ())) for shape in ((8,), (4, 0)))
    return jax.jit(run), (x, nothing)


def denoise(mesh, dtype=jnp.float32):
    """An engine's denoise program: its state has room for no candidates, in arrays without elements."""
    model = shape_model("tiny")
    rule = for_model(model.spec, "llada2_edit").rule
    sizes = {"slots": SLOTS, "window": 1, "block": BLOCK, "page": BLOCK, "pages_per_slot": PAGES}
    dims = dims_for(rule, **sizes, mask_id=model.spec.mask_id, commit_alone=model.spec.commit_alone)
    program = decode.Program(model, dims, rule, pallas_kernels.choose(mesh.devices.flat[0]), greedy=True)

    def placed(tree, where):
        return jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), tree, where)

    abstract = jax.eval_shape(functools.partial(init, model, dtype=dtype), jax.random.key(0))
    params = placed(abstract, jax.tree.map(lambda split: NamedSharding(mesh, split), param_specs(model)))
    pool, state = jax.eval_shape(functools.partial(empty, program, dtype, SLOTS * PAGES))
    pool = placed(pool, jax.tree.map(lambda _: pool_placement(mesh, program.kernels), pool))
    state = placed(state, jax.tree.map(lambda _: sharding(mesh, STATE_AXES), state))
    plan = jax.ShapeDtypeStruct(Plan.packed_shape(SLOTS, PAGES), jnp.int32, sharding=sharding(mesh, ()))
    return jit_denoise(program, mesh, dtype=dtype, steps=4), (params, pool, state, plan)


PROGRAMS = {
    "no elements": (no_elements, {"tensor": 2}),
    "tensor": (denoise, {"tensor": 2}),
    "expert": (denoise, {"expert": 2}),
    "tensor, bfloat16": (functools.partial(denoise, dtype=jnp.bfloat16), {"tensor": 2}),
}


if __name__ == "__main__":
    make, axes = PROGRAMS[sys.argv[1]]
    devices = topologies.get_topology_desc(platform="cuda", topology_name="h100", target_config=H100, topology="1x1x2").devices
    mesh = make_mesh(devices, **axes)
    function, args = make(mesh)
    with jax.set_mesh(mesh):
        text = function.lower(*args).compile().as_text()
    print(*sorted(set(re.findall(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", text))), "compiled")
