"""``bench decode --against torch``: the forward in torch is that of the same network."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from diffulex_jax import bench
from diffulex_jax.bench.shapes import shape_model
from diffulex_jax.cli import app
from diffulex_jax.models import llada2
from diffulex_jax.models.base import init
from diffulex_jax.models.functional import pure


def run(*args: str):
    return CliRunner().invoke(app, ["bench", "decode", *args])


def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "diffulex_jax.bench.torch_forward", raising=False)
    monkeypatch.delattr(bench, "torch_forward", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run("--shape", "tiny", "--against", "torch")
    assert result.exit_code == 2
    assert 'measuring against torch needs it: pip install "diffulex-jax[torch]"' in result.stderr


def test_nothing_else_is_measured_against():
    result = run("--shape", "tiny", "--against", "numpy")
    assert result.exit_code == 2 and "against='numpy' must be 'torch'" in result.stderr


@pytest.mark.parametrize(
    "changes", [{}, {"topk_group": 4}, {"first_k_dense_replace": 0, "norm_topk_prob": False}, {"num_shared_experts": 0}]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_agree(changes, dtype):
    torch_forward = pytest.importorskip("diffulex_jax.bench.torch_forward", exc_type=ImportError)
    raw = shape_model("tiny").config.to_hf() | {"num_hidden_layers": 3} | changes
    model = llada2.model(raw, "tiny")
    params = init(model, jax.random.key(0), dtype, scale=0.1)
    params["moe"]["router_bias"] = jax.random.normal(jax.random.key(1), params["moe"]["router_bias"].shape) * 0.1
    tokens = np.random.default_rng(2).integers(0, 1000, (2, 32))
    found = torch_forward.forward_of(model, params)(tokens)
    positions, everything = jnp.broadcast_to(jnp.arange(32), (2, 32)), jnp.ones((32, 32), bool)
    forward = jax.jit(lambda params: pure(model)(params, jnp.asarray(tokens, jnp.int32), positions, everything))
    exact = np.asarray(forward(jax.tree.map(lambda a: a.astype(jnp.float32), params)))
    assert found.shape == exact.shape == (2, 32, 1024)
    if dtype == "float32":
        assert np.abs(found - exact).max() < 1e-4
    else:  # both round, torch also between operations, and may take another of two experts as good
        ours = np.abs(np.asarray(forward(params)) - exact).mean()
        assert np.abs(found - exact).mean() < 4 * ours and ours < 0.05


def test_a_step_is_measured_against_it():
    pytest.importorskip("diffulex_jax.bench.torch_forward", exc_type=ImportError)
    small = ["--max-tokens", "8", "--max-model-len", "64", "--prompt-tokens", "8", "--repeats", "1"]
    result = run("--shape", "tiny", "--strategy", "llada2", "--against", "torch", *small, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    figures = report["strategies"]["llada2"]
    assert report["against"] == "torch" and figures["torch_ms"] > 0
    assert figures["torch_ratio"] > 0


def test_another_network_is_refused():
    torch_forward = pytest.importorskip("diffulex_jax.bench.torch_forward", exc_type=ImportError)
    result = run("--shape", "sdar-1.7b", "--against", "torch")
    assert result.exit_code == 2 and "knows the network of LLaDA2" in result.stderr
    by_blocks = shape_model("tiny").config.to_hf() | {"expert_capacity": 8, "block_size": 32}
    with pytest.raises(ValueError, match="knows the network of LLaDA2"):
        torch_forward.check(llada2.model(by_blocks, "tiny"))
