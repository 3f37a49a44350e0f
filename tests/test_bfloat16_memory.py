"""What programs hold beside weights in bfloat16 on a CPU, whose XLA multiplies in float32."""

from __future__ import annotations

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from diffulex_jax.bench.forward import program_of
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.device import empty
from diffulex_jax.engine.dispatch import Plan, jit_denoise
from diffulex_jax.models.base import is_param, leaves
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.strategies import for_model
from pallas_kernels import choose


FAMILIES = pathlib.Path(__file__).parent / "golden" / "families"


@pytest.mark.sweep_but("tiny-llada-moe")
@pytest.mark.parametrize("name", ["tiny-sdar", "tiny-llada-moe"])
def test_no_more_than_a_few_layers_are_wide_at_once(name):
    """Of 256 layers; nothing is allocated. Widened ahead of the loop over them, they would take as much as the layers in float32."""
    raw = json.loads((FAMILIES / name / "config.json").read_text())
    more = {"num_hidden_layers": 256} | ({"moe_layer_freq": [1] * 256} if "moe_layer_freq" in raw else {})
    model = model_of(raw | more, name=name)
    settings = EngineConfig(dtype="bfloat16", max_slots=1, max_model_len=64)
    program = program_of(model, for_model(model.spec, None), settings, choose(jax.devices()[0]))
    params = jax.tree.map(lambda param: jax.ShapeDtypeStruct(param.shape, jnp.bfloat16), model.schema, is_leaf=is_param)
    dims = program.dims
    pool, state = jax.eval_shape(lambda: empty(program, jnp.bfloat16, dims.pages_per_slot))
    plan = jax.ShapeDtypeStruct(Plan.packed_shape(dims.slots, dims.pages_per_slot), jnp.int32)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        compiled = jit_denoise(program, mesh, dtype=jnp.bfloat16, steps=8).lower(params, pool, state, plan).compile()
    layers = sum(4 * math.prod(param.shape) for param in leaves(model.schema).values() if param.axes[0] == "layer")
    assert compiled.memory_analysis().temp_size_in_bytes < layers / 8
