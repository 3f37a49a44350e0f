"""Trees of small arrays as one array."""

from __future__ import annotations

import jax
import numpy as np
from jax import numpy as jnp

from diffulex_jax.engine.words import Words


def test_what_was_packed_is_unpacked_to_the_bit():
    rng = np.random.default_rng(0)
    tree = {
        "scalar": np.int32(-7),
        "bits": rng.integers(0, 2**32, (3, 2), np.uint32),
        "floats": np.array([[0.1, -np.inf], [np.nan, -0.0]], np.float32),
        "flags": rng.integers(0, 2, (2, 3, 2)).astype(bool),
        "none": np.zeros((0, 4), np.float32),
    }
    words = Words(jax.tree.map(np.zeros_like, tree))
    packed = words.pack(tree)
    assert packed.dtype == np.int32 and packed.shape == (1 + 6 + 4 + 12,)
    got = jax.jit(words.unpack)(packed)
    for name, leaf in tree.items():
        assert got[name].dtype == leaf.dtype and got[name].shape == leaf.shape
        assert np.asarray(got[name]).tobytes() == leaf.tobytes()
    assert jnp.isnan(got["floats"]).sum() == 1
