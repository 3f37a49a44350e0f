"""Hopper kernels in JAX's simulator, where there is no Hopper GPU.

JAX 0.10, the only one for Python 3.11, has no simulator for them: there they run on a GPU alone (tests/gpu).
"""

from __future__ import annotations

import contextlib

import pytest
from jax.experimental.pallas import mosaic_gpu


simulated = pytest.mark.skipif(
    not hasattr(mosaic_gpu, "force_gpu_interpret_mode"), reason="this JAX has no simulator for Hopper kernels (0.11 has)"
)


def in_simulator() -> contextlib.AbstractContextManager[None]:
    """Kernels of Mosaic GPU that are called in it run in the simulator."""
    return mosaic_gpu.force_gpu_interpret_mode(mosaic_gpu.InterpretGPUParams())
