"""The experts on a Hopper GPU against the formula in float32, computed row by row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.expert_choice import Router, choose
from pallas_kernels.grouped_matmul import expert_mlp, stored
from pallas_kernels.grouped_matmul.gpu_kernel import Groups, Tile, matmul
from pallas_kernels.grouped_matmul.stacks import plain
from pallas_kernels.quantised import FORMS, in_int8, quantise
from pallas_kernels.quantised.words import Packed, pack, unpack


LAYERS, EXPERTS, CHOSEN, EMBED, WIDTH = 3, 64, 8, 512, 256


def make(key, tokens, *, crowded=False):
    """(x, ids, weights, gate_up, down, shared); crowded: nearly all tokens choose the same experts."""
    keys = jax.random.split(key, 8)

    def normal(key, *shape):
        return (jax.random.normal(key, shape) / shape[-2] ** 0.5).astype(jnp.bfloat16)

    scores = jax.random.uniform(keys[1], (tokens, EXPERTS)) + 3 * crowded * jnp.arange(EXPERTS)
    weights, ids = lax.top_k(jnp.where(jnp.arange(tokens)[:, None] == 0, -scores, scores), CHOSEN)
    shared = normal(keys[5], LAYERS, EMBED, 2 * WIDTH).reshape(LAYERS, EMBED, 2, WIDTH), normal(keys[6], LAYERS, WIDTH, EMBED)
    x = jax.random.normal(keys[0], (tokens, EMBED), jnp.bfloat16)
    weights = jax.random.uniform(keys[7], weights.shape)
    return x, ids, weights, normal(keys[2], LAYERS, EXPERTS, EMBED, 2 * WIDTH), normal(keys[3], LAYERS, EXPERTS, WIDTH, EMBED), shared


@jax.jit
def exact(x, ids, weights, gate_up, down, shared, layer):
    """float32 throughout: nothing rounded between the matmuls."""
    wide = [a.astype(jnp.float32) for a in (gate_up[layer], down[layer], shared[0][layer].reshape(EMBED, -1), shared[1][layer])]

    def mlp(row, gate_up, down):
        gate, up = jnp.split(row @ gate_up, 2)
        return (jax.nn.silu(gate) * up) @ down

    def one(row, ids, weights):
        routed = jax.vmap(mlp, (None, 0, 0))(row, wide[0][ids], wide[1][ids])
        return weights @ routed, mlp(row, wide[2], wide[3])

    with jax.default_matmul_precision("highest"):
        return lax.map(lambda row: one(*row), (x.astype(jnp.float32), ids, weights))


def run(args, *, shared=None, **options):
    return jax.jit(lambda *a: expert_mlp(*a[:5], layer=a[5], shared=a[6], backend="gpu", **options))(*args[:5], jnp.int32(1), shared)


@pytest.mark.parametrize(
    ("tokens", "crowded"), [(1, False), (7, False), (32, False), (32, True), (256, False), (1024, False), (1500, True)]
)
def test_the_kernels_compute_the_formula(key, relative_error, tokens, crowded):
    args = make(key, tokens, crowded=crowded)
    routed, shared = exact(*args, 1)
    error, together = relative_error(run(args), routed), relative_error(run(args, shared=args[5]), routed + shared)
    print(f"relative error at {tokens} tokens: {error:.5f}, with the shared expert {together:.5f}")
    assert error < 5e-3  # bfloat16 has eight bits: hidden values, rows and result are rounded once each
    assert together < 5e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tokens", "crowded"), [(1, False), (32, False), (32, True), (256, False), (1024, False), (1500, True)])
def test_the_kernels_read_quantised_experts(key, relative_error, tokens, crowded, form):
    """Against the formula on the weights that are meant. Those of int4 are rounded to bfloat16 once more."""
    args = make(key, tokens, crowded=crowded)
    stacks = [jax.jit(lambda w: stored(w, form, backend="gpu", dtype=jnp.bfloat16))(w) for w in args[3:5]]
    assert all(isinstance(stack, Packed) for stack in stacks)
    meant = [plain(stack, jnp.float32) for stack in stacks]
    routed, shared = exact(*args[:3], *meant, args[5], 1)
    got = run((*args[:3], *stacks))
    error, together = relative_error(got, routed), relative_error(run((*args[:3], *stacks), shared=args[5]), routed + shared)
    print(f"relative error of {form} at {tokens} tokens: {error:.5f}, with the shared expert {together:.5f}")
    assert error < {"int8": 5e-3, "int4": 7e-3, "fp8": 5e-3}[form]
    assert together < {"int8": 6e-3, "int4": 7e-3, "fp8": 6e-3}[form]
    np.testing.assert_array_equal(got, run((*args[:3], *stacks)))
    alone = jax.jit(lambda *a: expert_mlp(*a, backend="gpu"))(*args[:3], *(stack[1] for stack in stacks))
    np.testing.assert_array_equal(got, alone)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [3, 200])
def test_quantised_experts_that_are_no_words_are_made_plain_a_few_at_a_time(key, relative_error, tokens, form):
    """As on GPUs that the kernels are not for; int4 by its bytes."""
    args = make(key, tokens)
    stacks = [stored(w, form, backend="ragged", dtype=jnp.bfloat16) for w in args[3:5]]
    meant = [plain(stack, jnp.float32) for stack in stacks]
    error = relative_error(run((*args[:3], *stacks)), exact(*args[:3], *meant, args[5], 1)[0])
    print(f"relative error of {form} at {tokens} tokens: {error:.5f}")
    assert error < 7e-3


@pytest.mark.parametrize("form", FORMS)
def test_the_gpu_quantises_as_a_cpu_does(form, key):
    """Up to the rounding of a division, which may tip a weight between two integers to the other."""
    w = (jax.random.normal(key, (3, 256, 128)) * 0.02).astype(jnp.bfloat16)
    got = unpack(jax.jit(lambda w: stored(w, form, backend="gpu", dtype=jnp.bfloat16))(w))
    want = jax.device_put(w, jax.devices("cpu")[0])
    want = in_int8(quantise(want, form))
    np.testing.assert_array_equal(got.scales, want.scales)
    off = np.abs(np.asarray(in_int8(got).values, np.int32) - np.asarray(want.values, np.int32))
    assert off.max() <= 1 and off.mean() < 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_every_number_is_unpacked_as_it_is(form, key):
    """Weights that bfloat16 holds, and rows that pick one of them each: the product of a row and a column is a weight, to the bit."""
    most = {"int8": 127, "int4": 7, "fp8": 448}[form]
    if form == "fp8":
        bits = jax.random.randint(key, (1, 1, 128, 256), 0, 256).astype(jnp.uint8)
        values = jnp.nan_to_num(lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float32))
    else:
        values = jax.random.randint(key, (1, 1, 128, 256), -most, most + 1)
    values = values.at[:, :, ::64].set(most)  # so that every scale is one
    gate = pack(quantise(values.astype(jnp.float32), form))
    stream = Groups(*(jnp.array([n], jnp.int32) for n in (0, 128, 8)))
    out = matmul(jnp.eye(128, dtype=jnp.bfloat16), gate, None, jnp.int32(0), stream, swiglu=False, tile=Tile(16, 256))
    np.testing.assert_array_equal(out.astype(jnp.float32), values[0, 0])


@pytest.mark.parametrize("form", FORMS)
def test_invalid_rows_of_quantised_experts_are_zero(key, form):
    args = make(key, 100)
    stacks = [stored(w, form, backend="gpu", dtype=jnp.bfloat16) for w in args[3:5]]
    valid = jnp.arange(100) % 3 != 1
    got, want = run((*args[:3], *stacks), valid=valid), run((*args[:3], *stacks))
    np.testing.assert_array_equal(got, jnp.where(valid[:, None], want, 0))


@pytest.mark.parametrize("tokens", [1, 32, 512, 1024])
def test_devices_that_share_the_experts_add_up(key, relative_error, tokens):
    args = make(key, tokens)
    x, ids, weights, gate_up, down, _ = args
    halves = [(first, (x, ids, weights, *(a[:, first : first + EXPERTS // 2] for a in (gate_up, down)))) for first in (0, EXPERTS // 2)]
    got = sum(run(half, first_expert=jnp.int32(first)).astype(jnp.float32) for first, half in halves)
    assert relative_error(got, exact(*args, 1)[0]) < 6e-3  # each half is rounded once more


@pytest.mark.parametrize("tokens", [600, 1024])
def test_many_tokens_are_routed_by_a_kernel_and_computed(key, relative_error, tokens):
    experts, embed, width = 256, 512, 128
    keys = jax.random.split(key, 5)
    x, valid = jax.random.normal(keys[0], (tokens, embed), jnp.bfloat16), jnp.arange(tokens) % 7 != 3
    matrix = (jax.random.normal(keys[1], (embed, experts)) * 0.05).astype(jnp.bfloat16)
    router = Router(top_k=8, groups=8, kept=4, scale=2.5)
    bias = jax.random.normal(keys[2], (experts,)) * 0.05
    gate_up, down = (
        (jax.random.normal(k, (2, experts, *shape)) / shape[0] ** 0.5).astype(jnp.bfloat16)
        for k, shape in ((keys[3], (embed, 2 * width)), (keys[4], (width, embed)))
    )

    @jax.jit
    def routed(x, valid):
        ids, weights = choose(x, matrix, bias, router, valid=valid, backend="gpu")
        options = {"layer": jnp.int32(1), "valid": valid, "backend": "gpu"}
        return ids, weights, expert_mlp(x, ids, weights, gate_up, down, **options)

    ids, weights, got = routed(x, valid)
    with jax.default_matmul_precision("highest"):
        want_ids, want_weights = choose(x, matrix, bias, router, backend="sorted")
        wide = [a[1].astype(jnp.float32) for a in (gate_up, down)]
        want = jax.jit(expert_mlp, static_argnames="backend")(x.astype(jnp.float32), ids, weights, *wide, valid=valid, backend="dense")
    same = np.sort(ids, 1) == np.sort(want_ids, 1)
    assert same.mean() > 0.999  # logits are sums in another order: a near tie may go either way
    rows = np.asarray(same.all(1))
    np.testing.assert_allclose(np.sort(weights, 1)[rows], np.sort(want_weights, 1)[rows], rtol=1e-4)
    error = relative_error(got[valid], want[valid])
    print(f"relative error at {tokens} tokens routed by the kernel: {error:.5f}")
    assert error < 5e-3
    np.testing.assert_array_equal(got[~valid], 0)


def test_as_near_the_formula_as_plain_xla_in_bfloat16(key, relative_error):
    args = make(key, 256)
    routed, _ = exact(*args, 1)
    plain = jax.jit(lambda *a: expert_mlp(*a, layer=jnp.int32(1), backend="ragged"))(*args[:5])
    assert relative_error(run(args), routed) < 1.5 * relative_error(plain, routed)


def test_float32_goes_another_way_and_is_float32(key, relative_error):
    x, ids, weights, gate_up, down, shared = make(key, 64)
    args = (x.astype(jnp.float32), ids, weights, gate_up.astype(jnp.float32), down.astype(jnp.float32))
    with jax.default_matmul_precision("highest"):
        got = run(args)
    assert relative_error(got, exact(*args, shared, 1)[0]) < 1e-5


def test_masked_rows_are_zero_and_change_nothing(key):
    x, ids, weights, gate_up, down, shared = make(key, 100)
    valid = jnp.arange(100) % 3 != 1
    want = run((x, ids, weights, gate_up, down), shared=shared)
    bad = (jnp.where(valid[:, None], x, jnp.nan), jnp.where(valid[:, None], ids, 5), jnp.where(valid[:, None], weights, jnp.nan))
    got = run((*bad, gate_up, down), shared=shared, valid=valid)
    np.testing.assert_array_equal(got, jnp.where(valid[:, None], want, 0))
    nothing = run((*bad, gate_up, down), shared=shared, valid=jnp.zeros(100, bool))
    np.testing.assert_array_equal(nothing, jnp.zeros_like(x))


def test_a_row_that_is_not_a_number_stays_alone(key):
    x, ids, weights, gate_up, down, _ = make(key, 64)
    want = run((x, ids, weights, gate_up, down))
    got = run((x.at[9].set(jnp.nan), ids, weights, gate_up, down))
    assert bool(jnp.isnan(got[9]).all())
    np.testing.assert_array_equal(jnp.delete(got, 9, 0), jnp.delete(want, 9, 0))


def test_the_stack_is_read_at_the_layer_asked_for(key):
    args = make(key, 40)
    alone = jax.jit(lambda *a: expert_mlp(*a, backend="gpu"))(*args[:3], args[3][1], args[4][1])
    np.testing.assert_array_equal(run(args), alone)
