"""How fast a device moves bytes and multiplies matrices, and how fast several add up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffulex_jax.engine.dispatch import jit


def copy_bandwidth(device: jax.Device) -> float:
    """Bytes a second that a large copy on ``device`` reads and writes, the best of several."""
    count = 2**28 if device.memory_stats() else 2**22  # float32: far more than any cache of an accelerator or a CPU holds
    change = jax.jit(lambda x: x + 1, donate_argnums=0)  # as a copy, but one that no compiler leaves out
    x = jax.block_until_ready(change(jnp.zeros(count, jnp.float32)))
    return 2 * x.nbytes / _best_seconds(change, x)


def matmul_rate(device: jax.Device, dtype: Any) -> float:
    """Operations a second of a large matrix product of ``dtype`` on ``device``, the best of several."""
    size = 8192 if device.memory_stats() else 512
    times_itself = jit(lambda x: x @ x, dtype, device)
    x = jax.block_until_ready(times_itself(jnp.zeros((size, size), dtype)))
    return 2 * size**3 / _best_seconds(times_itself, x)


def sum_seconds(mesh: Mesh, size: int) -> float:
    """Seconds of one sum of arrays of ``size`` bytes over all devices of ``mesh``, in a program of many that wait for each other."""
    count, own = 40, PartitionSpec(mesh.axis_names)

    def local(x: jax.Array) -> jax.Array:
        for _ in range(count):
            x = lax.psum(x, mesh.axis_names) * 0.5  # what is not changed between them could be one sum
        return x

    add_up = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=own, out_specs=own, check_vma=False), donate_argnums=0)
    x = jnp.zeros((mesh.size, max(1, size // 4)), jnp.float32, device=NamedSharding(mesh, own))
    return _best_seconds(add_up, x) / count


def _best_seconds(change: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Seconds of one ``change`` of many in a row."""
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(10):
            x = change(x)
        jax.block_until_ready(x)
        best = min(best, (time.perf_counter() - began) / 10)
    return best
