"""The two ways in which a TPU kernel runs without a TPU."""

from __future__ import annotations

import pytest
from jax.experimental.pallas import tpu as pltpu


SIMULATED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.fixture(params=[True, SIMULATED], ids=["plain", "simulated"])
def interpret(request, capfd):
    """The ``interpret`` of a ``pallas_call``: plain XLA, or a simulator that knows memories and DMAs. A race fails the test."""
    yield request.param
    out, err = capfd.readouterr()
    assert "RACE DETECTED" not in out + err
