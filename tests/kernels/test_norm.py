"""What is added to the residual stream, and its norm: the formula in NumPy, and the Hopper kernel against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import in_simulator, simulated

from pallas_kernels.norm import Scales, add_and_norm, choose_backend
from pallas_kernels.target import Target


def drawn(shape, parts, dtype):
    rng = np.random.default_rng(0)
    x, stack = jnp.asarray(rng.standard_normal(shape), dtype), jnp.asarray(1 + rng.standard_normal((3, shape[-1])), dtype)
    added = jnp.asarray(rng.standard_normal((parts, *shape)), dtype) if parts else None
    return x, added, Scales(stack, jnp.int32(1), 1e-6)


@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("backend", ["reference", "gpu"])
def test_as_the_formula_says(backend, parts):
    x, added, scales = drawn((2, 3, 8), parts, jnp.float32)
    total, normed = add_and_norm(x, added, scales, backend=backend)
    want = np.asarray(x, np.float64) + (np.asarray(added, np.float64).sum(0) if parts else 0)
    np.testing.assert_allclose(total, want, atol=1e-6)
    np.testing.assert_allclose(normed, want / np.sqrt((want**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scales.stack[1]), atol=1e-5)


def test_choice_of_backend():
    hopper = "gpu" if jax.__version_info__ >= (0, 11) else "reference"
    assert choose_backend(Target("gpu", 9.0)) == hopper
    assert {choose_backend(t) for t in (Target("cpu"), Target("tpu"), Target("gpu", 8.0))} == {"reference"}
    with pytest.raises(ValueError, match="unknown norm backend 'fast'; valid: reference, gpu"):
        add_and_norm(*drawn((1, 1, 4), 1, jnp.float32), backend="fast")


@simulated
@pytest.mark.parametrize(("shape", "parts"), [((1, 3, 1536), 2), ((2, 1, 2048), 5), ((1, 2, 256), 1), ((1, 2, 768), 0)])
def test_the_hopper_kernel_in_the_simulator(shape, parts):
    given = drawn(shape, parts, jnp.bfloat16)
    with in_simulator():
        got = add_and_norm(*given, backend="gpu")
    for ours, reference in zip(got, add_and_norm(*given, backend="reference"), strict=True):
        np.testing.assert_array_equal(ours, reference)
