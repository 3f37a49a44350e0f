"""Models without experts whose layers are quantised: how they are loaded and written, what they compute, and how devices share them."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from sweep import sweep
from typer.testing import CliRunner

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.bench.shapes import random_params
from diffulex_jax.cli.commands import app
from diffulex_jax.errors import SettingError
from diffulex_jax.models.base import leaves
from diffulex_jax.parallel.mesh import abstract_mesh, make_mesh
from diffulex_jax.planning.plan import plan
from diffulex_jax.training.layout import predict
from diffulex_jax.weights import adapters, assembly, checkpoint
from diffulex_jax.weights.adapter_stacks import beside
from diffulex_jax.weights.adapters import Lora
from diffulex_jax.weights.quantise import form_of, placement, quantised, store
from pallas_kernels import REFERENCE
from pallas_kernels.grouped_matmul import plain
from pallas_kernels.linear import stored
from pallas_kernels.quantised import FORMS
from pallas_kernels.quantised.matrices import is_quantised


FAMILIES = pathlib.Path(__file__).parent / "golden" / "families"
SDAR = FAMILIES / "tiny-sdar-trained"
ROWS = {"qkv": 1, "out": 3, "mlp_gate_up": 1, "mlp_down": 1}
"""The leaves that are quantised, and how many axes of theirs products contract."""


def meant(model, params):
    """The plain parameters that quantised ones stand for."""
    schema = leaves(model.schema)
    found = {
        path: plain(leaf.flat(), jnp.float32).reshape(schema[path].shape) for path, leaf in leaves(params).items() if is_quantised(leaf)
    }
    return {
        kind: node if not isinstance(node, dict) else {name: found.get((kind, name), leaf) for name, leaf in node.items()}
        for kind, node in params.items()
    }


@pytest.mark.parametrize("form", sweep(FORMS, but=["int4"]))
@pytest.mark.parametrize("family", sweep(["tiny-sdar", "tiny-fast-dllm-v2", "tiny-dream", "tiny-llada"], but=["tiny-sdar"]))
def test_what_is_loaded_is_what_would_be_quantised(family, form, monkeypatch):
    """Layer by layer as all at once; attention and MLPs alone, without their biases and norms."""
    monkeypatch.setattr(assembly, "HOST_BYTES", 1)
    _, whole = checkpoint.load(FAMILIES / family, make_mesh())
    _, params = checkpoint.load(FAMILIES / family, make_mesh(), weights=form)
    found = leaves(params)
    assert {path for path, leaf in found.items() if is_quantised(leaf)} == {("dense", name) for name in ROWS}
    assert form_of(params) == form and form_of(whole) is None
    for path, leaf in leaves(whole).items():
        how = {"rows": ROWS.get(path[-1]), "backend": "ragged", "dtype": jnp.float32, "part": (1, 1)}
        want = stored(leaf, form, **how) if is_quantised(found[path]) else leaf
        assert jax.tree.structure(found[path]) == jax.tree.structure(want)
        jax.tree.map(np.testing.assert_array_equal, found[path], want)


@pytest.mark.sweep_but("int8")
@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_model_computes_what_its_plain_parameters_do(form):
    """And stays near the model that it was made of."""
    model, params = checkpoint.load(SDAR, make_mesh(), weights=form)
    _, before = checkpoint.load(SDAR, make_mesh())
    rng = np.random.default_rng(0)
    clean = jnp.asarray(rng.integers(0, model.spec.mask_id, (2, 8 * model.spec.block_size)), jnp.int32)
    noisy = jnp.where(jnp.asarray(rng.random(clean.shape) < 0.5), model.spec.mask_id, clean)
    run = jax.jit(lambda params: jax.nn.softmax(predict(params, model, noisy, clean)))
    got, want, original = run(params), run(meant(model, params)), run(before)
    np.testing.assert_allclose(got, want, atol=1e-5)
    far = float(jnp.abs(got - original).sum(-1).mean())
    assert 0 < far < {"int8": 0.05, "fp8": 0.2, "int4": 0.6}[form]


def test_an_engine_decodes_with_it(engine_of):
    """As one with the plain parameters that these stand for, token for token."""
    settings = {"max_slots": 2, "max_model_len": 64}
    engine = engine_of("families/tiny-sdar-trained", weights="int8", **settings)
    ask = SamplingParams(max_tokens=24, ignore_eos=True)
    prompts = [[5, 6, 7], list(range(20, 40))]
    got = [answer.token_ids for answer in engine.generate(prompts, ask)]
    assert all(len(ids) == 24 for ids in got)
    _, params = checkpoint.load(SDAR, make_mesh())
    engine.update_params(params)  # plain ones are quantised as those of the directory were
    assert [answer.token_ids for answer in engine.generate(prompts, ask)] == got


@pytest.mark.sweep_but("int4")
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_what_would_be_loaded(form, tmp_path):
    told = CliRunner().invoke(app, ["quantize", "--model", str(SDAR), "--weights", form, "--out", str(tmp_path / "out")])
    assert told.exit_code == 0 and f"matrices in {form}" in told.stdout
    _, want = checkpoint.load(SDAR, make_mesh(), dtype=jnp.bfloat16, weights=form)
    _, got = checkpoint.load(tmp_path / "out", make_mesh(), dtype=jnp.bfloat16)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert plan(str(tmp_path / "out"), "h100:1", slots=1, max_len=64).quantised == form
    other = next(name for name in FORMS if name != form)
    with pytest.raises(SettingError, match=f"weights='{other}', but the matrices of .* are quantised already, as '{form}'"):
        checkpoint.load(tmp_path / "out", make_mesh(), weights=other)


def test_a_plan_counts_the_bytes():
    sizes = {"slots": 1, "max_len": 64, "dtype": "bfloat16"}
    whole, half, quarter = (plan(str(FAMILIES / "tiny-sdar"), "h100:1", weights=form, **sizes).weights for form in (None, "int8", "int4"))
    schema = leaves(checkpoint.load_model(FAMILIES / "tiny-sdar").schema)
    numbers = sum(int(np.prod(param.shape)) for path, param in schema.items() if path[-1] in ROWS)
    assert whole > half > quarter
    assert whole - half == numbers - 2 * sum(3 * n for n in (64, 320, 64, 256))  # two bytes for each column's scale


def test_a_mesh_that_would_split_a_group_is_refused():
    """160 rows of ``mlp_down`` are five groups of 32."""
    model = checkpoint.load_model(FAMILIES / "tiny-sdar")
    param, mesh = leaves(model.schema)["dense", "mlp_down"], abstract_mesh(tensor=2)
    kept = {
        form: jax.eval_shape(
            store(param, form, kernels=REFERENCE, dtype=jnp.float32, mesh=mesh), jax.ShapeDtypeStruct(param.shape, "float32")
        )
        for form in ("int8", "int4")
    }
    where = placement(mesh, param, kept["int8"])
    assert where.numbers.spec == PartitionSpec(None, ("expert", "tensor"), None) and not any(where.scales.spec)
    with pytest.raises(SettingError, match="weights='int4': the 5 groups of a matrix .160, 64. cannot be split over 2 devices"):
        placement(mesh, param, kept["int4"])
    with pytest.raises(ValueError, match="5 groups of a matrix .160, 64. cannot be split over 2 devices"):
        plan(str(FAMILIES / "tiny-sdar"), "v5e:2x4", slots=8, max_len=64, weights="int4", mesh="tensor=2")


def test_parameters_that_are_quantised_stay_so():
    model, params = checkpoint.load(SDAR, make_mesh(), weights="int8")
    assert quantised(model, params, "int8", kernels=REFERENCE, mesh=make_mesh()) is params
    with pytest.raises(SettingError, match="weights='fp8', but the parameters are quantised already, as 'int8'"):
        quantised(model, params, "fp8", kernels=REFERENCE, mesh=make_mesh())


def test_matrices_that_a_config_leaves_out_keep_all_plain(tmp_path):
    """An engine has one form for all: of a directory where some stay in bfloat16, it makes all plain, or quantises them itself."""
    CliRunner().invoke(app, ["quantize", "--model", str(SDAR), "--weights", "int8", "--out", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["ignore"] = [r"re:.*o_proj$"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert checkpoint.form_in(tmp_path / "out") is None and checkpoint.form_in(tmp_path / "out", "int4") == "int4"
    _, params = checkpoint.load(tmp_path / "out", make_mesh())
    assert form_of(params) is None


def test_adapters_beside_quantised_matrices_add_what_merged_ones_do():
    """To logits, and to their gradient; in every layer of each of the leaves."""
    model, params = checkpoint.load(SDAR, make_mesh(), weights="int8")
    lora = Lora(2, 3.0, tuple(ROWS))
    fresh, rng = adapters.init(model, lora, jax.random.key(0)), np.random.default_rng(0)
    trained = jax.tree.map(lambda a: np.asarray(a) + 0.05 * rng.standard_normal(a.shape, np.float32), fresh)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 200, (1, 4 * model.spec.block_size)), jnp.int32)

    def found(add, base):
        def lost(trained):
            return (predict(add(model, lora, base, trained), model, tokens, tokens)[..., :200] ** 2).mean()

        return jax.jit(jax.value_and_grad(lost))(trained)

    (got, gradient), (want, its) = found(beside, params), found(adapters.merge, meant(model, params))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), gradient, its)
    assert all(float(jnp.abs(a).max()) > 0 for a in jax.tree.leaves(gradient))
    with pytest.raises(SettingError, match="targets: dense.qkv is quantised, and only plain leaves are adapted"):
        adapters.merge(model, lora, params, trained)


def test_random_parameters_are_quantised_layer_by_layer():
    """Those that ``bench step`` makes, as they are when all layers are quantised at once."""
    model = checkpoint.load_model(SDAR)
    params, plain_ones = (random_params(model, jnp.bfloat16, weights=form) for form in ("int4", None))
    want = quantised(model, plain_ones, "int4", kernels=REFERENCE, mesh=make_mesh())
    assert jax.tree.structure(params) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, params, want)


def test_an_adapter_that_would_be_merged_into_them_is_refused_before_they_are_read(tmp_path, monkeypatch):
    model, lora = checkpoint.load_model(SDAR), Lora(2, 4.0)
    adapters.save(tmp_path, model, lora, adapters.init(model, lora, jax.random.key(0)))
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("loaded"))
    said = "dense.qkv is quantised, and only plain leaves are adapted; adapters= leaves an adapter beside it"
    with pytest.raises(SettingError, match=said):
        Engine.from_pretrained(str(SDAR), adapter=str(tmp_path), weights="int8")
