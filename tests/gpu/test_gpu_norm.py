"""What is added to the residual stream, and its norm, on a Hopper GPU."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.norm import Scales, add_and_norm


@pytest.mark.parametrize(
    ("shape", "parts"), [((1, 32, 1536), 2), ((32, 64, 2048), 1), ((1, 32, 4096), 0), ((3, 5, 768), 5), ((8, 32, 4096), 2)]
)
def test_as_the_reference(rng, shape, parts):
    """A sum of squares in another order may round a value to the other of two neighbours: few, and by one step."""
    x, stack = jnp.asarray(rng.standard_normal(shape), jnp.bfloat16), jnp.asarray(1 + rng.standard_normal((3, shape[-1])), jnp.bfloat16)
    added = jnp.asarray(rng.standard_normal((parts, *shape)), jnp.bfloat16) if parts else None
    scales = Scales(stack, jnp.int32(1), 1e-6)
    both = (add_and_norm(x, added, scales, backend=backend) for backend in ("gpu", "reference"))
    (total, normed), (want_total, want) = ([np.asarray(a, np.float32) for a in pair] for pair in both)
    # XLA may leave out the rounding of what is added to x; then a sum is the other of two neighbours.
    assert (total != want_total).mean() < 0.2
    np.testing.assert_allclose(total, want_total, rtol=0.01, atol=0.01)
    assert (normed != want).mean() < 0.25
    np.testing.assert_allclose(normed, want, rtol=0.03, atol=0.03)
