"""Several devices give what one gives; eight of them on one CPU."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from sweep import sweep

from diffulex_jax import decode
from diffulex_jax.bench.shapes import shape_model
from diffulex_jax.engine import settle
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.dispatch import jit_denoise
from diffulex_jax.parallel.mesh import MESH_AXES, add_up, make_mesh, spec, spread
from diffulex_jax.planning.compiling import arguments
from diffulex_jax.strategies import for_model
from pallas_kernels import REFERENCE


PROGRAMS = ["2x2x2", "1x4x2", "2x2x2, next", "1x4x2, next"]
ENGINES = ["data=2,expert=2,tensor=2", "data=4", "tensor=2"]
over_programs = pytest.mark.parametrize("program", sweep(PROGRAMS, but=["2x2x2", "1x4x2, next"]))
over_engines = pytest.mark.parametrize("engine", sweep(ENGINES, but=ENGINES[:1]))


@pytest.fixture(scope="module")
def found(request):
    """What the other process finds, of the programs and engines that the tests of this run ask for; always of the first engine."""
    here = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    programs, engines = ([name for name in names if {kind: name} in here] for kind, names in (("program", PROGRAMS), ("engine", ENGINES)))
    asked = json.dumps({"programs": programs, "engines": list(dict.fromkeys(ENGINES[:1] + engines))})
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    child = [sys.executable, str(pathlib.Path(__file__).parent / "sharded" / "eight_devices.py"), asked]
    ran = subprocess.run(child, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@over_programs
def test_same_tokens_as_on_one_device(found, program):
    assert found["generated, next" if program.endswith("next") else "generated"] > 20
    assert (found[program]["tokens"], found[program]["forwards"]) == (0, 0)
    assert found[program]["confidence"] < 1e-5
    assert found[program]["keys"] < 1e-5 < found[program]["largest_key"]


def test_prompts_go_beside_steps_over_a_mesh_too(found):
    """A loop has the name by which an engine asks whether it is compiled: that of another would be waited for, or be the wrong one."""
    assert found["mixed"] == {"same": True, "kinds": ["denoise", "mixed"], "rows": [2]}


@over_programs
def test_no_device_asks_another_for_pages_or_weights(found, program):
    # Sums, the exchange of what was found in the vocabulary, and results put together at the end.
    assert found[program]["exchanges"].keys() <= {"all-reduce", "all-gather"}


def test_training_over_a_mesh_is_training_on_one_device(found):
    trained = found["trained"]
    assert trained["losses"] < 1e-4
    assert trained["same"] > 0.999
    assert trained["placed"]
    assert trained["refused"] == "rows=6 cannot be split over the mesh's data=4"


def test_the_kernel_for_a_shared_vocabulary(found):
    assert found["shared_vocabulary"]


def test_gpus_that_share_the_vocabulary_exchange_four_numbers_a_row(found):
    assert found["shared_by_gpus"] == {"same": True, "tie": 30, "no number": True, "exchanged": [["s32[4,4,12]", "all-gather"]]}


@pytest.mark.parametrize("size", ["by layer", "at once"])
@pytest.mark.parametrize("mesh", ["2x2x2", "1x4x2"])
def test_a_checkpoint_is_read_onto_a_mesh(found, mesh, size):
    """The same parameters as on one device, each in its place; a device holds its share, which shared axes make less than half."""
    read = found["loads"][mesh][size]
    assert read["same"]
    assert read["placed"]
    assert read["held"] < 0.5


@pytest.mark.parametrize("mesh", ["2x2x2", "1x4x2", "2"])
def test_a_host_reads_the_bytes_that_its_devices_hold(found, mesh):
    """Half of a mesh of 2 x 2 x 2 has every part; of the others, a half of all that is shared."""
    host = found["one host"][mesh]
    assert host["same"]
    assert host["read"] == host["held"]
    assert host["held"] == host["all"] if mesh == "2x2x2" else host["held"] < 0.7 * host["all"]


def test_parameters_that_orbax_wrote_on_one_mesh_are_read_onto_another(found):
    assert found["placed"] == {"model": True, "same": True, "placed": True}


def test_quantised_experts_are_shared_as_plain_ones(found):
    assert found["quantised"] == {"same": True, "held": 1 / 8, "computed": True}


def test_quantised_layers_are_shared_as_plain_ones(found):
    """Numbers and scales, of rows too where these are in groups: heads over two devices, the width of an MLP over all eight."""
    held = {"qkv": [1 / 2, 1 / 2], "out": [1 / 2, 1 / 2], "mlp_gate_up": [1 / 8, 1 / 8], "mlp_down": [1 / 8, 1 / 8]}
    assert found["quantised layers"] == {"same": True, "held": held, "computed": True}


@over_engines
def test_an_engine_over_a_mesh_that_is_given_as_text(found, engine):
    """Its pool is too small for all at once: requests give way and come back, to another shard perhaps."""
    assert found["engines"]["same"][engine]
    assert found["engines"]["tokens"] > 60
    assert found["engines"]["preempted"] > 0
    assert "=2 cannot be split over 3 devices (mesh axes tensor); it can over 2" in found["engines"]["refused"]["tensor=3"]
    assert found["engines"]["refused"]["data=3"] == "max_slots=8 cannot be split over the mesh's data=3; 6 or 9 can"


def test_adapters_are_split_as_what_they_adapt(found):
    assert found["adapted"] == {"same": True, "answers": [0, 1, 2, 0, 1, 2, 0, 2], "held": 1 / 4}


def test_the_bench_of_a_step_counts_for_each_device(found):
    """A sum in each of three layers, one exchange of what the vocabulary's parts hold, two numbers on which all must agree."""
    exchanges, experts = found["bench"]["counted"]
    assert exchanges == 3 + 1 + 2
    assert 2 <= experts <= 8
    assert found["bench"]["read"] == pytest.approx(1)
    assert found["bench"]["kernel_times"] == []
    assert found["bench"]["refused"] == "batch=1: slot=1 cannot be split over 2 devices (mesh axes data); it can over 1"
    assert found["bench"]["timed"]
    assert found["bench"]["same"]
    assert found["bench"]["placed"]


def test_an_engine_over_a_mesh_takes_other_parameters_and_scores(found):
    updated = found["engines"]["updated"]
    assert updated["same"]
    assert updated["scored"] == 48 and updated["scores"] < 1e-4


def test_arrays_without_elements_stay_outside():
    """XLA for GPUs crashes on them: what each device does makes its own."""
    slots, devices = spec("slot"), AbstractMesh((2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 3)

    def function(both):
        assert both["nothing"].shape == (2, 0)
        return add_up(both["x"], "kv_heads"), both["nothing"] + 1

    with jax.sharding.use_abstract_mesh(devices):
        run = spread(function, (slots,), (slots, slots))
        jaxpr = jax.make_jaxpr(run)({"nothing": jnp.zeros((4, 0), jnp.int32), "x": jnp.ones((4, 3))})
    (mapped,) = (e for e in jaxpr.eqns if e.primitive.name == "shard_map")
    assert [a.aval.shape for a in mapped.invars] == [(4, 3)]
    assert [(a.aval.shape, a.aval.dtype) for a in mapped.outvars] == [((4, 3), jnp.float32), ((4, 0), jnp.int32)]


def test_a_denoise_program_writes_by_no_index_without_elements():
    """XLA for GPUs crashes on such arrays where devices share a program; ``at[:n].set`` makes them."""
    model, mesh = shape_model("tiny"), make_mesh()
    strategy = for_model(model.spec, "llada2_edit")
    _, policy, dims = settle.plan(model.spec, strategy, EngineConfig(max_slots=4, max_model_len=64))
    program = decode.Program(model, dims, strategy.rule, REFERENCE, policy)
    with jax.set_mesh(mesh):
        given = arguments(program, mesh, dtype=jnp.float32, num_pages=8)
        found = list(equations(jit_denoise(program, mesh, dtype=jnp.float32, steps=1).trace(*given).jaxpr))
    indices = [e.invars[1].aval for e in found if e.primitive.name.startswith("scatter")]
    assert indices and all(aval.size for aval in indices)


def equations(part):
    """All equations of a jaxpr, those within equations too."""
    if isinstance(part, (tuple, list)):
        for one in part:
            yield from equations(one)
    elif hasattr(part, "eqns") or hasattr(part, "jaxpr"):
        for equation in getattr(part, "jaxpr", part).eqns:
            yield equation
            yield from equations(tuple(equation.params.values()))
