"""That the simulator sees what the kernel tests rely on it for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


@pytest.mark.parametrize("wait_first", [True, False])
def test_a_read_before_the_copy_has_arrived_is_a_race(wait_first, capfd):
    def kernel(x_ref, out_ref, semaphore):
        copy = pltpu.make_async_copy(x_ref, out_ref, semaphore)
        copy.start()
        if wait_first:
            copy.wait()
        out_ref[0, 0] = out_ref[0, 0] + 1
        if not wait_first:
            copy.wait()

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True),
    )
    jax.block_until_ready(jax.jit(call)(jnp.ones((8, 128))))
    out, err = capfd.readouterr()
    assert ("RACE DETECTED" in out + err) == (not wait_first)
