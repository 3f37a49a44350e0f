"""A matrix of a stack: every backend against the formula, where there is no GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import in_simulator, simulated

from pallas_kernels.grouped_matmul import gpu_kernel
from pallas_kernels.linear import choose_backend, gpu, linear, mlp
from pallas_kernels.parts import summed
from pallas_kernels.target import Target


@pytest.mark.parametrize("backend", ["sliced", "cpu", "gpu", None])
def test_the_last_axes_of_x_meet_the_first_of_the_matrix(backend):
    rng = np.random.default_rng(0)
    x, stack = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((3, 4, 5, 6, 7))
    got = jax.jit(lambda *a: linear(*a, backend=backend))(jnp.asarray(x, jnp.float32), jnp.asarray(stack, jnp.float32), jnp.int32(2))
    assert got.shape == (2, 3, 6, 7)
    np.testing.assert_allclose(got, np.einsum("rtab,abcd->rtcd", x, stack[2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["sliced", "cpu", "gpu", None])
def test_a_gated_mlp(backend):
    rng = np.random.default_rng(1)
    x, gate_up, down = (rng.standard_normal(shape) for shape in ((2, 3, 4), (3, 4, 2, 5), (3, 5, 4)))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, gate_up, down)]
    got = jax.jit(lambda *a: mlp(*a, backend=backend))(*arrays, jnp.int32(2))
    gate, up = x @ gate_up[2, :, 0], x @ gate_up[2, :, 1]
    np.testing.assert_allclose(got, (gate / (1 + np.exp(-gate)) * up) @ down[2], rtol=1e-4, atol=1e-5)


def test_choice_of_backend():
    hopper = "gpu" if jax.__version_info__ >= (0, 11) else "sliced"
    assert choose_backend(Target("gpu", 9.0)) == hopper
    assert {choose_backend(t) for t in (Target("tpu"), Target("gpu", 8.0))} == {"sliced"} and choose_backend(Target("cpu")) == "cpu"
    with pytest.raises(ValueError, match="unknown linear backend 'fast'; valid: sliced, cpu, gpu"):
        linear(jnp.ones((1, 1, 2)), jnp.ones((1, 2, 2)), 0, backend="fast")


@simulated
@pytest.mark.parametrize("rows", [1, 24, 160])
@pytest.mark.parametrize("depth", [256, 1024])
def test_the_hopper_kernel_in_the_simulator(rows, depth, monkeypatch):
    """A matrix whole, and in two parts of its depth, which are added up unless the parts are asked for; tiles that the rows do not fill."""
    monkeypatch.setattr(gpu_kernel, "num_multiprocessors", lambda: 3)
    rng = np.random.default_rng(rows)
    x, stack = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((1, rows, depth), (2, depth, 192)))
    assert gpu._parts(rows, depth, 192) == depth // 1024 + 1
    with in_simulator():
        got, parts = (linear(x, stack, 1, parts=parts, backend="gpu") for parts in (False, True))
    want = x[0].astype(jnp.float32) @ stack[1].astype(jnp.float32)
    np.testing.assert_allclose(got[0].astype(jnp.float32), want, atol=0.01 * float(jnp.abs(want).max()))
    np.testing.assert_array_equal(got, summed(parts))
    assert len(parts) == depth // 1024 + 1


@pytest.mark.parametrize(
    ("rows", "depth", "width", "parts"),
    # Fast-dLLM v2's projections, LLaDA2-mini's, SDAR-8B's; and with more rows.
    [(32, 1536, 2048, 4), (32, 8960, 1536, 4), (64, 2048, 3072, 2), (32, 2048, 2048, 4), (32, 4096, 4096, 2), (32, 4096, 6144, 1)]
    + [(256, 1536, 1536, 2), (256, 4096, 4096, 1), (1024, 2048, 2048, 1), (32, 704, 512, 1), (32, 8960, 64, 4)],
)
def test_parts_are_as_many_as_multiprocessors_have_use_for(rows, depth, width, parts):
    assert gpu._parts(rows, depth, width) == parts
