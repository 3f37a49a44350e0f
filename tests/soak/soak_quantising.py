"""Layers as large as LLaDA2-mini's, 1.6 GB each, quantised while they are read: what the host holds beside the quantised parameters.

The device is a CPU, so what it holds, and what it quantises with, is the host's memory too; what it holds at the end is taken off.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from diffulex_jax.bench.shapes import SHAPES
from diffulex_jax.models.base import is_param
from diffulex_jax.models.registry import model_of
from diffulex_jax.weights import checkpoint


CHILD = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.weights import checkpoint
from pallas_kernels import choose

def peak():
    return 1024 * int(next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])

jnp.zeros(8).block_until_ready()
before = peak()
model, params = checkpoint.load(sys.argv[1], make_mesh(), dtype=jnp.bfloat16, weights=sys.argv[2], kernels=choose(jax.devices()[0]))
jax.block_until_ready(params)
held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"held": held, "beside": peak() - before - held}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("wide")


def written(path: pathlib.Path, layers: int) -> pathlib.Path:
    """A model with so many layers of experts. Its weights are one row of numbers, again and again, which takes no memory here."""
    model = model_of(
        SHAPES["llada2-mini"] | {"num_hidden_layers": 1 + layers, "vocab_size": 4096, "mask_token_id": 4095, "eos_token_id": 1}
    )
    row = np.random.default_rng(0).standard_normal(8192).astype(np.float32) * 0.02
    params = jax.tree.map(lambda param: np.broadcast_to(row[: param.shape[-1]], param.shape), model.schema, is_leaf=is_param)
    checkpoint.save(path, model, params)
    return path


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_quantising_takes_little_memory_however_many_layers_there_are(folder, form, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 2**28)
    found = {}
    for layers in (1, 2):
        path = folder / str(layers)
        if not path.exists():
            written(path, layers)
        ran = subprocess.run(
            [sys.executable, "-c", CHILD, str(path), form], env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        found[layers] = json.loads(ran.stdout.splitlines()[-1])
    sys.__stdout__.write(f"\n{json.dumps({'form': form} | found)}\n")
    assert found[2]["held"] > 1.8 * found[1]["held"]
    assert found[2]["beside"] < 4e9
    assert found[2]["beside"] < found[1]["beside"] + 0.2e9
