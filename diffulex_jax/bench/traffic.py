"""How fast the device moves bytes."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp


def copy_bandwidth(device: jax.Device) -> float:
    """Bytes a second that a large copy on ``device`` reads and writes, the best of several."""
    count = 2**28 if device.memory_stats() else 2**22  # float32: far more than any cache of an accelerator or a CPU holds
    change = jax.jit(lambda x: x + 1, donate_argnums=0)  # as a copy, but one that no compiler leaves out
    x = jax.block_until_ready(change(jnp.zeros(count, jnp.float32)))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(10):
            x = change(x)
        jax.block_until_ready(x)
        best = min(best, (time.perf_counter() - began) / 10)
    return 2 * x.nbytes / best
