"""A matrix of a stack on a Hopper GPU against a matmul in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import plain
from pallas_kernels.linear import linear, mlp, stored
from pallas_kernels.quantised import FORMS


PACKED = {"rows": 1, "backend": "gpu", "dtype": jnp.bfloat16}
"""How ``stored`` makes words for the tensor cores."""


@pytest.mark.parametrize("rows", [1, 32, 100, 256, 1024, 1100])
def test_linear_is_a_slice_and_a_matmul(key, relative_error, rows):
    keys = jax.random.split(key, 2)
    x = jax.random.normal(keys[0], (1, rows, 512), jnp.bfloat16)
    stack = (jax.random.normal(keys[1], (3, 512, 4, 96)) * 0.05).astype(jnp.bfloat16)
    got = jax.jit(lambda *a: linear(*a, backend="gpu"))(x, stack, jnp.int32(2))
    with jax.default_matmul_precision("highest"):
        want = jnp.einsum("rtd,dkh->rtkh", x.astype(jnp.float32), stack[2].astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, want) < 3e-3


@pytest.mark.parametrize("rows", [1, 32, 100, 256, 1024])
def test_a_deep_and_narrow_matrix_is_multiplied_in_parts(key, relative_error, rows):
    keys = jax.random.split(key, 2)
    x = jax.random.normal(keys[0], (1, rows, 8960), jnp.bfloat16)
    stack = (jax.random.normal(keys[1], (2, 8960, 1536)) * 0.05).astype(jnp.bfloat16)
    got = jax.jit(lambda *a: linear(*a, backend="gpu"))(x, stack, jnp.int32(1))
    with jax.default_matmul_precision("highest"):
        want = x.astype(jnp.float32) @ stack[1].astype(jnp.float32)
    assert relative_error(got, want) < 4e-3


@pytest.mark.parametrize("rows", [1, 32, 100, 256, 1024, 1100])
def test_a_gated_mlp(key, relative_error, rows):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (1, rows, 512), jnp.bfloat16)
    gate_up = (jax.random.normal(keys[1], (3, 512, 2, 896)) * 0.05).astype(jnp.bfloat16)
    down = (jax.random.normal(keys[2], (3, 896, 512)) * 0.05).astype(jnp.bfloat16)
    got = jax.jit(lambda *a: mlp(*a, backend="gpu"))(x, gate_up, down, jnp.int32(2))
    with jax.default_matmul_precision("highest"):
        wide, deep = (a[2].astype(jnp.float32) for a in (gate_up, down))
        gate, up = (x.astype(jnp.float32) @ wide[:, half] for half in (0, 1))
        want = jax.nn.silu(gate) * up @ deep
    assert relative_error(got, want) < 5e-3


def test_float32_is_a_slice_and_a_matmul_to_the_bit(key):
    keys = jax.random.split(key, 2)
    x, stack = jax.random.normal(keys[0], (1, 32, 512)), jax.random.normal(keys[1], (3, 512, 128))
    got, want = (jax.jit(lambda *a, b=b: linear(*a, backend=b))(x, stack, jnp.int32(1)) for b in ("gpu", "sliced"))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "depth", "width"), [(32, 1536, 1536), (256, 1536, 1536), (1, 512, 6144), (1100, 512, 6144)])
def test_a_quantised_matrix_is_what_it_stands_for(key, relative_error, form, rows, depth, width):
    """Whole, and in parts of its depth; in words of the tensor cores, and where many rows are multiplied by what is made plain."""
    keys = jax.random.split(key, 2)
    x = jax.random.normal(keys[0], (1, rows, depth), jnp.bfloat16)
    stack = stored(jax.random.normal(keys[1], (3, depth, 2, width // 2)) * 0.05, form, part=(depth, width // 2), **PACKED)
    assert stack.packed
    got = jax.jit(lambda *a: linear(*a, backend="gpu"))(x, stack, jnp.int32(2))
    with jax.default_matmul_precision("highest"):
        want = x.astype(jnp.float32) @ plain(stack.flat(), jnp.float32)[2]
    assert relative_error(got.reshape(want.shape), want) < (3e-3 if form != "int4" else 6e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [32, 1100])
def test_a_quantised_gated_mlp_is_what_it_stands_for(key, relative_error, form, rows):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (1, rows, 512), jnp.bfloat16)
    gate_up = stored(jax.random.normal(keys[1], (3, 512, 2, 896)) * 0.05, form, part=(512, 896), **PACKED)
    down = stored(jax.random.normal(keys[2], (3, 896, 512)) * 0.05, form, part=(896, 512), **PACKED)
    got = jax.jit(lambda *a: mlp(*a, backend="gpu"))(x, gate_up, down, jnp.int32(2))
    with jax.default_matmul_precision("highest"):
        want = jax.jit(lambda *a: mlp(*a, backend="sliced"))(x.astype(jnp.float32), gate_up, down, jnp.int32(2))
    assert relative_error(got, want) < (5e-3 if form != "int4" else 9e-3)
