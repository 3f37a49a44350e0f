"""Token merge: the TPU kernel, simulated, against plain jnp. 45 rows of a table are no whole number of the groups that travel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.token_merge import MergeSpec, reference, tpu


VOCAB, EMBED, MASK = 45, 24, 44
SPECS = [
    MergeSpec(top_k=1),
    MergeSpec(top_k=3),
    MergeSpec(top_k=2, renormalize=False),
    MergeSpec(mode="iter_smooth_topk", top_k=2, weight=0.3),
]


def make(spec, dtype=jnp.float32):
    rng = np.random.default_rng(spec.top_k)
    shape = 3, 7

    def ids(*shape):
        return jnp.asarray(rng.integers(0, VOCAB, shape), jnp.int32)

    table = jnp.asarray(rng.standard_normal((VOCAB, EMBED)), dtype)
    probs = jnp.asarray(rng.random((*shape, spec.top_k)) / spec.top_k, jnp.float32)
    soft = jnp.asarray(rng.random(shape) < 0.5)
    return table, ids(*shape).at[0, 0].set(MASK), ids(*shape, spec.top_k), probs, soft


def run(function, spec, table, tokens, *rest, **options):
    return jax.jit(
        lambda *args: function(*args[:2], mask_id=MASK, **dict(zip(("ids", "probs", "soft"), args[2:], strict=True)), spec=spec, **options)
    )(table, tokens, *rest)


@pytest.mark.sweep_but(
    "plain-MergeSpec(mode='dmax_topk', top_k=3, renormalize=True, weight=1.0, commit_soft=False)",
    "simulated-MergeSpec(mode='dmax_topk', top_k=2, renormalize=False, weight=1.0, commit_soft=False)",
    "simulated-MergeSpec(mode='iter_smooth_topk', top_k=2, renormalize=True, weight=0.3, commit_soft=False)",
)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_merge(interpret, spec):
    args = make(spec)
    want, got = run(reference.merge, spec, *args), run(tpu.merge, spec, *args, positions=8, interpret=interpret)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.sweep_but("simulated-MergeSpec(mode='iter_smooth_topk', top_k=2, renormalize=True, weight=0.3, commit_soft=False)")
@pytest.mark.parametrize("spec", SPECS[3:], ids=str)
def test_merge_in_bfloat16(interpret, spec):
    args = make(spec, jnp.bfloat16)
    want, got = run(reference.merge, spec, *args), run(tpu.merge, spec, *args, interpret=interpret)
    want, got = (np.asarray(a, np.float32) for a in (want, got))
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2)


def test_hard_positions_are_the_plain_lookup(interpret):
    table, tokens, *rest, soft = make(SPECS[0])
    got = run(tpu.merge, SPECS[0], table, tokens, *rest, jnp.zeros_like(soft), positions=8, interpret=interpret)
    np.testing.assert_array_equal(got, table[tokens])


@pytest.mark.sweep_but("plain")
def test_a_row_that_nobody_wants_changes_nothing(interpret):
    table, tokens, ids, probs, soft = make(SPECS[1])
    wanted = np.concatenate([np.where(soft, MASK, tokens).ravel(), np.where(soft[..., None], ids, MASK).ravel()])
    others = np.setdiff1d(np.arange(VOCAB), wanted)
    assert 0 < len(others) < VOCAB
    poisoned = run(tpu.merge, SPECS[1], table.at[others].set(jnp.nan), tokens, ids, probs, soft, positions=8, interpret=interpret)
    np.testing.assert_array_equal(poisoned, run(tpu.merge, SPECS[1], table, tokens, ids, probs, soft, positions=8, interpret=interpret))
