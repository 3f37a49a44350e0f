"""Compiling for TPUs that are not there: does the denoise loop of a model compile, fit and shard on a slice of them?

Needs libtpu (the ``tpu`` extra) and no TPU. What comes out is the very program an engine would run, compiled by the very compiler.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels
from diffulex_jax import decode
from diffulex_jax.engine.device import empty
from diffulex_jax.engine.dispatch import Plan, jit_denoise
from diffulex_jax.engine.programs import param_specs, pool_placement
from diffulex_jax.models.base import Model, init, leaves
from diffulex_jax.parallel.mesh import check_split, make_mesh, sharding
from diffulex_jax.rules.base import dims_for
from diffulex_jax.state import STATE_AXES
from diffulex_jax.strategies import for_model


# libtpu looks for a TPU and its cloud unless told what it would find; and for itself, already loaded by another process.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
_KERNEL = re.compile(r'%([\w-]+?)(?:\.\d+)* = .* custom-call\(.*custom_call_target="tpu_custom_call"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What was compiled, and what the compiler says of it. Bytes are those of one device.

    Attributes:
      topology, devices, mesh: the slice, its devices, and how they are used.
      slots, context: requests decoded together, and positions of each.
      seconds: of tracing and compiling.
      arguments, temporaries, code: bytes in HBM while the program runs.
      pool, aliased: bytes of the KV pool, and of arguments that are updated in place.
      hbm: what the device has. The compiler keeps up to 5 % of it back, and refuses a program that does not fit the rest.
      collectives: how often each kind stands in the program; a loop's body counts once.
      kernels: likewise the Pallas kernels and XLA's own, by name.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    slots: int
    context: int
    seconds: float
    arguments: int
    temporaries: int
    code: int
    pool: int
    aliased: int
    hbm: int
    collectives: dict[str, int]
    kernels: dict[str, int]

    @property
    def fits(self) -> bool:
        return self.arguments + self.temporaries + self.code <= self.hbm


def tpu_devices(topology: str) -> list[Any]:
    """The devices of a slice that need not exist: ``"v5e:2x2"``, ``"v6e:16x16"``, ``"v5p:2x2x1"``, ``"v4:2x2x1"``, ``"tpu7x:2x2x1"``, ….

    Raises:
      ValueError: for a topology that libtpu does not know, or where libtpu is missing.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        raise ValueError(f"no TPU topology {topology!r}: {error}. It needs the extra diffulex-jax[tpu]") from error


def compile_denoise(
    topology: str,
    model: Model,
    *,
    data: int | None = None,
    expert: int = 1,
    tensor: int | None = None,
    slots_per_device: int = 8,
    context: int = 2048,
    strategy: str | None = None,
    block_size: int = 32,
    buffer_size: int = 1,
    steps_per_dispatch: int = 8,
) -> Compiled:
    """Compiles an engine's denoise loop, in bfloat16, for a TPU slice.

    Args:
      topology: see :func:`tpu_devices`.
      model: the network.
      data: devices over which slots and pages are split; default: all that ``expert`` and ``tensor`` leave.
      expert: devices over which experts and vocabulary are split, beside those of ``tensor``.
      tensor: devices over which heads are split too; default: as many as there are key/value heads and the slice allows.
      slots_per_device: requests decoded together, for each index of ``data``.
      context: positions of each slot.
      strategy: a name from ``diffulex_jax.strategies``; default: the one that the model's authors decode it with.
      block_size: tokens in a block.
      buffer_size: blocks denoised together.
      steps_per_dispatch: denoise steps the device runs before the host looks.

    Raises:
      ValueError: for a slice or a split that will not do.
      jax.errors.JaxRuntimeError: what the compiler says, such as that the device's memory is exceeded.
    """
    devices = tpu_devices(topology)
    tensor = math.gcd(model.spec.layers.kv_heads, len(devices) // expert) if tensor is None else tensor
    data = max(1, len(devices) // (expert * tensor)) if data is None else data
    mesh = make_mesh(devices, data=data, expert=expert, tensor=tensor)
    for path, param in leaves(model.schema).items():
        check_split(mesh, param.shape, param.axes, path[-1])
    rule, slots, pages = for_model(model.spec, strategy).rule, data * slots_per_device, -(-context // block_size)
    dims = dims_for(
        rule,
        slots=slots,
        window=buffer_size,
        block=block_size,
        page=block_size,
        pages_per_slot=pages,
        mask_id=model.spec.mask_id,
        commit_alone=model.spec.commit_alone,
    )
    program = decode.Program(model, dims, rule, pallas_kernels.choose(devices[0]))
    dtype, num_pages = jnp.bfloat16, slots * pages

    def placed(tree: Any, where: Any) -> Any:
        return jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), tree, where)

    abstract = jax.eval_shape(functools.partial(init, model, dtype=dtype), jax.random.key(0))
    params = placed(abstract, jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(model)))
    pool, state = jax.eval_shape(functools.partial(empty, program, dtype, num_pages))
    where = (pool, pool_placement(mesh, program.kernels)), (state, sharding(mesh, STATE_AXES))
    pool, state = (placed(tree, jax.tree.map(lambda _, at=at: at, tree)) for tree, at in where)
    everywhere = NamedSharding(mesh, PartitionSpec())
    plan = jax.ShapeDtypeStruct(Plan.packed_shape(slots, pages), jnp.int32, sharding=everywhere)

    began = time.perf_counter()
    with jax.set_mesh(mesh):
        jitted = jit_denoise(program, mesh, dtype=dtype, steps=steps_per_dispatch)
        compiled = jitted.lower(params, pool, state, plan).compile()
        core = pltpu.get_tpu_info()
    seconds = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        topology=topology,
        devices=len(devices),
        mesh=dict(mesh.shape),
        slots=slots,
        context=context,
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        pool=sum(a.size * a.dtype.itemsize for a in (pool.k, pool.v)) // (data * tensor),
        aliased=memory.alias_size_in_bytes,
        hbm=core.hbm_capacity_bytes * core.num_cores,
        collectives=dict(collections.Counter(_COLLECTIVE.findall(text))),
        kernels=dict(collections.Counter(_KERNEL.findall(text))),
    )


def text(compiled: Compiled) -> str:
    """What is worth knowing, for people."""

    def gib(size: int) -> str:
        return f"{size / 2**30:.2f} GiB"

    c = compiled
    rows = {
        "slice": f"{c.topology}, {c.devices} devices as {' x '.join(f'{name} {n}' for name, n in c.mesh.items())}",
        "batch": f"{c.slots} slots of {c.context} positions",
        "compiled in": f"{c.seconds:.0f} s",
        "arguments": f"{gib(c.arguments)} a device, of which {gib(c.pool)} KV pool",
        "temporaries": gib(c.temporaries),
        "updated in place": gib(c.aliased),
        "memory": f"{gib(c.hbm)} a device: {'fits' if c.fits else 'DOES NOT FIT'}",
        "exchanges": ", ".join(f"{n} {name}" for name, n in sorted(c.collectives.items())) or "none",
        "kernels": ", ".join(f"{n} {name}" for name, n in sorted(c.kernels.items())) or "none",
    }
    return "\n".join(f"{name:>16}  {value}" for name, value in rows.items())
