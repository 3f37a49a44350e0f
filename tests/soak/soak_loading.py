"""A small copy of LLaDA2-flash, 1.8 GB, read onto eight devices by one host and by two: what a host holds beside its devices' parameters.

The devices are of a CPU, so what they hold is the host's memory too; it is taken off.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from diffulex_jax.bench.shapes import SHAPES
from diffulex_jax.models.base import init
from diffulex_jax.models.registry import model_of
from diffulex_jax.weights import assembly, checkpoint


RAW = SHAPES["llada2-flash"] | {
    "vocab_size": 32_768,
    "hidden_size": 1024,
    "intermediate_size": 2304,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 256,
    "mask_token_id": 32_767,
    "eos_token_id": 32_766,
}
CHILD = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from diffulex_jax.parallel.hosts import Hosts, part
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.weights import checkpoint, placed
from pallas_kernels import REFERENCE

folder, index, count, port, out = sys.argv[1:]
if int(count) > 1:
    Hosts(coordinator=f"127.0.0.1:{port}", count=int(count), index=int(index)).connect()

def peak():
    return 1024 * int(next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])

mesh = make_mesh(expert=4, tensor=2)
jnp.zeros(8).block_until_ready()
before = peak()
model, params = checkpoint.load(folder, mesh, dtype=jnp.bfloat16)
jax.block_until_ready(params)
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
beside = peak() - before - held
if out != "none":
    placed.save(out, model, params, kernels=REFERENCE)
print(json.dumps({"held": held, "beside": beside}))
if int(count) > 1:
    part()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path, model = tmp_path_factory.mktemp("flash"), model_of(RAW)
    checkpoint.save(path / "flash", model, init(model, jax.random.key(0), jnp.bfloat16))
    return path


def read(path: pathlib.Path, hosts: int, out: pathlib.Path | str = "none") -> list[dict[str, int]]:
    """What each of several hosts, which share eight devices, says."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(8 // hosts)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path), str(i), str(hosts), port, str(out)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for i in range(hosts)
    ]
    said = [child.communicate(timeout=600)[0] for child in started]
    assert [child.returncode for child in started] == [0] * hosts
    return [json.loads(text.splitlines()[-1]) for text in said]


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_host_holds_little_beside_the_parameters_of_its_devices(folder, hosts):
    size = sum(file.stat().st_size for file in (folder / "flash").glob("*.safetensors"))
    found = read(folder / "flash", hosts, folder / f"placed-{hosts}")
    again = read(folder / f"placed-{hosts}", 3 - hosts)  # by as many others
    sys.__stdout__.write(f"\n{json.dumps({'hosts': hosts, 'files': size, 'loaded': found, 'restored': again})}\n")
    for host in found:
        assert host["held"] > 0.9 * size / hosts
        assert host["beside"] < 3 * assembly.HOST_BYTES
    for host in again:
        assert host["beside"] < 3 * assembly.HOST_BYTES
