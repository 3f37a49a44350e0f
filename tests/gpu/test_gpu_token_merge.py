"""The token merge kernel on a Hopper GPU against plain jnp in float32. Candidates of hard positions are NaN."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import token_merge
from pallas_kernels.token_merge import MergeSpec


SPECS = [
    MergeSpec(top_k=1),
    MergeSpec(top_k=4),
    MergeSpec(top_k=3, renormalize=False),
    MergeSpec(mode="iter_smooth_topk", top_k=1),
    MergeSpec(mode="iter_smooth_topk", top_k=3, weight=0.7),
]


def make(rng, vocab, width, top_k, dtype, shape=(3, 32)):
    table = rng.standard_normal((vocab + 1, width), np.float32)
    table[vocab] = np.nan
    soft = rng.random(shape) < 0.6
    ids = np.where(soft[..., None], rng.integers(0, vocab, (*shape, top_k)), vocab)
    probs = rng.dirichlet(np.ones(top_k + 1), shape)[..., :top_k]
    tokens = jnp.asarray(rng.integers(0, vocab, shape), jnp.int32)
    return jnp.asarray(table, dtype), tokens, 7, jnp.asarray(ids, jnp.int32), jnp.asarray(probs, jnp.float32), jnp.asarray(soft)


@functools.partial(jax.jit, static_argnames=("mask_id", "spec", "backend"))
def merge(table, tokens, mask_id, ids, probs, soft, spec, backend):
    return token_merge.merge(table, tokens, mask_id=mask_id, ids=ids, probs=probs, soft=soft, spec=spec, backend=backend)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.mode}-{s.top_k}-{s.renormalize}")
@pytest.mark.parametrize("dtype,bound", [(jnp.float32, 1e-6), (jnp.bfloat16, 5e-3)])
@pytest.mark.parametrize("vocab,width", [(20011, 2048), (1001, 384), (77, 100)])
def test_as_the_reference(rng, relative_error, spec, dtype, bound, vocab, width):
    table, *rest = make(rng, vocab, width, spec.top_k, dtype)
    got, want = merge(table, *rest, spec, "gpu"), merge(table.astype(jnp.float32), *rest, spec, "reference")
    assert got.dtype == dtype and relative_error(got, want) < bound
    soft = np.asarray(rest[-1])
    np.testing.assert_array_equal(got[~soft], table[rest[0]][~soft])
