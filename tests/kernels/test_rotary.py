"""Bias or norms of heads and their rotation: the formula in NumPy, and the Hopper kernel against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import in_simulator, simulated

from pallas_kernels.rotary import HeadNorms, choose_backend, rotate, table
from pallas_kernels.target import Target


def drawn(shape, dtype):
    rng = np.random.default_rng(0)
    heads = jnp.asarray(rng.standard_normal(shape), dtype)
    norms = HeadNorms(*(jnp.asarray(1 + rng.standard_normal((3, shape[-1])), dtype) for _ in "qk"), jnp.int32(1), 1e-6)
    positions = jnp.asarray(rng.integers(0, 5000, shape[:-3]), jnp.int32)
    return heads, positions, norms


def in_parts(heads):
    """Two parts whose sum is ``heads``."""
    first = heads / 2 + 1
    return jnp.stack([first, heads - first])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dim", [4, 8])
@pytest.mark.parametrize("backend", ["reference", "gpu"])
def test_as_the_formula_says(backend, dim, normed):
    """Pairs of dimensions turn as one complex number; what is beyond ``dim`` passes through, and so do values."""
    heads, positions, norms = drawn((2, 3, 2, 4, 8), jnp.float32)
    bias = None if normed else jnp.asarray(np.random.default_rng(1).standard_normal(heads.shape[-3:]), jnp.float32)
    got = rotate(in_parts(heads), table(positions, dim, 100.0), norms if normed else None, bias, backend=backend)
    heads = heads if bias is None else heads + bias
    want, half = np.asarray(heads, np.float64).copy(), dim // 2
    if normed:
        want /= np.sqrt((want**2).mean(-1, keepdims=True) + 1e-6)
        want *= np.stack([norms.queries[1]] * 2 + [norms.keys[1]] * 2).astype(np.float64)
    turn = np.exp(1j * np.asarray(positions)[..., None] * 100.0 ** (-np.arange(half) / half))[:, :, None, None]
    turned = (want[..., :half] + 1j * want[..., half:dim]) * turn
    want[..., :half], want[..., half:dim] = turned.real, turned.imag
    want[..., -1, :] = heads[..., -1, :]
    np.testing.assert_allclose(got, want, atol=2e-3)  # positions of thousands in float32


def test_choice_of_backend():
    hopper = "gpu" if jax.__version_info__ >= (0, 11) else "reference"
    assert choose_backend(Target("gpu", 9.0)) == hopper
    assert {choose_backend(t) for t in (Target("cpu"), Target("tpu"), Target("gpu", 8.0))} == {"reference"}
    with pytest.raises(ValueError, match="unknown rotary backend 'fast'; valid: reference, gpu"):
        rotate(*drawn((1, 1, 1, 1, 3, 4), jnp.float32)[:2], backend="fast")


@simulated
@pytest.mark.parametrize(("shape", "dim"), [((1, 2, 8, 2, 4, 128), 64), ((2, 1, 8, 2, 6, 128), 128), ((3, 1, 4, 1, 3, 64), 64)])
def test_the_hopper_kernel_in_the_simulator(shape, dim):
    heads, positions, norms = drawn(shape, jnp.bfloat16)
    turns = table(positions[0], dim, 1e4)
    with in_simulator():
        got = rotate(heads, turns, norms, backend="gpu")
    np.testing.assert_array_equal(got, rotate(heads, turns, norms, backend="reference"))
