"""Compiles a program for two H100s that are not there; run by test_two_gpus in a process of its own, which a fault in XLA ends.

``python two_gpus.py NAME`` prints "compiled" behind the program's exchanges: ``all-reduce[4,8,128]`` is one of arrays of that shape; and
"again" in front of it, if something is computed more than once to save memory.
"""

from __future__ import annotations

import functools
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import pallas_kernels
from diffulex_jax import decode
from diffulex_jax.bench.shapes import shape_model
from diffulex_jax.engine.dispatch import jit_denoise
from diffulex_jax.parallel.mesh import add_up, make_mesh, sharding, spec, spread
from diffulex_jax.planning.chips import slice_of
from diffulex_jax.planning.compiling import arguments
from diffulex_jax.rules.base import dims_for
from diffulex_jax.strategies import for_model


SLOTS, BLOCK, PAGES = 4, 8, 8


def no_elements(mesh):
    """The least that XLA crashed on: an array without elements that goes into what each device does, and out of it."""
    slots, heads = spec("slot"), spec("kv_heads")

    def run(x, nothing):
        return spread(lambda x, nothing: (add_up(x.sum(), "kv_heads"), nothing), (heads, slots), (PartitionSpec(), slots))(x, nothing)

    x, nothing = (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding(mesh, ())) for shape in ((8,), (4, 0)))
    return jax.jit(run), (x, nothing)


def denoise(mesh, dtype=jnp.float32, num_pages=SLOTS * PAGES):
    """An engine's denoise program: its state has room for no candidates, in arrays without elements."""
    model = shape_model("tiny")
    rule = for_model(model.spec, "llada2_edit").rule
    sizes = {"slots": SLOTS, "window": 1, "block": BLOCK, "page": BLOCK, "pages_per_slot": PAGES}
    dims = dims_for(rule, **sizes, mask_id=model.spec.mask_id, commit_alone=model.spec.commit_alone)
    program = decode.Program(model, dims, rule, pallas_kernels.choose(mesh.devices.flat[0]), greedy=True)
    return jit_denoise(program, mesh, dtype=dtype, steps=4), arguments(program, mesh, dtype=dtype, num_pages=num_pages)


PROGRAMS = {
    "no elements": (no_elements, {"tensor": 2}),
    "tensor": (denoise, {"tensor": 2}),
    "expert": (denoise, {"expert": 2}),
    "tensor, bfloat16": (functools.partial(denoise, dtype=jnp.bfloat16), {"tensor": 2}),
    "a pool as large as the memory": (functools.partial(denoise, dtype=jnp.bfloat16, num_pages=38 << 20), {"tensor": 2}),
}


if __name__ == "__main__":
    make, axes = PROGRAMS[sys.argv[1]]
    mesh = make_mesh(slice_of("h100:2").devices, **axes)
    function, args = make(mesh)
    with jax.set_mesh(mesh):
        text = function.lower(*args).compile().as_text()
    found = re.findall(r"(\[[\d,]*\])\S* (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?=-done\(|\()", text)
    print(*sorted({kind + shape for shape, kind in found}), *["again"] * (".remat" in text), "compiled")
