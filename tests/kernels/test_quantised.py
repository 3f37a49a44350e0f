"""Quantised matrices by themselves, and every backend of the experts on them against the dense reference on what they stand for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import cpu, expert_mlp, stored, xla
from pallas_kernels.quantised import FORMS, Quantised, dequantise, in_int8, quantise
from pallas_kernels.quantised.words import Packed, pack, packs, unpack
from pallas_kernels.target import Target, multiplies


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 0.02, dtype)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_matrix_by_hand():
    # A column's largest weight, 127 and 2, is 127 of its scales; in groups of one row it is 7 of them.
    w = jnp.array([[127.0, -1.0], [-64.0, 2.0], [0.4, 0.0]])
    q = quantise(w, "int8")
    np.testing.assert_array_equal(q.values, [[127, -64], [-64, 127], [0, 0]])
    np.testing.assert_array_equal(q.scales.astype(jnp.float32), [[1.0, 129 / 8192]])  # 2 / 127 in bfloat16's eight bits
    assert q.scales.dtype == jnp.bfloat16 and q.values.dtype == jnp.int8 and q.shape == w.shape
    np.testing.assert_array_equal(dequantise(q), q.values * q.scales.astype(jnp.float32))
    four = quantise(w, "int4")
    assert four.values.dtype == jnp.int4 and four.scales.shape == (3, 2)
    np.testing.assert_array_equal(four.values.astype(jnp.int32), [[7, -7], [-7, 7], [7, 0]])


@given(seed=st.integers(0, 2**16), depth=st.sampled_from([1, 7, 32, 96, 192]), form=st.sampled_from(FORMS), exponent=st.integers(-30, 30))
def test_a_weight_moves_by_half_a_scale_at_most(seed, depth, form, exponent):
    w = normal(seed, 2, depth, 5) * 2.0**exponent
    q = quantise(w, form)
    per_weight = jnp.repeat(q.scales.astype(jnp.float32), depth // q.scales.shape[-2], axis=-2)
    # Three bits behind the first, and below 2^-6 steps of 2^-9; the largest, whose scale is rounded to eight bits, is among the first.
    most = jnp.maximum(jnp.abs(w) / 16, per_weight * 2.0**-10) if form == "fp8" else per_weight / 2
    assert bool((jnp.abs(w - dequantise(q)) <= most).all())
    same(quantise(dequantise(q), form), q)


@pytest.mark.sweep_but("int4")
@pytest.mark.parametrize("form", FORMS)
def test_compiled_as_by_itself(form):
    """XLA may leave out a conversion to bfloat16 and back; half of the scales would be others."""
    w = normal(0, 3, 128, 64)
    same(jax.jit(quantise, static_argnums=1)(w, form), quantise(w, form))
    twice = jax.jit(lambda w: dequantise(quantise(w, form)))(w)
    np.testing.assert_array_equal(twice, dequantise(quantise(w, form)))


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_and_what_is_not_finite_is_not_hidden(form):
    w = normal(1, 64, 4).at[:, 0].set(0).at[3, 1].set(jnp.nan).at[5, 2].set(jnp.inf)
    back = dequantise(quantise(w, form))
    np.testing.assert_array_equal(back[:, 0], 0)
    assert not bool(jnp.isfinite(back[:, 1]).any()) and not bool(jnp.isfinite(back[:, 2]).all())
    np.testing.assert_array_equal(back[:, 3], dequantise(quantise(w[:, 3:], form))[:, 0])


def test_a_cpu_reads_every_float8_by_its_bits():
    """Normal numbers, those below 2^-6, zeros and what is not a number: of a diagonal matrix of all 256."""
    bits = np.arange(256, dtype=np.uint8)
    every = jnp.asarray(bits.view(ml_dtypes.float8_e4m3fn))
    matrix = Quantised(every[None, None, :], jnp.ones((1, 1, 256), jnp.bfloat16), "fp8")
    for held in (matrix, in_int8(matrix)):
        np.testing.assert_array_equal(cpu._product(jnp.ones((1, 1)), held, jnp.zeros(1, jnp.int32))[0], every.astype(jnp.float32))
        np.testing.assert_array_equal(dequantise(held)[0, 0], every.astype(jnp.float32))


@pytest.mark.sweep_but("int4", "fp8")
@pytest.mark.parametrize("form", FORMS)
def test_words_of_the_tensor_cores_hold_the_same_numbers(form):
    q = quantise(normal(2, 2, 3, 256, 192), form)
    p = pack(q)
    assert p.shape == q.shape and p.nbytes == q.nbytes and p.words.dtype == jnp.uint32
    same(unpack(p), q)
    same(unpack(p[1]), q[1])
    assert packs((3, 128, 64)) and not packs((192, 64)) and not packs((128, 96))


def test_the_first_thread_has_the_first_weights():
    """Thread 0 holds rows 0 and 1 of columns 0 and 8 of a tile, then rows 8 and 9, and so on: wgmma's left operand."""
    values = jnp.arange(128 * 64).reshape(128, 64) % 251 - 125
    q = quantise(values.astype(jnp.float32), "int8")
    low, second, mid, fourth = np.asarray(pack(q).words[0, 0, :1]).view(np.int8)
    assert [low, mid, second, fourth] == [q.values[0, 0], q.values[1, 0], q.values[0, 8], q.values[1, 8]]


def make(seed, *, tokens, experts=6, k=3, embed=192, width=32, layers=2, dtype=jnp.float32):
    """(x, expert_ids, weights, gate_up, down), stacks of layers."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int32)
    x, weights = rng.standard_normal((tokens, embed)), rng.uniform(0.1, 1.0, (tokens, k))
    stacks = (rng.standard_normal((layers, experts, *s)) / s[0] ** 0.5 for s in ((embed, 2 * width), (width, embed)))
    return jnp.asarray(x, dtype), jnp.asarray(ids), jnp.asarray(weights, jnp.float32), *(jnp.asarray(s, dtype) for s in stacks)


@functools.partial(jax.jit, static_argnames="backend")
def run(*args, backend, **options):
    return expert_mlp(*args, backend=backend, **options)


def quantised(args, form, backend, dtype=jnp.float32):
    return *args[:3], *(stored(stack, form, backend=backend, dtype=dtype) for stack in args[3:])


@pytest.mark.sweep_but("cpu-int4", "cpu-fp8", "ragged-int8")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["cpu", "ragged", "gpu", "dense"])
def test_backends_agree_with_the_weights_that_are_meant(backend, form):
    args = make(3, tokens=101)
    valid = jnp.arange(101) % 5 != 2
    asked = quantised(args, form, backend)
    meant = *args[:3], *(dequantise(quantise(stack, form)) for stack in args[3:])
    got, want = (run(*a, backend=b, layer=1, valid=valid) for a, b in ((asked, backend), (meant, "dense")))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=5e-6)
    np.testing.assert_array_equal(got[2], 0)
    one = *asked[:3], *(stack[1] for stack in asked[3:])
    np.testing.assert_allclose(run(*one, backend=backend, valid=valid), want, rtol=2e-5, atol=5e-6)


@pytest.mark.sweep_but("int4-1-101")
@pytest.mark.parametrize(("form", "chunk_bytes", "tokens"), [("int4", 1, 101), ("fp8", 60_000, 5), ("int8", 40_000, 40)])
def test_a_few_experts_at_a_time_are_made_plain(form, chunk_bytes, tokens, monkeypatch):
    """One, three or two of six; where one has more rows than a tile, in several; and those that a device holds alone."""
    monkeypatch.setattr(xla, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(xla, "TILE_ROWS", 16)
    args = make(9, tokens=tokens)
    asked = quantised(args, form, "ragged")
    meant = *args[:3], *(dequantise(quantise(stack, form)) for stack in args[3:])
    traced = jax.jit(lambda *a, **options: expert_mlp(*a, backend="ragged", layer=1, **options))
    want = run(*meant, backend="dense", layer=1)
    np.testing.assert_allclose(traced(*asked), want, rtol=2e-5, atol=5e-6)

    def share(first):
        held = jax.tree.map(functools.partial(jax.lax.slice_in_dim, start_index=first, limit_index=first + 3, axis=1), asked[3:])
        return traced(*asked[:3], *held, first_expert=jnp.int32(first))

    np.testing.assert_allclose(share(0) + share(3), want, rtol=2e-5, atol=5e-6)


def test_int4_of_a_gpu_is_read_in_bytes(monkeypatch):
    q = quantise(normal(10, 2, 128, 6), "int4")
    odd = quantise(normal(10, 2, 128, 5), "int4")  # whose rows do not begin with bytes
    assert xla.read_in_bytes(q) is q
    monkeypatch.setattr(xla, "current_target", lambda: Target("gpu", 8.0))
    for read in (xla.read_in_bytes(q), jax.jit(xla.read_in_bytes)(q)):
        assert read.values.dtype == jnp.int8
        np.testing.assert_array_equal(read.values, q.values.astype(jnp.int8))
    assert xla.read_in_bytes(odd) is odd


@pytest.mark.sweep_but("int4")
@pytest.mark.parametrize("form", FORMS)
def test_cpu_row_is_bitwise_the_same_in_any_company(form):
    x, ids, weights, *stacks = quantised(make(4, tokens=100), form, "cpu")
    y = run(x, ids, weights, *stacks, backend="cpu", layer=0)
    for t in range(0, 100, 9):
        alone = run(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], *stacks, backend="cpu", layer=0)
        np.testing.assert_array_equal(alone[0], y[t])


@pytest.mark.sweep_but("int8")
@pytest.mark.parametrize("form", FORMS)
def test_cpu_reads_quantised_stacks_in_place(form):
    """No layer is widened: where all of them are read in one program, nothing as large as a layer's integers is made."""
    x, ids, weights, *stacks = quantised(make(5, tokens=4, experts=8, embed=128, width=128, layers=3), form, "cpu")

    def layers(x, gate_up, down):
        def body(x, layer):
            return expert_mlp(x, ids, weights, gate_up, down, layer=layer, backend="cpu"), None

        return jax.lax.scan(body, x, jnp.arange(3))[0]

    compiled = jax.jit(layers).lower(x, *stacks).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < stacks[0].values.nbytes / 3


@pytest.mark.parametrize(
    ("form", "held", "shown", "backend"), [("int8", "int8", "i8", "ragged"), ("fp8", "float8_e4m3fn", "f8_e4m3fn", "tpu")]
)
def test_values_are_multiplied_as_they_are_where_the_device_does_that(form, held, shown, backend, monkeypatch):
    args = make(6, tokens=20, dtype=jnp.bfloat16)
    asked = quantised(args, form, backend)
    want = run(*asked, backend="dense", layer=1).astype(jnp.float32)
    monkeypatch.setattr(xla, "multiplies", lambda target: held)
    traced = jax.jit(lambda *a: expert_mlp(*a, backend=backend, layer=1))
    got = traced(*asked).astype(jnp.float32)
    assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 8e-3
    assert f"{shown}[12,192,64]" in str(jax.make_jaxpr(traced)(*asked))  # both layers' experts, as they lie


def test_who_multiplies_integers():
    kinds = {"TPU v4": None, "TPU v5 lite": "int8", "TPU v5": None, "TPU v6 lite": "int8", "TPU7x": "float8_e4m3fn"}
    assert {kind: multiplies(Target("tpu", kind=kind)) for kind in kinds} == kinds
    assert multiplies(Target("gpu", 9.0)) is multiplies(Target("cpu")) is None


def test_each_backend_holds_what_it_reads():
    w, backends = normal(7, 2, 128, 128), ("cpu", "ragged", "gpu")
    for form, others in (("int8", "int8"), ("int4", "int4"), ("fp8", "float8_e4m3fn")):
        held = [stored(w, form, backend=b, dtype=jnp.float32) for b in backends]
        assert [q.values.dtype.name for q in held] == ["int8", others, others]
        assert len({q.nbytes for q in held}) == (2 if form == "int4" else 1)
        for q in held:
            np.testing.assert_array_equal(dequantise(q), dequantise(quantise(w, form)))
        assert isinstance(stored(w, form, backend="gpu", dtype=jnp.bfloat16), Packed)
    assert not isinstance(stored(w[..., :96], "int4", backend="gpu", dtype=jnp.bfloat16), Packed)


def test_shapes_are_checked_as_those_of_arrays():
    x, ids, weights, gate_up, down = quantised(make(8, tokens=2), "int8", "ragged")
    with pytest.raises(ValueError, match=r"down has shape \(6, 32, 192\), expected \(2, 6, 32, 192\)"):
        grouped_matmul.expert_mlp(x, ids, weights, gate_up, down[0], layer=0)
