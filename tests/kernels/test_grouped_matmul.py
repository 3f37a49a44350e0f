"""Expert MLP: every backend against the dense reference, and a row against itself in other company.

The CPU backend works in chunks of 256 (token, expert) pairs: with three experts a token, 100 tokens are two chunks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import in_simulator, simulated
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.test_util import check_grads
from rows_by_group import place_rows
from words_in_memory import operand_in_shared_memory

from pallas_kernels.grouped_matmul import choose_backend, dense, expert_mlp, gpu, gpu_kernel, stored, tpu
from pallas_kernels.quantised.words import Packed
from pallas_kernels.target import Target, current_target


FAST = ("cpu", "ragged")


def make(seed, *, tokens, experts=6, k=3, embed=24, width=10, dtype=jnp.float32, spread=True):
    """(x, expert_ids, weights, gate_up, down); without ``spread`` every token picks the same experts."""
    rng = np.random.default_rng(seed)
    ids = np.stack([np.random.default_rng(seed + t * spread).permutation(experts)[:k] for t in range(tokens)])

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / shape[-2] ** 0.5, dtype)

    weights = jnp.asarray(rng.uniform(0.1, 1.0, (tokens, k)), jnp.float32)
    x, gate_up, down = normal(embed, tokens).T, normal(experts, embed, 2 * width), normal(experts, width, embed)
    return x * embed**0.5, jnp.asarray(ids, jnp.int32), weights, gate_up, down


@functools.partial(jax.jit, static_argnames="backend")
def run(*args, backend, **options):
    return expert_mlp(*args, backend=backend, **options)


def test_dense_is_what_the_formula_says():
    # One token, two experts of width 1: silu(x Wg) * (x Wu) Wd with x = [1, 2].
    gate_up = jnp.array([[[1.0, 1.0], [0.0, 1.0]], [[0.0, 2.0], [1.0, 0.0]]])
    down = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    y = dense(jnp.array([[1.0, 2.0]]), jnp.array([[1, 0]]), jnp.array([[0.5, 2.0]]), gate_up, down)
    silu_1, silu_2 = 1 / (1 + np.exp(-1)), 2 / (1 + np.exp(-2))
    np.testing.assert_allclose(y, [[2.0 * silu_1 * 3.0, 0.5 * silu_2 * 2.0]], rtol=1e-6)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), tokens=st.sampled_from([1, 101]), spread=st.booleans(), masked=st.booleans())
def test_backends_agree_with_dense(backend, seed, tokens, spread, masked):
    args = make(seed, tokens=tokens, spread=spread)
    valid = jnp.asarray(np.random.default_rng(seed).random(tokens) < 0.6) if masked else None
    expected = run(*args, backend="dense", valid=valid)
    np.testing.assert_allclose(run(*args, backend=backend, valid=valid), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("embed, width", [(7, 5), (16, 3)])
def test_any_width(backend, embed, width):
    args = make(1, tokens=11, embed=embed, width=width)
    np.testing.assert_allclose(run(*args, backend=backend), run(*args, backend="dense"), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16(backend):
    args = make(2, tokens=9, dtype=jnp.bfloat16)
    y = run(*args, backend=backend)
    assert y.dtype == jnp.bfloat16
    expected = run(*args, backend="dense").astype(jnp.float32)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ("dense", *FAST))
def test_invalid_rows_give_zeros_whatever_they_hold(backend):
    x, ids, weights, gate_up, down = make(3, tokens=180)
    valid = jnp.arange(180) % 3 == 0
    poisoned = run(
        jnp.where(valid[:, None], x, jnp.nan),
        jnp.where(valid[:, None], ids, 99),
        jnp.where(valid[:, None], weights, jnp.nan),
        gate_up,
        down,
        backend=backend,
        valid=valid,
    )
    clean = run(x, ids, weights, gate_up, down, backend=backend)
    np.testing.assert_array_equal(poisoned[~valid], 0)
    np.testing.assert_allclose(poisoned[valid], clean[valid], rtol=1e-6, atol=1e-7)
    nothing = run(x, ids, weights, gate_up, down, backend=backend, valid=jnp.zeros(180, bool))
    np.testing.assert_array_equal(nothing, 0)


@pytest.mark.parametrize("backend", ("dense", *FAST))
def test_layer_of_a_stack(backend):
    x, ids, weights, gate_up, down = make(4, tokens=5)
    stacks = jnp.stack([gate_up * 0, gate_up, gate_up + 1]), jnp.stack([down * 0, down, down + 1])
    y = run(x, ids, weights, *stacks, backend=backend, layer=1)
    np.testing.assert_allclose(y, run(x, ids, weights, gate_up, down, backend=backend), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spread", [True, False])
def test_cpu_row_is_bitwise_the_same_in_any_company(spread):
    x, ids, weights, gate_up, down = make(5, tokens=100, embed=64, width=32, spread=spread)
    y = run(x, ids, weights, gate_up, down, backend="cpu")
    for t in range(0, 100, 3):
        alone = run(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], gate_up, down, backend="cpu")
        np.testing.assert_array_equal(alone[0], y[t])
    order = np.random.default_rng(0).permutation(100)
    np.testing.assert_array_equal(run(x[order], ids[order], weights[order], gate_up, down, backend="cpu"), y[order])
    valid = jnp.arange(100) % 2 == 0
    some = run(x, ids, weights, gate_up, down, backend="cpu", valid=valid)
    np.testing.assert_array_equal(some[::2], y[::2])


def test_cpu_reads_a_stack_of_layers_in_place():
    # The point of `layer`: in a scan over layers no array as large as one layer's weights may be made.
    _, ids, weights, gate_up, down = make(6, tokens=4, experts=8, embed=64, width=64)
    stacks = jnp.stack([gate_up] * 3), jnp.stack([down] * 3)

    def layers(x, gate_up, down):
        def body(x, layer):
            return expert_mlp(x, ids, weights, gate_up, down, layer=layer, backend="cpu"), None

        return jax.lax.scan(body, x, jnp.arange(3))[0]

    compiled = jax.jit(layers).lower(jnp.ones((4, 64)), *stacks).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < gate_up.nbytes / 2


@pytest.mark.sweep_but("bfloat16-0.02")
@pytest.mark.parametrize("dtype, error", [(jnp.float32, 2e-5), (jnp.bfloat16, 2e-2)])
def test_the_tpu_kernel_on_its_share_of_the_experts_of_a_layer(dtype, error):
    """21 pairs are less than a tile of rows, 99 more than three, and in no tile does a group begin or end where the tile does."""
    run_tiled = jax.jit(functools.partial(tpu.tiled, interpret=True))
    for tokens in (7, 33):
        x, ids, weights, gate_up, down = make(11, tokens=tokens, experts=6, embed=128, width=64, dtype=dtype)
        stacks = jnp.stack([gate_up * 0, gate_up]), jnp.stack([down * 0, down])
        valid = jnp.arange(tokens) % 4 > 0
        expected = run(x, ids, weights, gate_up, down, backend="dense", valid=valid).astype(jnp.float32)
        whole = run_tiled(x, ids, weights, *stacks, layer=1, valid=valid)
        shares = [
            run_tiled(x, ids, weights, *(a[:, first : first + 3] for a in stacks), layer=1, valid=valid, first_expert=first)
            for first in (0, 3)
        ]
        for y in (whole, sum(share.astype(jnp.float32) for share in shares)):
            np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=error, atol=error)


def test_dense_gradient():
    x, ids, weights, gate_up, down = make(7, tokens=3, embed=6, width=4)
    valid = jnp.array([True, True, False])
    loss = jax.jit(lambda x, weights, gate_up, down: dense(x, ids, weights, gate_up, down, valid=valid).sum())
    check_grads(loss, (x, weights, gate_up, down), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
    bad = x.at[2].set(jnp.nan)
    grads = jax.grad(loss, argnums=(0, 1, 2, 3))(bad, weights, gate_up, down)
    assert all(bool(jnp.isfinite(g).all()) for g in grads)
    np.testing.assert_array_equal(grads[0][2], 0)


def test_choice_of_backend():
    assert choose_backend(Target("cpu")) == "cpu"
    assert {choose_backend(t) for t in (Target("tpu"), Target("gpu"), Target("gpu", 7.5))} == {"ragged"}
    kinds = "TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"
    assert [choose_backend(Target("tpu", kind=kind)) for kind in kinds] == ["ragged"] * 4 + ["tpu"]
    args = make(8, tokens=2)
    chosen = run(*args, backend=choose_backend(current_target()))
    np.testing.assert_array_equal(run(*args, backend=None), chosen)


def test_errors_name_what_is_wrong():
    x, ids, weights, gate_up, down = make(9, tokens=2)
    with pytest.raises(ValueError, match="'fast'.*dense, ragged, cpu"):
        expert_mlp(x, ids, weights, gate_up, down, backend="fast")
    with pytest.raises(ValueError, match="weights has shape"):
        expert_mlp(x, ids, weights[:, :1], gate_up, down)
    with pytest.raises(ValueError, match="gate_up has shape"):
        expert_mlp(x, ids, weights, gate_up[..., 1:], down)


# What places rows and what fetches them, ``gpu_places`` and ``gpu_fetch``, run in no simulator: plain code does it here, and tests/gpu
# holds the one to the other.


def _fetch(x, chosen, to):
    """``gpu_fetch.fetch`` by plain loads and stores, where ``choose`` gives what it is given."""
    numbers, first, begin, end = chosen
    for row in range(to.shape[0]):

        @pl.when((row >= begin) & (row < end))
        def copy(row=row):
            to[row] = x[numbers[first + row]]


@pytest.fixture
def two_multiprocessors(monkeypatch):
    """What the simulator does not know, written by the thread that asks for it, is done in plain code."""
    monkeypatch.setattr(gpu_kernel, "num_multiprocessors", lambda: 2)
    monkeypatch.setattr(gpu_kernel, "choose", lambda *args, rows, step: args)
    monkeypatch.setattr(gpu_kernel, "fetch", _fetch)
    monkeypatch.setattr(gpu_kernel, "settle", lambda late: None)
    monkeypatch.setattr(gpu, "place_rows", place_rows)


@simulated
@pytest.mark.parametrize("tokens", [3, 70])
def test_the_hopper_kernels_in_the_simulator(tokens, two_multiprocessors):
    x, ids, weights, gate_up, down = make(3, tokens=tokens, embed=128, width=128, dtype=jnp.bfloat16)
    stacks = [jnp.stack([jnp.full_like(a, jnp.nan), a]) for a in (gate_up, down)]
    shared = (stacks[0][:, 0].reshape(2, 128, 2, 128), stacks[1][:, 0])
    valid = jnp.arange(tokens) != 2
    with in_simulator():
        got = expert_mlp(x, ids, weights, *stacks, layer=jnp.int32(1), valid=valid, shared=shared, backend="gpu")
    want = expert_mlp(x, ids, weights, *stacks, layer=1, valid=valid, shared=shared, backend="dense")
    error = jnp.linalg.norm((got - want).astype(jnp.float32)) / jnp.linalg.norm(want.astype(jnp.float32))
    assert float(error) < 8e-3


def _rows_times_groups(x, weights, extra, layer, groups, *, swiglu, tile, numbers=None):
    """What ``gpu_kernel.matmul`` is to compute: rows of no group are not written, and may hold anything."""
    x = x if numbers is None else jnp.where(numbers[:, None] < 0, jnp.nan, x[numbers])
    weights = weights[layer] if extra is None else jnp.concatenate([weights[layer], extra[layer][None]])
    start, size = (a[: len(groups.upto), None] for a in (groups.start, groups.size))
    mine = (jnp.arange(len(x)) >= start) & (jnp.arange(len(x)) < start + size)
    out = jnp.einsum("gm,mk,gkn->mn", mine.astype(x.dtype), jnp.where(mine.any(0)[:, None], x, 0), weights)
    if swiglu:
        gate, up = jnp.split(out, 2, axis=-1)
        out = jax.nn.silu(gate) * up
    return jnp.where(mine.any(0)[:, None], out, jnp.nan).astype(x.dtype)


@pytest.mark.sweep_but("70-False")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tokens", [1, 70])
def test_devices_that_share_the_experts_of_a_gpu_add_up(tokens, shared, monkeypatch):
    """Around the kernels: what belongs to another device goes nowhere and adds nothing, and what is not written is not read."""
    monkeypatch.setattr(gpu, "matmul", _rows_times_groups)
    monkeypatch.setattr(gpu, "place_rows", place_rows)
    x, ids, weights, gate_up, down = make(3, tokens=tokens, experts=6, embed=128, width=128, dtype=jnp.bfloat16)
    along = (gate_up[:1].reshape(1, 128, 2, 128), down[:1]) if shared else None
    valid = jnp.arange(tokens) != 2

    def part(first, count):
        mine = (a[None, first : first + count] for a in (gate_up, down))
        once = along if first == 0 else None
        options = {"layer": jnp.int32(0), "valid": valid, "shared": once, "first_expert": jnp.int32(first), "backend": "gpu"}
        return expert_mlp(x, ids, weights, *mine, **options).astype(jnp.float32)

    got = part(0, 2) + part(2, 1) + part(3, 3)
    want = expert_mlp(x, ids, weights, gate_up[None], down[None], layer=0, valid=valid, shared=along, backend="dense").astype(jnp.float32)
    error = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
    assert float(error) < 1.2e-2


@simulated
@pytest.mark.parametrize(("tokens", "form"), [(3, "int8"), (40, "int4"), (3, "fp8")])
def test_the_hopper_kernels_read_packed_words_in_the_simulator(tokens, form, two_multiprocessors, monkeypatch):
    monkeypatch.setattr(gpu_kernel, "words", operand_in_shared_memory)
    x, ids, weights, gate_up, down = make(3, tokens=tokens, embed=256, width=128, dtype=jnp.bfloat16)
    stacks = [stored(jnp.stack([-a, a]), form, backend="gpu", dtype=jnp.bfloat16) for a in (gate_up, down)]
    assert all(isinstance(stack, Packed) for stack in stacks)
    shared = (gate_up[:1].reshape(1, 256, 2, 128), down[:1])
    shared = tuple(jnp.concatenate([a, a]) for a in shared)
    valid = jnp.arange(tokens) != 2
    with in_simulator():
        got = expert_mlp(x, ids, weights, *stacks, layer=jnp.int32(1), valid=valid, shared=shared, backend="gpu")
    want = expert_mlp(x, ids, weights, *stacks, layer=1, valid=valid, shared=shared, backend="dense")
    error = jnp.linalg.norm((got - want).astype(jnp.float32)) / jnp.linalg.norm(want.astype(jnp.float32))
    assert float(error) < 8e-3
