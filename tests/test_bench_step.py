"""``bench step``: what it counts, what it refuses, and that it runs."""

from __future__ import annotations

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from diffulex_jax import decode
from diffulex_jax.bench import step
from diffulex_jax.bench.decode import _mid_request, _model_loop
from diffulex_jax.bench.forward import program_of, shared_part, step_bytes
from diffulex_jax.bench.shapes import SHAPES, random_params, shape_model
from diffulex_jax.cli import app
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.models.base import leaves
from diffulex_jax.models.registry import model_of
from diffulex_jax.strategies import resolve
from pallas_kernels import REFERENCE, grouped_matmul
from pallas_kernels.quantised import dequantise


GOLDEN = pathlib.Path(__file__).parent / "golden"
MINI = shape_model("llada2-mini")


def test_bytes_of_a_step_are_those_counted_by_hand():
    # Layers: 20 x attention (2048 x 3072 + 2048 x 2048), a dense 3 x 2048 x 5120, 19 x (router 2048 x 256 + shared 3 x 2048 x 512).
    dense = 20 * 10_485_760 + 31_457_280 + 19 * (524_288 + 3_145_728)
    head, expert = 157_184 * 2048, 3 * 2048 * 512
    norms = 20 * (2 * 2048 + 2 * 128) + 2048
    weights = 2 * (dense + head + norms + 19 * 160 * expert) + 4 * 19 * 256  # the routers' biases are float32
    assert step_bytes(MINI, 2, batch=1, context=0, experts=160) == weights
    # 40 KiB of cache a token.
    extra = step_bytes(MINI, 2, batch=8, context=128, experts=160) - step_bytes(MINI, 2, batch=8, context=0, experts=160)
    assert extra == 8 * 128 * 40 * 1024
    # Quantised experts: a byte a weight and two for each of their 2 x 512 + 2048 columns; half a byte, and two for 64 weights.
    less = weights - 2 * 19 * 160 * expert
    assert step_bytes(MINI, 2, batch=1, context=0, experts=160, weights="int8") == less + 19 * 160 * (expert + 2 * 3072)
    assert step_bytes(MINI, 2, batch=1, context=0, experts=160, weights="int4") == less + 19 * 160 * expert * (1 / 2 + 2 / 64)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        ("llada2-mini", 16.256),
        *(("sdar-1.7b", 2.032), ("sdar-4b", 4.411), ("sdar-8b", 8.191), ("sdar-30b-a3b", 30.532)),
        *(("fast-dllm-v2-1.5b", 1.544), ("fast-dllm-v2-7b", 7.616)),
        *(("llada2-flash", 102.890), ("llada-8b", 8.016), ("llada-moe-7b-a1b", 7.357), ("dream-7b", 7.616)),
    ],
)
def test_a_shape_has_the_parameters_it_is_known_for(shape, billions):
    total = sum(int(np.prod(param.shape)) for param in leaves(shape_model(shape).schema).values())
    assert total == pytest.approx(billions * 1e9, rel=5e-4)


def test_a_tied_output_matrix_is_read_in_every_step():
    raw = SHAPES["fast-dllm-v2-1.5b"]
    tied, untied = (model_of(raw | {"tie_word_embeddings": tied}) for tied in (True, False))
    sizes = {"batch": 1, "context": 64, "experts": 0}
    assert step_bytes(tied, 2, **sizes) == step_bytes(untied, 2, **sizes) > 3e9


@pytest.mark.sweep
def test_random_params_follow_the_schema():
    tiny = shape_model("tiny")
    params = random_params(tiny, jnp.bfloat16)
    assert {path: a.shape for path, a in leaves(params).items()} == {path: p.shape for path, p in leaves(tiny.schema).items()}
    assert params["embed"].dtype == params["moe"]["experts_down"].dtype == jnp.bfloat16
    stack = np.asarray(params["moe"]["experts_gate_up"], np.float32)
    assert stack.std() == pytest.approx(0.02, rel=0.02)
    assert not np.array_equal(stack[0], stack[1])
    quantised = random_params(tiny, jnp.bfloat16, weights="int8")
    assert jax.tree.leaves(quantised["moe"]["experts_gate_up"])[0].dtype == jnp.int8
    np.testing.assert_allclose(dequantise(quantised["moe"]["experts_gate_up"]), stack, atol=2e-3)
    assert {path: a.shape for path, a in leaves(quantised).items()} == {path: a.shape for path, a in leaves(params).items()}


@pytest.mark.sweep
def test_the_bare_model_runs_the_kernels_of_the_step(monkeypatch):
    """What a step has beyond the model is a difference of two programs; both must compute the model alike."""
    asked, compute = [], grouped_matmul.expert_mlp

    def asked_for(*args, backend=None, **rest):
        asked.append(backend)
        return compute(*args, backend=backend, **rest)

    monkeypatch.setattr(grouped_matmul, "expert_mlp", asked_for)
    tiny = shape_model("tiny")
    params = random_params(tiny, jnp.float32)
    settings = EngineConfig(block_size=8, max_slots=1, max_model_len=32)
    program, pool, state = _mid_request(program_of(tiny, resolve("llada2"), settings, REFERENCE), params, prompt_tokens=8)
    tables = jnp.zeros((1, program.dims.pages_per_slot), jnp.int32)
    jax.eval_shape(functools.partial(_model_loop, program), params, pool, shared_part(state), page_table=tables, steps=1)
    bare = set(asked)
    asked.clear()
    options = {"known": jnp.zeros(1, jnp.int32), "steps": 1, "max_steps": 1, "stop_on_finish": False}
    jax.eval_shape(functools.partial(decode.denoise, program, page_table=tables, **options), params, pool, state)
    assert bare == set(asked) == {REFERENCE.grouped_matmul}


@pytest.mark.sweep_but("tiny-dream-None-settings2-35-93")
@pytest.mark.parametrize(
    ("name", "strategy", "settings", "fed", "cached"),
    [
        ("tiny-llada", None, {}, 128, 0),
        # Of 32 forwards one is over the canvas of 128; the others feed 64 or 32 positions beside the rest.
        ("tiny-llada", None, {"cache": "prefix"}, 62 + 4, 62),
        ("tiny-dream", None, {"cache": "dual"}, 31 + 4, 93),
        ("tiny-llada", "d2f", {}, 32, 64),
        ("tiny-fast-dllm-v2-trained", None, {"sub_block_cache": 8}, 8, 88),
    ],
)
def test_a_step_of_every_family_is_the_engines(monkeypatch, name, strategy, settings, fed, cached):
    """A canvas that every forward sees whole, or behind a cache; the same model in blocks; and steps that do nothing but commit."""
    config = GOLDEN / "families" / name / "config.json"
    monkeypatch.setitem(SHAPES, name, json.loads(config.read_text()))
    report = step.run(shape=name, batches=[2], strategies=[strategy], contexts=[32], dtype="float32", repeats=1, **settings)
    (figures,) = report["steps"]
    model = shape_model(name)
    assert figures["strategy"] == (strategy or model.spec.strategy)
    assert 0 < figures["floor_ms"] < figures["ms_median"]
    assert figures["gigabytes"] * 1e9 == pytest.approx(step_bytes(model, 4, batch=2, context=cached, experts=0))
    assert figures["arithmetic_ms"] * report["matmul_teraflops"] * 1e9 == pytest.approx(_operations(model, 2, fed, 32, fed + cached))


def _operations(model, rows, fed, window, seen):
    """Two for each weight that a position meets, the output matrix those of the window alone; and attention."""
    layers = model.spec.layers
    head = model.spec.vocab_size * model.spec.hidden_size
    matrices = sum(math.prod(param.shape) for path, param in leaves(model.schema).items() if path not in {("embed",), ("lm_head",)})
    attention = 4 * fed * seen * layers.count * layers.query_heads * layers.head_dim
    return rows * (2 * fed * matrices + 2 * window * head + attention)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [({"cache": "dual"}, "cache='dual' is not for this model"), ({"sub_block_cache": 8}, "sub_block_cache=8 is not for this model")],
)
def test_a_cache_that_is_not_for_the_model_is_refused_before_weights_are_made(monkeypatch, settings, complaint):
    monkeypatch.setattr(step, "random_params", lambda *_, **__: pytest.fail("made weights"))
    with pytest.raises(ValueError, match=complaint):
        step.run(shape="llada2-mini", batches=[1], strategies=[None], contexts=[32], **settings)


def test_it_reports_every_combination_and_every_kernel():
    command = "bench step --shape tiny --batch 2 --strategy dmax,llada2 --context 32 --repeats 1 --dtype float32 --weights int8 --json"
    result = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    tiny = shape_model("tiny")
    assert (report["weights"], report["parameters"]) == ("int8", sum(math.prod(p.shape) for p in leaves(tiny.schema).values()))
    figures, other = report["steps"]
    assert other["strategy"] == "llada2"
    assert (figures["strategy"], figures["batch"], figures["context"]) == ("dmax", 2, 32)
    assert 0 < figures["floor_ms"] < figures["ms_median"]
    assert figures["floor_ratio"] == pytest.approx(figures["ms_median"] / figures["floor_ms"])
    assert 0 <= figures["host_share"] < 1
    assert 4 <= figures["experts_touched"] <= 16
    # 32 cached positions, and the block before: 4 layers x 2 x 2 heads x 16 x float32 each, twice for two rows.
    assert figures["gigabytes"] * 1e9 == pytest.approx(
        step_bytes(tiny, 4, batch=2, context=64, experts=figures["experts_touched"], weights="int8")
    )
    assert [row["kernel"] for row in report["kernel_times"]] == ["experts", "prediction", "token merge", "block attention"]
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 and row["tokens"] == 64 for row in report["kernel_times"])


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--shape", "giant", "unknown shape 'giant'"),
        ("--batch", "0", "batch=0 must be positive"),
        ("--batch", "1,two", "--batch must be integers separated by commas, got '1,two'"),
        ("--context", "100", "context=100 must be positive and a multiple of 32"),
        ("--strategy", "greedy", "unknown strategy 'greedy'"),
        ("--dtype", "int8", "dtype='int8' must be one of float32, bfloat16"),
        ("--kernels", "fast", "kernels='fast' must be one of auto, reference"),
        ("--mesh", "expert=2", "a 1x2x1 mesh needs 2 devices; there are 1"),
    ],
)
def test_bad_options_are_named(option, value, complaint):
    result = CliRunner().invoke(app, ["bench", "step", "--shape", "tiny", option, value])
    assert result.exit_code == 2
    assert complaint in result.stderr
