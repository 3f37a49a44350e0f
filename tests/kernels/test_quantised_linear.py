"""Quantised matrices of layers: every way in which they lie and are multiplied, against what they stand for."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import in_simulator, simulated
from words_in_memory import operand_in_shared_memory

from pallas_kernels.grouped_matmul import gpu_kernel, plain
from pallas_kernels.linear import arranged, gpu, linear, mlp, stored
from pallas_kernels.quantised import FORMS, dequantise, quantise


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / math.sqrt(shape[-2]), dtype)


def meant(stack, shape):
    """The matrices ``[L, ...]`` that a stack stands for, in float32."""
    return jax.jit(lambda stack: plain(stack.flat(), jnp.float32).reshape(shape))(stack)


def error(got, want):
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.sweep_but("cpu-fp8", "ragged-int8", "gpu-int4")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["cpu", "ragged", "gpu"])
def test_matrices_are_those_of_each_layer_by_itself(form, backend):
    """Contracted over one axis or two, in whatever order a machine reads them."""
    w = normal(0, 3, 2, 64, 3, 64)
    stack = stored(w, form, rows=2, backend=backend, dtype=jnp.bfloat16, part=(128, 64))
    assert stack.packed == (backend == "gpu") and stack.shape == (3, 128, 3, 64) and stack.form == form
    want = jax.jit(lambda w: dequantise(quantise(w.reshape(3, 128, 192), form)).reshape(w.shape))(w)
    np.testing.assert_array_equal(meant(stack, w.shape), want)
    assert stack.nbytes == sum(a.nbytes if a.dtype != jnp.int4 else a.size // 2 for a in jax.tree.leaves(stack))


def test_tiles_lie_in_one_device_s_part():
    w = normal(1, 1, 128, 2, 96)  # of 64 columns, where 192 together would do
    assert not stored(w, "int8", rows=1, backend="gpu", dtype=jnp.bfloat16, part=(128, 96)).packed
    assert not stored(w, "int8", rows=1, backend="gpu", dtype=jnp.float32, part=(128, 64)).packed


@pytest.mark.sweep_but("int4")
@pytest.mark.parametrize("form", FORMS)
def test_numbers_of_a_file_are_kept_as_they_are(form):
    """Scales come beside each number: how many of a column share one is known apart."""
    w = normal(2, 2, 128, 3, 64)
    q = quantise(w.reshape(2, 128, 192), form, dtype=jnp.int8 if form == "int4" else None)
    each = jnp.repeat(q.scales, 128 // q.scales.shape[1], 1).reshape(w.shape)
    how = {"rows": 1, "backend": "gpu", "dtype": jnp.bfloat16, "part": (128, 64)}
    got = arranged(q.values.reshape(w.shape), each, form, groups=q.scales.shape[1], **how)
    jax.tree.map(np.testing.assert_array_equal, got, stored(w, form, **how))


@pytest.mark.sweep_but("sliced-ragged-int4", "sliced-cpu-fp8", "cpu-cpu-int8", "cpu-gpu-int8", "gpu-ragged-int8")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ["cpu", "ragged", "gpu"])
@pytest.mark.parametrize("backend", ["sliced", "cpu", "gpu"])
def test_a_product_is_that_with_what_they_stand_for(form, order, backend):
    w, x = normal(3, 2, 2, 64, 3, 64), normal(4, 2, 5, 2, 64)
    stack = stored(w, form, rows=2, backend=order, dtype=jnp.bfloat16, part=(128, 64))
    got = jax.jit(lambda *a: linear(*a, backend=backend))(x, stack, jnp.int32(1))
    np.testing.assert_allclose(got, jnp.tensordot(x, meant(stack, w.shape)[1], 2), rtol=1e-5, atol=1e-5)
    assert got.shape == (2, 5, 3, 64)


@pytest.mark.sweep_but("sliced-fp8", "cpu-int4")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["sliced", "cpu"])
def test_a_gated_mlp_is_that_of_what_they_stand_for(form, backend):
    arrays = normal(5, 2, 64, 2, 48), normal(6, 2, 48, 64)
    stacks = [stored(w, form, rows=1, backend="cpu", dtype=jnp.float32, part=(1, 1)) for w in arrays]
    got = jax.jit(lambda *a: mlp(*a, backend=backend))(x := normal(7, 2, 3, 64), *stacks, jnp.int32(1))
    want = mlp(x, *(meant(stack, w.shape) for stack, w in zip(stacks, arrays, strict=True)), 1, backend="sliced")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.sweep_but("48-3", "320-5", "512-1", "768-2")
@pytest.mark.parametrize(("depth", "groups"), [(48, 1), (48, 3), (96, 4), (320, 2), (320, 5), (512, 1), (512, 2), (512, 8), (768, 2)])
def test_a_cpu_goes_through_rows_and_groups_of_any_length(depth, groups):
    """Of a file a group may have any length: steps of rows are a part of one, one, several, or the whole matrix."""
    rng = np.random.default_rng(groups)
    numbers = jnp.asarray(rng.integers(-8, 8, (2, depth, 5)), jnp.int8)
    scales = jnp.repeat(jnp.asarray(rng.random((2, groups, 5)), jnp.bfloat16), depth // groups, 1)
    stack = arranged(numbers, scales, "int4", rows=1, groups=groups, backend="cpu", dtype=jnp.float32, part=(1, 1))
    x = normal(9, 1, 3, depth)
    want = np.asarray(x) @ (np.asarray(numbers, np.float32)[1] * np.asarray(scales, np.float32)[1])
    np.testing.assert_allclose(jax.jit(lambda *a: linear(*a, backend="cpu"))(x, stack, jnp.int32(1)), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend", "most"), [("sliced", 2), ("cpu", 1 / 2)])
def test_no_layer_but_one_is_made_plain(backend, most):
    """Whatever number of them a stack has; on a CPU a part of the layer at a time. In layers of float32."""

    def temporaries(layers):
        stack = stored(normal(8, layers, 1024, 64), "int8", rows=1, backend="cpu", dtype=jnp.float32, part=(1, 1))
        lowered = jax.jit(lambda *a: linear(*a, backend=backend)).lower(normal(9, 1, 4, 1024), stack, jnp.int32(0))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) == temporaries(2) < most * 4 * 1024 * 64


@pytest.fixture
def simulator(monkeypatch):
    monkeypatch.setattr(gpu_kernel, "num_multiprocessors", lambda: 3)
    monkeypatch.setattr(gpu_kernel, "words", operand_in_shared_memory)
    with in_simulator():
        yield


@simulated
@pytest.mark.sweep_but("int8-1-1024", "int4-24-1024")
@pytest.mark.parametrize(
    ("form", "rows", "depth"), [("int8", 1, 1024), ("int4", 24, 1024), ("int4", 3, 256), ("fp8", 3, 1024), ("int8", 160, 1024)]
)
def test_the_hopper_kernel_in_the_simulator(form, rows, depth, simulator):
    """A matrix whole, and in two parts of its depth, which share the scales of columns and have their own of groups."""
    x, w = normal(10, 1, rows, depth, dtype=jnp.bfloat16), normal(11, 2, depth, 3, 64, dtype=jnp.bfloat16)
    stack = stored(w, form, rows=1, backend="gpu", dtype=jnp.bfloat16, part=(depth, 64))
    assert stack.packed and gpu._parts(rows, depth, 192, step=128) == 1 + (depth == 1024)
    got = linear(x, stack, 1, backend="gpu")
    assert error(got, linear(x.astype(jnp.float32), stack, 1, backend="sliced")) < 5e-3


@simulated
@pytest.mark.sweep_but("int8")
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_hopper_kernel_gates_in_the_simulator(form, simulator):
    x, (gate_up, down) = normal(12, 1, 5, 256, dtype=jnp.bfloat16), (normal(13, 2, 256, 2, 128), normal(14, 2, 128, 64))
    stacks = [
        stored(w, form, rows=1, backend="gpu", dtype=jnp.bfloat16, part=part) for w, part in ((gate_up, (256, 128)), (down, (128, 64)))
    ]
    got = mlp(x, *stacks, 1, backend="gpu")
    assert error(got, mlp(x.astype(jnp.float32), *stacks, 1, backend="sliced")) < 8e-3
