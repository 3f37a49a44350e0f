"""Tests of the Hopper kernels: fresh random inputs in every run, the seed is printed."""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest

from pallas_kernels.target import current_target, is_hopper


def pytest_collection_modifyitems(items):
    """The longest first, so that all workers end together: whole layers compile for two minutes."""
    items.sort(key=lambda item: item.path.name != "test_gpu_layers.py")


@pytest.fixture(autouse=True, scope="session")
def hopper():
    assert is_hopper(current_target()), "these tests need a Hopper GPU and JAX 0.11 or newer"


@pytest.fixture
def rng():
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.fixture
def key(rng):
    return jax.random.key(int(rng.integers(2**31)))


@pytest.fixture
def relative_error():
    """``relative_error(got, want)``: norm of the difference over the norm of ``want``, in float64."""

    def measure(got: jax.Array, want: jax.Array) -> float:
        got, want = (np.asarray(a.astype("float32"), np.float64) for a in (got, want))
        assert got.shape == want.shape
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))

    return measure
