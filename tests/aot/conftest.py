"""How hard the compiler for TPUs tries in these tests."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(scope="module")
def least_effort():
    """Two thirds of the time. Kernels, exchanges, what is updated in place and what fits are the same; temporaries are larger."""
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", 0.0)
