"""An engine's denoise program, compiled for devices that need not be there by the compiler that would compile it there."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffulex_jax import decode
from diffulex_jax.engine.device import empty
from diffulex_jax.engine.dispatch import Plan as Dispatch
from diffulex_jax.engine.dispatch import jit_denoise
from diffulex_jax.engine.programs import pool_placement
from diffulex_jax.models.base import Param, init, is_param
from diffulex_jax.parallel.mesh import sharding
from diffulex_jax.planning.exchanges import Exchanges, exchanges_of_step
from diffulex_jax.state import STATE_AXES
from diffulex_jax.weights import quantise
from pallas_kernels.quantised import Form


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of a program. Bytes are those of one device.

    Attributes:
      seconds: of tracing and compiling.
      arguments, temporaries, code: bytes that it takes while it runs; what it updates in place counts once.
      aliased: bytes of arguments that it updates in place.
      exchanges: what a step exchanges.
      kernels: how often each Pallas kernel, and each of XLA's own, stands in the program, by name; a loop's body counts once.
    """

    seconds: float
    arguments: int
    temporaries: int
    code: int
    aliased: int
    exchanges: Exchanges
    kernels: dict[str, int]


class OutOfMemory(Exception):
    """The compiler's word that a program does not fit: ``missing`` bytes on each device."""

    def __init__(self, missing: int):
        super().__init__(f"{missing} bytes are missing on each device")
        self.missing = missing


class NotInstalled(Exception):
    """A library that a program is made with is not on this machine."""


def compile_denoise(
    program: decode.Program, mesh: Mesh, *, dtype: Any, num_pages: int, steps: int, weights: Form | None = None
) -> Compiled:
    """Compiles an engine's denoise loop for a mesh.

    Args:
      program: the static part; its ``kernels`` are those of the mesh's devices.
      mesh: of devices that need not be there.
      dtype: of parameters, activations and the pool.
      num_pages: pages of the pool, on all devices together.
      steps: denoise steps of a dispatch.
      weights: the form of what is quantised.

    Raises:
      OutOfMemory: where the compiler refuses the program for its size.
      NotInstalled: where a GPU's program needs cuDNN, which is not here.
      jax.errors.JaxRuntimeError: what else the compiler says.
    """
    began, given = time.perf_counter(), arguments(program, mesh, dtype=dtype, num_pages=num_pages, weights=weights)
    with jax.set_mesh(mesh):
        try:
            lowered = jit_denoise(program, mesh, dtype=dtype, steps=steps).lower(*given)
        except RuntimeError as error:
            if "cuDNN not found" not in str(error):
                raise
            raise NotInstalled("cuDNN, which attends over whole canvases, is not installed") from error
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise _missing(error) or error from error
    seconds = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        exchanges=exchanges_of_step(text) if mesh.size > 1 else {},
        kernels=dict(collections.Counter(_KERNEL.findall(text))),
    )


def arguments(program: decode.Program, mesh: Mesh, *, dtype: Any, num_pages: int, weights: Form | None = None) -> tuple[Any, ...]:
    """What ``dispatch.jit_denoise`` takes, as shapes and where they lie: parameters, pool, state, packed plan."""

    def at(a: Any, where: Any) -> Any:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

    def placed(tree: Any, where: Any) -> Any:
        return jax.tree.map(lambda a: at(a, where), tree)

    def kept(param: Param, leaf: jax.ShapeDtypeStruct) -> Any:
        keep = quantise.store(param, weights, kernels=program.kernels, dtype=dtype, mesh=mesh)
        made = leaf if keep is None else jax.eval_shape(keep, leaf)
        return jax.tree.map(at, made, quantise.placement(mesh, param, made))

    params = jax.eval_shape(functools.partial(init, program.model, dtype=dtype), jax.random.key(0))
    params = jax.tree.map(kept, program.model.schema, params, is_leaf=is_param)
    pool, state = jax.eval_shape(functools.partial(empty, program, dtype, num_pages))
    plan = jax.ShapeDtypeStruct(Dispatch.packed_shape(program.dims.slots, program.dims.pages_per_slot), jnp.int32)
    pool, state = jax.tree.map(placed, pool, pool_placement(mesh, program)), placed(state, sharding(mesh, STATE_AXES))
    return params, pool, state, placed(plan, sharding(mesh, ()))


_KERNEL = re.compile(r'%([\w-]+?)(?:\.\d+)* = .* custom-call\(.*custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)"')
_TOO_LARGE = re.compile(r"\((\d+\.?\d*)([KMGT])\) exceeds available HBM \((\d+\.?\d*)([KMGT])\)")


def _missing(error: Exception) -> OutOfMemory | None:
    """What the compiler for TPUs means by "total memory required … (18.00G) exceeds available HBM (15.75G)"; arguments are in it."""
    if not (found := _TOO_LARGE.search(str(error))):
        return None
    need, unit, have, of = found.groups()
    return OutOfMemory(int(float(need) * _UNITS[unit] - float(have) * _UNITS[of]))


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
