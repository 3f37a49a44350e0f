"""Which experts tokens go to and where their rows lie, on a Hopper GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows_by_group import place_rows

from pallas_kernels.expert_choice import Router, gpu_kernel, reference
from pallas_kernels.grouped_matmul import gpu_places


@pytest.mark.parametrize("tokens", [1, 5, 32, 1024])
@pytest.mark.parametrize(
    ("experts", "router"),
    [
        (256, Router(top_k=8, groups=8, kept=4, scale=2.5)),
        (256, Router(top_k=8)),
        (128, Router(top_k=8, score="softmax")),
        (64, Router(top_k=8, score="softmax", normalise=False)),
        (64, Router(top_k=2, groups=4, kept=2)),
        (32, Router(top_k=3, normalise=False, scale=0.5)),
    ],
)
def test_experts_are_chosen_as_by_sorting(experts, router, tokens):
    rng = np.random.default_rng(tokens)
    logits, bias = rng.standard_normal((tokens, experts)).astype(np.float32), (rng.standard_normal(experts) / 8).astype(np.float32)
    logits[0] = 0.5  # a row of equals
    first = np.round(logits)
    got = gpu_kernel.choose(jnp.stack([first, logits - first]), jnp.asarray(bias), router)
    with jax.default_matmul_precision("highest"):
        want = reference.choose(jnp.asarray(logits), jnp.eye(experts), jnp.asarray(bias), router)
    same = (np.asarray(got.ids) == want.ids).all(1)
    assert same.mean() >= 0.999  # exponentials are not the same to the last bit: a near tie may go either way
    np.testing.assert_allclose(got.weights[same], want.weights[same], rtol=2e-6)


@pytest.mark.parametrize(("tokens", "chosen"), [(1, 8), (6, 3), (33, 8), (70, 2), (1024, 8), (2048, 8)])
@pytest.mark.parametrize("groups", [16, 256])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_lie_by_group(tokens, chosen, groups, shared, masked):
    rng = np.random.default_rng(tokens)
    ids = np.stack([rng.permutation(groups)[:chosen] for _ in range(tokens)]).astype(np.int32)
    if masked:
        ids[rng.random(ids.shape) < 0.1] = -1
    valid = jnp.asarray(rng.random(tokens) < 0.7) if masked else None
    options = {"groups": groups, "shared": shared, "tile_rows": 16}
    placed, counted = gpu_places.place_rows(jnp.asarray(ids), valid, **options)
    want, want_counted = place_rows(jnp.asarray(ids), valid, **options)
    np.testing.assert_array_equal(placed.row, want.row)
    for got, wanted in zip(counted, want_counted, strict=True):
        np.testing.assert_array_equal(got, wanted)
    written = np.asarray(want.token) >= 0
    assert placed.token.shape == want.token.shape
    np.testing.assert_array_equal(np.asarray(placed.token)[written], np.asarray(want.token)[written])
