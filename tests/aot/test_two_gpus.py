"""Programs for two H100s that are not there. They need JAX's CUDA plugin, and no GPU."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from two_gpus import BLOCK, PROGRAMS, SLOTS


# Compiling for a GPU takes JAX's CUDA plugin and the libraries it brings, gigabytes that a machine without a GPU has no other use for.
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs diffulex-jax[cuda]")
@pytest.mark.parametrize("name", PROGRAMS)
def test_two_gpus_share_a_program(name):
    child = [sys.executable, str(pathlib.Path(__file__).parent / "two_gpus.py"), name]
    ran = subprocess.run(child, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.split()[-1] == "compiled"
    assert "all-reduce" in ran.stdout
    assert "again" not in ran.stdout.split()
    if name == "tensor, bfloat16":  # the kernels are of bfloat16: each finds four numbers for every row in its half of the vocabulary
        assert [word for word in ran.stdout.split() if "all-gather" in word] == [f"all-gather[2,4,{SLOTS * BLOCK}]"]
