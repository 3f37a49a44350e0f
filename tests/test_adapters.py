"""Engines over a model with a LoRA adapter: its files are merged while the model is loaded."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.models.base import leaves
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.weights import adapters, checkpoint
from diffulex_jax.weights.adapters import Lora


GOLDEN = pathlib.Path(__file__).parent / "golden"
MODEL = str(GOLDEN / "tiny-llada2-trained")
SIZES = {"strategy": "llada2", "block_size": 8, "max_slots": 2, "max_model_len": 64, "warm_up": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return written(tmp_path_factory.mktemp("adapter"), Lora(rank=4, alpha=8.0))


def written(folder: pathlib.Path, lora: Lora) -> pathlib.Path:
    """An adapter that changes something: B, too, is random."""
    model = checkpoint.load_model(MODEL)
    trained = adapters.init(model, lora, jax.random.key(0))
    trained = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape) * 0.3, trained)
    adapters.save(folder, model, lora, trained)
    return folder


def test_an_adapter_is_merged_and_decodes_as_a_model_of_its_own(folder):
    model, params = checkpoint.load(MODEL, make_mesh())
    engine = Engine.from_pretrained(MODEL, adapter=str(folder), **SIZES)
    lora, trained = adapters.load(folder, model)
    want = leaves(adapters.merge(model, lora, params, trained))
    changed = set()
    for path, leaf in leaves(engine.params).items():
        np.testing.assert_allclose(leaf, want[path], atol=1e-6)
        if not np.array_equal(leaf, leaves(params)[path]):
            changed.add(path[-1])
    assert changed == {"qkv", "out"}
    asked = [[5, 6, 7]], SamplingParams(max_tokens=16, ignore_eos=True)
    other = Engine.from_pretrained(MODEL, **SIZES)
    ((plain,), (adapted,)) = (one.generate(*asked) for one in (other, engine))
    other.update_params(engine.params)
    assert adapted.token_ids == other.generate(*asked)[0].token_ids != plain.token_ids


def test_snapshots_and_prefixes_of_an_adapted_model_are_its_own(folder):
    engine = Engine.from_pretrained(MODEL, adapter=str(folder), **SIZES)
    (id_,) = engine.add([1, 2, 3], SamplingParams(max_tokens=8))
    taken = engine.snapshot(id_)
    with pytest.raises(ValueError, match="the snapshot is of model='.* [+] .*'; this engine has model="):
        Engine.from_pretrained(MODEL, **SIZES).restore(taken)


def test_an_adapter_that_will_not_do_is_named_before_the_model_is_loaded(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="adapter_config.json cannot be read"):
        Engine.from_pretrained(MODEL, adapter=str(tmp_path), **SIZES)
    with pytest.raises(ValueError, match="fits nothing in this model"):
        Engine.from_pretrained(MODEL, adapter=str(elsewhere(tmp_path, folder)), **SIZES)
    with pytest.raises(ValueError, match="adapter=3 must be the path of a directory"):
        Engine.from_pretrained(MODEL, adapter=3, **SIZES)


def elsewhere(folder: pathlib.Path, of: pathlib.Path) -> pathlib.Path:
    """The adapter ``of`` with another name for one of its tensors."""
    tensors = load_file(of / adapters.WEIGHTS)
    first = min(tensors)
    tensors[first.replace("layers.0", "layers.77")] = tensors.pop(first)
    save_file(tensors, folder / adapters.WEIGHTS)
    (folder / adapters.CONFIG).write_text((of / adapters.CONFIG).read_text())
    return folder


def test_what_is_quantised_is_not_adapted(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("loaded"))
    adapted = written(tmp_path, Lora(targets=("experts_down",)))
    with pytest.raises(ValueError, match="moe.experts_down is quantised, and only plain leaves are adapted"):
        Engine.from_pretrained(MODEL, adapter=str(adapted), weights="int8", **SIZES)


def test_parameters_that_are_given_have_no_adapter(folder):
    model = checkpoint.load_model(MODEL)
    with pytest.raises(ValueError, match="adapter is merged while a model is loaded"):
        Engine(model, {}, adapter=str(folder), **SIZES)
