"""Models of 1.5 and 1.7 billion parameters load and decode on a CPU in 8 GB: random weights in the shapes of public checkpoints.

    python -m pytest -s tests/soak/soak_memory.py

It prints the times and the peaks of memory of the process, and writes files of 3 to 4 GB.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffulex_jax.bench.shapes import shape_model
from diffulex_jax.weights.checkpoint import EMBEDDED


_DECODE = """
import json, pathlib, sys, threading, time

def held():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return {name: int(line.split()[1]) * 1024 for line in lines for name in ("VmRSS", "RssAnon") if line.startswith(name + ":")}

peak, ended = held(), threading.Event()

def watch():
    while not ended.wait(0.02):
        peak.update({name: max(size, peak[name]) for name, size in held().items()})

threading.Thread(target=watch).start()
try:
    began = time.perf_counter()
    from diffulex_jax import Engine, SamplingParams
    engine = Engine.from_pretrained(sys.argv[1], dtype=sys.argv[2], max_slots=1, max_model_len=256)
    ready = time.perf_counter()
    (output,) = engine.generate(["What is 12 plus 7?"], SamplingParams(max_tokens=64, max_nfe=12, ignore_eos=True))
    seconds = (time.perf_counter() - ready) / output.nfe
finally:
    ended.set()
print(json.dumps({"to load and compile": ready - began, "a forward": seconds, "forwards": output.nfe} | peak))
"""


@pytest.mark.parametrize(
    ("shape", "dtype"), [("fast-dllm-v2-1.5b", "float32"), ("fast-dllm-v2-1.5b", "bfloat16"), ("sdar-1.7b", "bfloat16")]
)
def test_it_loads_and_decodes_in_8_gb(shape, dtype, tmp_path):
    write(shape, tmp_path)
    done = subprocess.run([sys.executable, "-c", _DECODE, tmp_path, dtype], capture_output=True, check=True, text=True)
    found = json.loads(done.stdout)
    print(f"{shape}, {dtype}: {found}")
    shutil.rmtree(tmp_path)
    assert found["forwards"] == 12
    assert found["VmRSS"] < 8e9


def write(shape, folder) -> None:
    """A model directory in bfloat16, with the tokenizer of the embedded model."""
    model, rng = shape_model(shape), np.random.default_rng(0)
    some = (0.02 * rng.standard_normal(1 << 20)).astype(ml_dtypes.bfloat16)
    tensors = {t.name: np.ones(t.shape, some.dtype) if "norm" in t.name else np.resize(some, t.shape) for t in model.tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_hf(dtype="bfloat16")))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)
