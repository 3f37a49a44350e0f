"""Models whose experts are quantised: how they are loaded, what they decode, and what is refused."""

from __future__ import annotations

import math
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.bench.shapes import SHAPES
from diffulex_jax.errors import SettingError
from diffulex_jax.models.base import is_param, leaves
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.training.arithmetic import data, evaluate
from diffulex_jax.weights import assembly, checkpoint
from diffulex_jax.weights.quantise import form_of
from pallas_kernels.grouped_matmul import is_quantised, stored
from pallas_kernels.quantised import FORMS, dequantise, quantise


GOLDEN = pathlib.Path(__file__).parent / "golden"


def meant(params):
    """The plain parameters that quantised ones stand for."""
    return jax.tree.map(lambda leaf: dequantise(leaf) if is_quantised(leaf) else leaf, params, is_leaf=is_quantised)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_loaded_is_what_would_be_quantised(form, monkeypatch):
    """Layer by layer as all at once; experts alone."""
    monkeypatch.setattr(assembly, "HOST_BYTES", 1)
    _, plain = checkpoint.load(GOLDEN / "tiny-llada2", make_mesh())
    model, params = checkpoint.load(GOLDEN / "tiny-llada2", make_mesh(), weights=form)
    found = leaves(params)
    assert {path for path, leaf in found.items() if is_quantised(leaf)} == {("moe", "experts_gate_up"), ("moe", "experts_down")}
    for path, leaf in leaves(plain).items():
        want = stored(leaf, form, backend="ragged", dtype=jnp.float32) if is_quantised(found[path]) else leaf
        assert jax.tree.structure(found[path]) == jax.tree.structure(want)
        jax.tree.map(np.testing.assert_array_equal, found[path], want)
    assert form_of(params) == form and form_of(plain) is None


def test_a_layer_of_many_experts_is_read_some_of_them_at_a_time():
    """LLaDA2-mini's 256 of 2048 x 1024 and 512 x 2048 have 1 GiB and a half of it, a piece a quarter."""
    model = model_of(SHAPES["llada2-mini"])
    schema, one, two = leaves(model.schema), make_mesh(), jax.sharding.AbstractMesh((1, 2, 1), ("data", "expert", "tensor"))

    def sizes(*leaf, mesh=one):
        parts = [(tensor, part) for tensor in model.tensors for part in tensor.parts if part.leaf == leaf]
        return assembly._piece_sizes(schema[leaf], parts, 2 * math.prod(schema[leaf].shape), mesh)

    assert sizes("moe", "experts_gate_up") == (1, 64) and sizes("moe", "experts_down") == (1, 128)
    assert sizes("moe", "experts_down", mesh=two) == (1,)  # each device has a part of every piece
    assert sizes("moe", "qkv") == (19,) and sizes("embed") == ()


def test_loading_never_holds_a_leaf_whole(tmp_path, monkeypatch):
    """Host memory is that of a few tensors and a layer, whatever the number of layers."""
    monkeypatch.setattr(assembly, "HOST_BYTES", 1)
    model = model_of(SHAPES["tiny"] | {"num_hidden_layers": 9, "num_experts": 32, "vocab_size": 1024})
    params = jax.tree.map(lambda param: np.full(param.shape, 0.01, np.float32), model.schema, is_leaf=is_param)
    checkpoint.save(tmp_path, model, params, dtype="float32")
    whole = leaves(params)["moe", "experts_gate_up"].nbytes
    tracemalloc.start()
    checkpoint.load(tmp_path, make_mesh(), weights="int8")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < whole / 2


@pytest.mark.sweep
@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_model_decodes_what_its_plain_parameters_decode(form):
    """Token for token in float32, and the problems are solved as well as before."""
    settings = {"strategy": "dmax", "max_slots": 8, "max_model_len": data.CANVAS, "warm_up": False}
    engine = Engine.from_pretrained("embedded", weights=form, **settings)
    model, params = checkpoint.load(checkpoint.EMBEDDED, make_mesh(), weights=form)
    plain = Engine(model, meant(params), tokenizer=engine.tokenizer, eos_ids=engine.model.spec.eos_ids, model_id="embedded", **settings)
    problems = evaluate.held_out(24)
    found = [evaluate.measure(e, problems, [p.question for p in problems], SamplingParams(accept_threshold=0.5)) for e in (engine, plain)]
    assert found[0]["tokens"] == found[1]["tokens"] and found[0]["forwards"] == found[1]["forwards"]
    prompts = [p.question for p in problems[:8]]
    answers, expected = (e.generate(prompts, SamplingParams(max_tokens=64)) for e in (engine, plain))
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert found[0]["exact"] >= 23 / 24
    (id_,) = engine.add(prompts[0])
    engine.step()
    with pytest.raises(ValueError, match=f"weights='{form}'; this engine has weights='None'"):
        plain.restore(engine.snapshot(id_))
    engine.abort(id_)


@pytest.mark.sweep
def test_parameters_given_to_an_engine_are_quantised_by_it():
    settings = {"max_slots": 1, "max_model_len": 64, "block_size": 32, "warm_up": False}
    model, params = checkpoint.load(GOLDEN / "tiny-llada2", make_mesh())
    _, loaded = checkpoint.load(GOLDEN / "tiny-llada2", make_mesh(), weights="int8")
    prompt, ask = [5, 6, 7], SamplingParams(max_tokens=32, ignore_eos=True)
    by_engine, as_loaded = (Engine(model, p, weights="int8", **settings) for p in (params, loaded))
    assert by_engine.generate([prompt], ask)[0].token_ids == as_loaded.generate([prompt], ask)[0].token_ids
    with pytest.raises(SettingError, match="weights='int4', but the parameters are quantised already, as 'int8'"):
        Engine(model, loaded, weights="int4", **settings)


def test_what_cannot_be_quantised_is_refused_by_name(tmp_path):
    with pytest.raises(SettingError, match="weights='nf4' must be one of None, int8, int4, fp8"):
        Engine.from_pretrained(str(GOLDEN / "tiny-llada2"), weights="nf4")
    _, params = checkpoint.load(GOLDEN / "tiny-llada2", make_mesh(), weights="int8")
    with pytest.raises(ValueError, match="the parameters are quantised, as 'int8', and only plain ones are saved"):
        checkpoint.save(tmp_path, checkpoint.load_model(GOLDEN / "tiny-llada2"), params)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="unknown quantised form 'int2'; choose one of int8, int4, fp8"):
        quantise(jnp.ones((4, 4)), "int2")
