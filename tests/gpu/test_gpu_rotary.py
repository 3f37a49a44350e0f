"""Norms of heads and their rotation on a Hopper GPU."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rotary import HeadNorms, rotate, table


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((2, 1, 32, 4, 6, 128), 64),
        ((1, 32, 64, 4, 6, 128), 64),
        ((1, 1, 32, 8, 6, 128), 128),
        ((2, 8, 64, 8, 6, 128), 128),
        ((3, 3, 4, 2, 3, 64), 64),
    ],
)
def test_as_the_reference(rng, shape, dim):
    """A sum of squares in another order may round a value to the other of two neighbours: few, and by one step."""
    heads = jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    norms = HeadNorms(*(jnp.asarray(1 + rng.standard_normal((3, shape[-1])), jnp.bfloat16) for _ in "qk"), jnp.int32(1), 1e-6)
    turns = table(jnp.asarray(rng.integers(0, 5000, shape[1:3]), jnp.int32), dim, 1e6)
    got, want = (np.asarray(rotate(heads, turns, norms, backend=b), np.float32) for b in ("gpu", "reference"))
    np.testing.assert_array_equal(got[..., -1, :], want[..., -1, :])
    assert (got != want).mean() < 0.02
    np.testing.assert_allclose(got, want, rtol=0.02, atol=0.02)
